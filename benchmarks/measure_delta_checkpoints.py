# SPDX-License-Identifier: Apache-2.0
"""Time and bytes of a full checkpoint and of deltas: writes results/delta_checkpoints.json.

One table in a lazy mode, of which each delta has one row in a hundred. Everything is written to the
disk (fsync) before the clock stops. At the end the restored run is compared bit by bit.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import harness
import torch
from torch.nn import Parameter

from tiger_ext import Tiger
from tiger_ext.checkpoint import apply_changes, position, save_changes

_STEPS = 100  # between two deltas


def make(rows: int, dim: int, scale: float) -> tuple[Parameter, Tiger]:
    """Return a table and its optimizer."""
    table = Parameter(harness.fill_random_(torch.empty(rows, dim), scale))
    return table, Tiger([table], lr=1e-3, lazy="exact")


def train(table: Parameter, optimizer: Tiger, rows: int, generator: torch.Generator) -> None:
    """Touch so many rows in a few steps."""
    for ids in torch.randperm(len(table), generator=generator)[:rows].chunk(_STEPS):
        values = torch.randn(len(ids), table.shape[1], generator=generator)
        table.grad = torch.sparse_coo_tensor(ids[None], values, table.shape)
        optimizer.step()
    table.grad = None


def save_in_full(table: Parameter, optimizer: Tiger, path: Path) -> None:
    """Do what ``torch.save`` does, until it is on the disk."""
    with open(path, "wb") as file:
        torch.save({"model": table.detach(), "optimizer": optimizer.state_dict()}, file)
        file.flush()
        os.fsync(file.fileno())


def timed(call: Any, *arguments: Any) -> tuple[float, Any]:
    """Return the seconds that a call takes, and what it returns."""
    start = time.perf_counter()
    found = call(*arguments)
    return time.perf_counter() - start, found


def resident_bytes() -> int:
    """Return the bytes of this process that are in memory."""
    found = harness.resident()
    return found["anonymous"] + found["file"]


def measure(rows: int, dim: int, repeats: int, folder: Path) -> dict[str, Any]:
    """Return seconds and bytes."""
    generator = torch.Generator().manual_seed(0)
    table, optimizer = make(rows, dim, 0.1)
    train(table, optimizer, rows // 2, generator)
    full = folder / "full"
    seconds: dict[str, list[float]] = {"full": [], "position": [], "delta": [], "apply": []}
    for _ in range(repeats):
        seconds["full"].append(timed(save_in_full, table, optimizer, full)[0])
        elapsed, since = timed(position, optimizer)
        seconds["position"].append(elapsed)
    deltas, before = [], resident_bytes()
    for k in range(repeats):
        train(table, optimizer, rows // 100, generator)
        deltas.append(folder / f"delta{k}")
        elapsed, since = timed(save_changes, optimizer, deltas[-1], since)
        seconds["delta"].append(elapsed)
    grown = resident_bytes() - before

    copy, other = make(rows, dim, 0.2)
    saved = torch.load(full, weights_only=True, mmap=True)
    copy.data.copy_(saved["model"])
    other.load_state_dict(saved["optimizer"])
    del saved
    for delta in deltas:
        seconds["apply"].append(timed(apply_changes, other, delta)[0])
    states = (optimizer.state[table], other.state[copy])
    alike = all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    if not (alike and torch.equal(table, copy)):
        raise AssertionError("verification: the restored run is another")
    row_bytes = sum(t.nbytes for t in (table, *states[0].values())) / rows
    sizes = [delta.stat().st_size for delta in deltas]
    return {
        "rows": rows,
        "dim": dim,
        "rows_touched_for_a_delta": rows // 100,
        "bytes": {"full": full.stat().st_size, "delta": sizes, "a_row": row_bytes},
        "seconds": {name: [round(s, 4) for s in each] for name, each in seconds.items()},
        "median_seconds": {n: round(statistics.median(s), 4) for n, s in seconds.items()},
        "resident_bytes_grown_by_the_deltas": grown,
    }


def main() -> None:
    """Measure, print, and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=10**7)
    parser.add_argument("--dim", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where checkpoints are written")
    args = parser.parse_args()
    torch.sparse.check_sparse_tensor_invariants.disable()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        found = measure(args.rows, args.dim, args.repeats, Path(folder))
    print(json.dumps(found, indent=1))
    path = Path(__file__).resolve().parent / "results" / "delta_checkpoints.json"
    written = {
        "script": Path(__file__).name,
        "claim": "Delta checkpoints cost what the touched rows cost",
        "machine": {k: v for k, v in harness.describe_machine().items() if k != "peers"},
        "options": {"rows": args.rows, "dim": args.dim, "repeats": args.repeats},
        **found,
    }
    path.write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
