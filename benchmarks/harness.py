# SPDX-License-Identifier: Apache-2.0
"""What every benchmark shares: in-turn timing, the bandwidth of the machine, ids, the report.

A script checks that its contenders compute the right thing, hands them to ``alternate``, adds cells
and bars to a ``Report``, and ends with ``Report.finish``: tables, JSON, and a PNG where matplotlib
is installed. Times mean little on shared CPUs; compare ratios of contenders timed in turn.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib.metadata
import json
import math
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import Parameter

import tiger_ext
from tiger_ext import _native
from tiger_ext.huge_pages import settle_huge_pages

T = TypeVar("T")

_RESULTS = Path(__file__).parent / "results"
_NOISY = 1.2  # a ratio of medians this far from the ratio of best runs is marked
_SETTLE_SECONDS = 120.0  # tables and state are moved to huge pages in the background
_PEERS = ("lion-pytorch", "pytorch-optimizer", "torch-optimi", "deepspeed", "fbgemm-gpu-cpu")

# --------------------------------------------------------------------------------------- timing


@dataclass(frozen=True)
class Contender:
    """One side of a comparison.

    ``run(i)`` is timed; ``prepare(i)``, if given, is not. ``i`` is the rotation index: which of the
    inputs to use. ``rest``: seconds to sleep before and after, for a contender with a thread pool
    of its own: idle threads spin for a while, and would take a core from the next.
    """

    name: str
    run: Callable[[int], object]
    prepare: Callable[[int], object] | None = None
    rest: float = 0.0


@dataclass(frozen=True)
class Timing:
    """Seconds per call."""

    median: float
    quartile1: float
    quartile3: float
    best: float
    runs: int

    @staticmethod
    def of(seconds: Sequence[float]) -> Timing:
        """Summarise the times of single calls."""
        if len(seconds) == 1:
            return Timing(*(4 * [seconds[0]]), 1)
        q1, median, q3 = statistics.quantiles(seconds, n=4, method="inclusive")
        return Timing(median, q1, q3, min(seconds), len(seconds))


@dataclass(frozen=True)
class Ratio:
    """How many times faster one contender is than another; ``noisy``: the two figures disagree."""

    median: float
    best: float
    noisy: bool


@dataclass
class Race:
    """The timings of contenders that ran in turn, and why others could not take part."""

    timings: dict[str, Timing]
    left_out: dict[str, str] = field(default_factory=dict)

    def ratio(self, peer: str, ours: str) -> Ratio | None:
        """Return time of ``peer`` over time of ``ours``; None unless both ran."""
        if peer not in self.timings or ours not in self.timings:
            return None
        a, b = self.timings[peer], self.timings[ours]
        median, best = a.median / b.median, a.best / b.best
        return Ratio(median, best, max(median / best, best / median) > _NOISY)

    def ratios_to(self, ours: str) -> dict[str, Ratio]:
        """Return the ratio of every other contender to ``ours``."""
        pairs = ((name, self.ratio(name, ours)) for name in self.timings if name != ours)
        return {name: ratio for name, ratio in pairs if ratio is not None}


def _timed(contender: Contender, rotation: int) -> float:
    if contender.prepare is not None:
        contender.prepare(rotation)
    if contender.rest:
        time.sleep(contender.rest)
    start = time.perf_counter()
    contender.run(rotation)
    seconds = time.perf_counter() - start
    if contender.rest:
        time.sleep(contender.rest)
    return seconds


def alternate(
    contenders: Iterable[Contender],
    rotations: int,
    *,
    budget: float = 1.0,
    min_rounds: int = 5,
    max_rounds: int = 200,
) -> Race:
    """Time the contenders in turn: rounds of all of them, each round in an order of its own.

    With a fixed order a short step is as cold as its predecessor leaves the caches, always the same
    one: that alone makes a factor of two. Every contender first runs once through all rotations,
    untimed. In a round all use different rotations, so that nobody finds the rows that the one
    before just touched.

    Args:
        contenders: who runs; one that raises in its warm-up is left out of the race.
        rotations: how many inputs there are to rotate.
        budget: seconds for the timed rounds, within ``min_rounds`` and ``max_rounds``.
        min_rounds: at least so many rounds.
        max_rounds: at most so many rounds.
    """
    running: list[Contender] = []
    race = Race({})
    round_time = 0.0
    for contender in contenders:
        try:
            times = [_timed(contender, i) for i in range(rotations)]
        except Exception as error:  # a peer's failure is a result, not the end of the run
            race.left_out[contender.name] = one_line(error)
            continue
        running.append(contender)
        round_time += statistics.median(times)
    settle_huge_pages(_SETTLE_SECONDS)

    rounds = max(min_rounds, min(max_rounds, int(budget / max(round_time, 1e-9))))
    seconds: dict[str, list[float]] = {c.name: [] for c in running}
    order = random.Random(0)
    gc.collect()
    gc.disable()
    try:
        for round_ in range(rounds):
            for position in order.sample(range(len(running)), len(running)):
                contender = running[position]
                seconds[contender.name].append(_timed(contender, (round_ + position) % rotations))
    finally:
        gc.enable()
    race.timings = {name: Timing.of(s) for name, s in seconds.items()}
    return race


def in_place_bandwidth(gigabytes: float = 1.0, repeats: int = 9) -> Timing:
    """Time ``x.mul_(1.0001)`` on float32; returns bytes per second, read plus written.

    A copy would show less: its stores also read the destination.
    """
    x = torch.ones(int(gigabytes * 1e9) // 4)
    x.mul_(1.0001)
    rates = []
    for _ in range(repeats):
        start = time.perf_counter()
        x.mul_(1.0001)
        rates.append(2 * x.nbytes / (time.perf_counter() - start))
    summary = Timing.of(rates)
    return Timing(summary.median, summary.quartile1, summary.quartile3, max(rates), repeats)


def geometric_mean(values: Iterable[float]) -> float:
    """Return the geometric mean; NaN of nothing."""
    logs = [math.log(v) for v in values]
    return math.exp(statistics.fmean(logs)) if logs else math.nan


# --------------------------------------------------------------------------------------- inputs


@lru_cache(maxsize=4)
def _zipf_head(rows: int, alpha: float) -> tuple[Tensor, float]:
    """Return the cumulated weights of the first ranks, and the weight of all ranks together."""
    head = min(rows, 1 << 20)
    cumulated = torch.arange(1, head + 1, dtype=torch.float64).pow_(-alpha).cumsum_(0)
    tail = 0.0
    if rows > head:  # the midpoint rule is exact to 1e-12 out there
        tail = ((rows + 0.5) ** (1 - alpha) - (head + 0.5) ** (1 - alpha)) / (1 - alpha)
    return cumulated, float(cumulated[-1]) + tail


def zipf_ranks(rows: int, n: int, alpha: float, generator: torch.Generator) -> Tensor:
    """Draw ``n`` ranks (0 is the most frequent) with probability ~ (rank + 1) ** -alpha."""
    cumulated, total = _zipf_head(rows, alpha)
    u = torch.rand(n, dtype=torch.float64, generator=generator) * total
    ranks = torch.searchsorted(cumulated, u)
    beyond = ranks >= len(cumulated)
    if rows > len(cumulated) and beyond.any():
        start = (len(cumulated) + 0.5) ** (1 - alpha)
        x = (start + (1 - alpha) * (u[beyond] - cumulated[-1])) ** (1 / (1 - alpha))
        ranks[beyond] = (x + 0.5).long() - 1
    return ranks.clamp_(max=rows - 1)


def _permute(ranks: Tensor, rows: int) -> Tensor:
    """Map ranks to rows one to one, so that hot rows are not neighbours."""
    multiplier = max(1, int(rows * 0.6180339887))
    while math.gcd(multiplier, rows) != 1:
        multiplier += 1
    return (ranks * multiplier + rows // 3) % rows


def make_ids(kind: str, rows: int, n: int, generator: torch.Generator) -> Tensor:
    """Return ``[n]`` int64 row ids: "uniform", "one row" or "zipf ALPHA" (permuted)."""
    if kind == "uniform":
        return torch.randint(rows, (n,), generator=generator)
    if kind == "one row":
        return torch.full((n,), rows // 2)
    name, _, alpha = kind.partition(" ")
    if name != "zipf":
        raise ValueError(f"kind={kind!r}: expected 'uniform', 'one row' or 'zipf ALPHA'")
    return _permute(zipf_ranks(rows, n, float(alpha), generator), rows)


@torch.no_grad()
def fill_random_(tensor: Tensor, scale: float = 1.0, *, positive: bool = False) -> Tensor:
    """Write every page of a contiguous tensor: a random block, repeated.

    Pages that were only zeroed may all be one physical page; nothing measured on them counts.
    """
    flat = tensor.view(-1)
    block = torch.randn(min(flat.numel(), (1 << 20) + 7)).mul_(scale)
    if positive:
        block.abs_().add_(scale * 1e-3)
    block = block.to(tensor.dtype)
    for start in range(0, flat.numel(), max(1, len(block))):
        part = flat[start : start + len(block)]
        part.copy_(block[: len(part)])
    return tensor


def resident() -> dict[str, int]:
    """Return the bytes of this process that are in memory, by kind, and the most there were.

    They are counted page by page: the sums in /proc/self/status may lag behind by some pages a
    thread. What was allocated and is free again is given back before.
    """
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
    rollup = _kilobytes(Path("/proc/self/smaps_rollup"))
    status = _kilobytes(Path("/proc/self/status"))
    anonymous = rollup["Anonymous"]
    found = {"anonymous": anonymous, "file": rollup["Rss"] - anonymous, "peak": status["VmHWM"]}
    return {name: value << 10 for name, value in found.items()}


def _kilobytes(path: Path) -> dict[str, int]:
    fields = (line.split() for line in path.read_text().splitlines())
    return {each[0].rstrip(":"): int(each[1]) for each in fields if each[2:] == ["kB"]}


def available_bytes() -> int:
    """Return how much memory can be allocated without swapping, once garbage is collected."""
    gc.collect()
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        return _kilobytes(meminfo)["MemAvailable"] << 10
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


# --------------------------------------------------------------------------------- verification


def check_close(name: str, value: Tensor, expected: Tensor, rtol: float, atol: float) -> None:
    """Raise AssertionError, naming what differs by how much, unless the tensors agree."""
    if not torch.allclose(value, expected, rtol=rtol, atol=atol):
        worst = (value - expected).abs().max().item()
        raise AssertionError(f"verification: {name}: difference up to {worst:.3g}")


def check_against_reference(
    make: Callable[..., torch.optim.Optimizer], shape: tuple[int, ...], gradients: Sequence[Tensor]
) -> None:
    """Check that the native step of a tiger_ext optimizer equals its ``fused=False`` reference.

    Parameters are compared except where the momentum is within rounding of zero: there the sign,
    and with it the step, may legally be either.
    """
    start = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    params, optimizers = [], []
    for fused in (None, False):
        params.append(Parameter(start.clone()))
        optimizers.append(make([params[-1]], lr=0.01, weight_decay=0.1, fused=fused))
    for gradient in gradients:
        for p, optimizer in zip(params, optimizers, strict=True):
            p.grad = gradient
            optimizer.step()
    name = type(optimizers[0]).__name__
    momenta = [o.state[p]["exp_avg"] for o, p in zip(optimizers, params, strict=True)]
    check_close(f"{name}'s momentum", *momenta, rtol=1e-4, atol=1e-6)
    clear = (momenta[1].abs() > 1e-4) | (momenta[1] == 0)
    check_close(f"{name}'s parameter", params[0][clear], params[1][clear], rtol=1e-4, atol=1e-5)


# --------------------------------------------------------------------------------------- report


@dataclass(frozen=True)
class Bar:
    """A figure to reach. ``bar`` None: nothing was promised, the value is for information."""

    claim: str
    value: float
    bar: float | None = None
    goal: float | None = None
    at_most: bool = False

    @property
    def verdict(self) -> str:
        """Return "goal", "met", "NOT MET", "not measured" or "information"."""
        if math.isnan(self.value):
            return "not measured"
        if self.bar is None:
            return "information"

        def reached(limit: float) -> bool:
            return self.value <= limit if self.at_most else self.value >= limit

        if self.goal is not None and reached(self.goal):
            return "goal"
        return "met" if reached(self.bar) else "NOT MET"


@dataclass
class Cell:
    """One comparison of the report: its name, its race, and figures derived from it."""

    name: str
    race: Race
    ours: str
    figures: dict[str, Any] = field(default_factory=dict)

    def contents(self) -> dict[str, Any]:
        """Return the cell as the result file has it."""
        ratios = self.race.ratios_to(self.ours)
        return {
            "name": self.name,
            **self.figures,
            "seconds": {name: asdict(timing) for name, timing in self.race.timings.items()},
            f"times_{self.ours}": {name: asdict(ratio) for name, ratio in ratios.items()},
            "left_out": self.race.left_out,
        }


def parse_arguments(
    description: str | None, extend: Callable[[argparse.ArgumentParser], None] | None = None
) -> argparse.Namespace:
    """Parse the options that every script has, and set the number of threads."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="about a minute; not for quoting")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--json",
        type=Path,
        help="result file (default: results/<script>.json; nothing with --quick)",
    )
    if extend is not None:
        extend(parser)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    # Peers that bring an OpenMP runtime of their own read this when they are first imported.
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    torch.manual_seed(0)
    # What torch does anyway, said aloud: else its optimizers warn.
    torch.sparse.check_sparse_tensor_invariants.disable()
    return args


