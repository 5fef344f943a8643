# SPDX-License-Identifier: Apache-2.0
"""What a step costs on a table of 1e8 rows: against one of 1e6, in memory and in a mapped file.

bfloat16 tables of `tiger_ext.empty_table`, the same number of entries a step; Tiger with a momentum
in bfloat16, or in int8 with stochastic rounding, or RMSprop with one number a row (`--state`).
Measured are the memory that a table and its state take, the first steps, the longest step while
both move to huge pages, and then the steps of both sizes in turn. A file is read with a cold page
cache too, once.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import harness
import torch
from harness import Bar, Contender, Report, Timing
from torch import Tensor
from torch.nn import Parameter

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from pages import huge_bytes

from tiger_ext import AdamW, Tiger, empty_table
from tiger_ext.huge_pages import is_large

_ROTATIONS = 8

# name -> (class, options)
STATES: dict[str, tuple[type, dict[str, Any]]] = {
    "bfloat16": (Tiger, {}),
    "int8": (Tiger, {"momentum_dtype": torch.int8, "stochastic_rounding": True}),
    "row": (AdamW, {"betas": (0.0, 0.99), "second_moment": "row"}),
}


class Table:
    """A table of some memory, its optimizer and gradients."""

    def __init__(self, rows: int, args: argparse.Namespace, path: Path | None) -> None:
        """Create them, in pages that do not exist yet."""
        before = harness.resident()["anonymous"]
        self.rows, self.dim, self.path = rows, args.dim, path
        self.parameter = Parameter(empty_table(rows, args.dim, torch.bfloat16, path=path))
        cls, options = STATES[args.state]
        self.optimizer = cls([self.parameter], lr=1e-4, **options)
        self.optimizer.init_state()
        self.bytes_after_init = harness.resident()["anonymous"] - before
        generator = torch.Generator().manual_seed(rows)
        self.gradients = [self._gradient(args.entries, generator) for _ in range(_ROTATIONS)]

    def _gradient(self, entries: int, generator: torch.Generator) -> Tensor:
        ids = harness.make_ids("uniform", self.rows, entries, generator)
        values = torch.randn(entries, self.dim, generator=generator).to(torch.bfloat16)
        return torch.sparse_coo_tensor(ids[None], values, self.parameter.shape)

    @property
    def state(self) -> dict[str, Tensor]:
        """Return the state but for the counter."""
        own: dict[str, Tensor] = self.optimizer.state[self.parameter]
        return {name: value for name, value in own.items() if name != "step"}

    def fill_state(self) -> None:
        """Write all of it: moments as of training."""
        for name, value in self.state.items():
            if value.dtype == torch.int8:
                value.random_(-127, 128)
            elif name == "exp_avg":
                harness.fill_random_(value, 1e-3)
            else:  # scales and second moments
                value.fill_(1e-5)

    def step(self, rotation: int) -> None:
        """Take a step."""
        self.parameter.grad = self.gradients[rotation % _ROTATIONS]
        self.optimizer.step()

    def timed_steps(self, count: int) -> list[float]:
        """Return the seconds of some steps."""
        seconds = []
        for k in range(count):
            start = time.perf_counter()
            self.step(k)
            seconds.append(time.perf_counter() - start)
        return seconds

    def steps_while_moving(self, longest: float) -> tuple[list[float], float | None]:
        """Return the seconds of the steps until all is in huge pages, and how long that took."""
        # Files have none. Both ends of a tensor may not be whole huge pages.
        moving = [*self.state.values(), *([] if self.path else [self.parameter.data])]
        moving = [t for t in moving if is_large(t)]
        seconds: list[float] = []
        start = time.perf_counter()
        while time.perf_counter() - start < longest:
            seconds += self.timed_steps(10)
            if all(huge_bytes(t) >= t.nbytes - (4 << 20) for t in moving):
                return seconds, time.perf_counter() - start
        return seconds, None


def write_back(path: Path, *, forget: bool = False) -> None:
    """Have what is written of a file reach the disk, and be read from there if it is not mapped."""
    file = os.open(path, os.O_RDWR)
    os.fsync(file)
    if forget:
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(file)


def summary(seconds: list[float]) -> dict[str, Any]:
    """Return what a list of steps was like."""
    timing = Timing.of(seconds)
    percentile99 = sorted(seconds)[len(seconds) * 99 // 100]
    return {
        "median": timing.median,
        "percentile_99": percentile99,
        "longest": max(seconds),
        "steps": len(seconds),
    }


def measure(kind: str, folder: Path | None, args: argparse.Namespace, report: Report) -> float:
    """Add the cell of one kind of memory; return the ratio of the steps' times."""
    tables: dict[str, Table] = {}
    figures: dict[str, Any] = {}
    for rows in sorted(args.rows):
        name = f"{rows:.3g} rows".replace("e+0", "e")
        path = None if folder is None else folder / f"{rows}"
        table = Table(rows, args, path)
        figures[f"{name}: bytes in memory after init_state"] = table.bytes_after_init
        harness.fill_random_(table.parameter.data, 0.1)
        if path is not None:
            write_back(path)
        figures[f"{name}: first steps, state unwritten, seconds"] = table.timed_steps(3)
        table.fill_state()
        steps, took = table.steps_while_moving(args.settle)
        figures[f"{name}: steps while moving to huge pages, seconds"] = summary(steps)
        figures[f"{name}: seconds until moved"] = took
        figures[f"{name}: steps after it, seconds"] = summary(table.timed_steps(50))
        tables[name] = table
    contenders = [Contender(name, table.step) for name, table in tables.items()]
    race = harness.alternate(contenders, _ROTATIONS, budget=args.budget)
    small, *_, large = tables
    figures["bytes in memory"] = harness.resident()
    report.add(kind, race, small, **figures)
    if folder is not None:
        figures = report.cells[-1].figures
        figures["cold page cache, steps, seconds"] = list(_cold_steps(tables.pop(large), args))
    return race.timings[large].median / race.timings[small].median