def one_line(error: BaseException) -> str:
    """Return type and message of an error on one line, without the paths of this machine."""
    words = f"{type(error).__name__}: {error}".split()
    return " ".join(w for w in words if not w.strip("'\"([").startswith("/"))[:200]


def progress(items: Iterable[T], description: str, total: int | None = None) -> Iterable[T]:
    """Iterate with a progress bar on stderr where tqdm is installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    return tqdm(items, desc=description, total=total, file=sys.stderr, dynamic_ncols=True)


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def describe_machine() -> dict[str, Any]:
    """Return the CPU, the software and the load: what a figure depends on."""
    huge_pages = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "transparent_hugepage": huge_pages.read_text().strip() if huge_pages.exists() else None,
        "load_before": list(os.getloadavg()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "tiger_ext": tiger_ext.__version__,
        "tiger_ext_kernels": _native.C.cpu_isa() if _native.C is not None else "reference only",
        "peers": {name: _version(name) for name in _PEERS},
    }


def format_table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table with the first column left-aligned, the others right-aligned."""
    lines = [list(headers), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * w for w in widths])

    def aligned(line: list[str]) -> str:
        first, *rest = zip(line, widths, strict=True)
        return "  ".join([first[0].ljust(first[1]), *(c.rjust(w) for c, w in rest)])

    return "\n".join(map(aligned, lines))


def format_number(value: float | None) -> str:
    """Return a figure with three significant digits; "-" for none."""
    return "-" if value is None or math.isnan(value) else f"{value:#.3g}".rstrip(".")


class Report:
    """Collects cells, notes and bars of one script; prints them and writes the result file."""

    def __init__(self, script: str, claim: str, args: argparse.Namespace) -> None:
        """Describe the machine and measure its bandwidth."""
        self.script = script
        self.claim = claim
        self.args = args
        self.machine = describe_machine()
        self.cells: list[Cell] = []
        self.bars: list[Bar] = []
        self.notes: list[str] = []
        if _native.C is None:
            self.note(f"tiger_ext runs on its slow reference: {_native.unavailable}")
        load = self.machine["load_before"][0]
        if load > 0.5:
            self.note(f"the machine was not idle: load average {load:.2f} before the run")
        self.bandwidth = in_place_bandwidth(0.256 if args.quick else 1.0)

    def note(self, text: str) -> None:
        """Print a remark, once, and keep it for the result file."""
        if text not in self.notes:
            self.notes.append(text)
            print(f"note: {text}", file=sys.stderr)

    def add(self, name: str, race: Race, ours: str, **figures: Any) -> Cell:
        """Add a cell; contenders that were left out become notes."""
        for contender, reason in race.left_out.items():
            self.note(f"{contender} left out of {name}: {reason}")
        self.cells.append(Cell(name, race, ours, figures))
        return self.cells[-1]

    def floor_seconds(self, floor_bytes: int) -> float:
        """Return the time that moving so many bytes takes at the measured bandwidth."""
        return floor_bytes / self.bandwidth.median

    def floor_share(self, floor_bytes: int, timing: Timing) -> float:
        """Return which share of the bandwidth the floor of bytes was moved at."""
        return self.floor_seconds(floor_bytes) / timing.median

    def finish(self, bars: Iterable[Bar]) -> None:
        """Print the cells and the bars; write JSON and PNG."""
        self.bars = list(bars)
        end = in_place_bandwidth(0.256 if self.args.quick else 1.0)
        drift = end.median / self.bandwidth.median
        if not 1 / _NOISY < drift < _NOISY:
            self.note(f"the bandwidth after the run was {drift:.2f} times that before it")
        self._print()
        target = self.args.json
        if target is None and not self.args.quick:
            target = _RESULTS / f"{self.script}.json"
        if target is None:
            print("\nquick run: nothing saved (--json FILE saves it)")
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(_plain(self._contents(end)), indent=1) + "\n")
        drawn = self._draw(target.with_suffix(".png"))
        print(f"\nwrote {target.name}" + (f" and {target.stem}.png" if drawn else ""))

    def _print(self) -> None:
        machine, rate = self.machine, self.bandwidth.median / 1e9
        print(f"\n{self.claim}\n{machine['cpu']}, {machine['threads']} threads, ", end="")
        print(f"torch {machine['torch']}; in-place bandwidth {rate:.1f} GB/s")
        print("median ms (times the first contender's; ?: the best runs disagree by over 20 %)")
        for ours in dict.fromkeys(c.ours for c in self.cells):
            print("\n" + _table_of_cells([c for c in self.cells if c.ours == ours]))
        noisy = [r.noisy for c in self.cells for r in c.race.ratios_to(c.ours).values()]
        print(f"\n{sum(noisy)} of {len(noisy)} ratios are noisy\n")
        print(
            format_table(
                ["claim", "value", "bar", "goal", "verdict"],
                (
                    [
                        b.claim,
                        format_number(b.value),
                        _limit(b.bar, b.at_most),
                        _limit(b.goal, b.at_most),
                        b.verdict,
                    ]
                    for b in self.bars
                ),
            )
        )

    def _contents(self, bandwidth_after: Timing) -> dict[str, Any]:
        options = {k: v for k, v in vars(self.args).items() if k != "json"}
        return {
            "script": f"{self.script}.py",
            "claim": self.claim,
            "machine": self.machine,
            "options": options,
            "in_place_bytes_per_second": {
                "before": asdict(self.bandwidth),
                "after": asdict(bandwidth_after),
            },
            "bars": [{**asdict(b), "verdict": b.verdict} for b in self.bars],
            "notes": self.notes,
            "cells": [c.contents() for c in self.cells],
        }

    def _draw(self, path: Path) -> bool:
        try:
            import matplotlib

            matplotlib.use("Agg")
            from matplotlib import pyplot
        except ImportError:
            return False
        cells = [c for c in self.cells if c.ours == self.cells[0].ours]
        peers = list(dict.fromkeys(n for c in cells for n in c.race.ratios_to(c.ours)))
        if not peers:
            return False
        height = 1.5 + 0.22 * len(cells)
        figure, axes = pyplot.subplots(figsize=(9, height), layout="constrained")
        for peer in peers:
            points = [(c.race.ratio(peer, c.ours), y) for y, c in enumerate(cells)]
            known = [(r.median, y) for r, y in points if r is not None]
            axes.plot(*zip(*known, strict=True), "o", markersize=4, label=peer)
        axes.axvline(1.0, color="black", linewidth=1)
        axes.set_xscale("log")
        axes.set_yticks(range(len(cells)), [c.name for c in cells], fontsize=7)
        axes.invert_yaxis()
        axes.set_xlabel(f"median time relative to {cells[0].ours} (log)")
        axes.set_title(f"{self.claim}\n{self.machine['cpu']}, {self.machine['threads']} threads")
        axes.legend(fontsize=7)
        axes.grid(axis="x", alpha=0.3)
        figure.savefig(path, dpi=130)
        pyplot.close(figure)
        return True


def _table_of_cells(cells: Sequence[Cell]) -> str:
    ours = cells[0].ours
    others = dict.fromkeys(n for c in cells for n in c.race.timings if n != ours)
    shown = (n for c in cells for n, v in c.figures.items() if isinstance(v, float))
    figures = list(dict.fromkeys(shown))

    def time_and_ratio(cell: Cell, name: str) -> str:
        timing = cell.race.timings.get(name)
        if timing is None:
            return "-"
        ratio = cell.race.ratio(name, ours)
        note = f" ({ratio.median:#.3g}x{'?' if ratio.noisy else ''})" if ratio else ""
        return format_number(timing.median * 1e3) + (note if name != ours else "")

    return format_table(
        ["cell", ours, *others, *figures],
        (
            [
                c.name,
                *(time_and_ratio(c, name) for name in (ours, *others)),
                *(format_number(c.figures.get(f)) for f in figures),
            ]
            for c in cells
        ),
    )


def _limit(limit: float | None, at_most: bool) -> str:
    return "-" if limit is None else f"{'<=' if at_most else '>='} {limit:g}"


def _plain(value: Any) -> Any:
    """Return ``value`` as JSON can hold it: four digits, null for NaN."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else None
    return value