def _cold_steps(table: Table, args: argparse.Namespace) -> Iterator[float]:
    """Yield the seconds of the first steps on a file that is on the disk alone."""
    path, rows, old = table.path, table.rows, table.optimizer.state_dict()["state"][0]
    assert path is not None
    table.parameter.data = torch.zeros(0)
    write_back(path, forget=True)
    again = Table(rows, args, path)
    state = again.optimizer.state_dict()
    state["state"] = {0: old}
    again.optimizer.load_state_dict(state, assign=True)
    yield from again.timed_steps(5)


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", type=lambda v: int(float(v)), nargs="+", default=None)
    parser.add_argument("--dim", type=int, default=16)
    parser.add_argument("--state", choices=STATES, default="bfloat16")
    parser.add_argument("--no-file", action="store_true", help="only in memory")
    parser.add_argument("--entries", type=int, default=65_536)
    parser.add_argument("--budget", type=float, default=10.0, help="seconds of timed steps")
    parser.add_argument("--settle", type=float, default=200.0, help="seconds to wait at most")
    parser.add_argument("--folder", type=Path, help="where the files lie; default: beside --json")


def main() -> None:
    """Measure both kinds of memory."""
    args = harness.parse_arguments(__doc__, _options)
    args.rows = args.rows or ([10**5, 10**6] if args.quick else [10**6, 10**8])
    largest, smallest = max(args.rows), min(args.rows)
    report = Report("measure_large_tables", "A step on a large table over one on a small one", args)
    harness.check_against_reference(
        Tiger, (50, 4), [torch.sparse_coo_tensor([[1, 1, 7]], torch.ones(3, 4), (50, 4))] * 3
    )
    row_bytes = {"bfloat16": 4 * args.dim, "int8": 3 * args.dim + 4, "row": 2 * args.dim + 4}
    needed = row_bytes[args.state] * sum(args.rows)
    if needed > harness.available_bytes():
        raise SystemExit(f"{needed:.3g} bytes of tables and state do not fit the memory")
    sizes = f"time, {largest:.3g} rows over {smallest:.3g} rows".replace("e+0", "e")
    what = f"{sizes} x {args.dim}, {args.state} state"
    bars = [
        Bar(f"{what}, in memory", measure("in memory", None, args, report), 1.5, 1.15, at_most=True)
    ]
    if not args.no_file:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            ratio = measure("in a mapped file", Path(folder), args, report)
        bars.append(Bar(f"{what}, file, page cache warm", ratio, 1.5, at_most=True))
    args.folder = None
    report.finish(bars)


if __name__ == "__main__":
    main()
