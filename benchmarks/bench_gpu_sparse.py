# SPDX-License-Identifier: Apache-2.0
"""The optimizer step on row-sparse gradients, on a GPU: tiger_ext against torch.optim.

A headline cell, and around it one axis at a time. ``.grad`` is set, ``step()`` is timed, sorting
included. All contenders of a cell update the same tables in turn, and share their momenta.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import bench_sparse
import gpu_harness
import harness
import torch
from bench_sparse import CRITEO_KAGGLE, ONE_ROW, SparseCell, Tables
from gpu_harness import GpuReport, Method, ours, torchs
from harness import Bar, Cell, geometric_mean
from torch import Tensor
from torch.nn import Parameter
from torch.optim import SGD, SparseAdam

from tiger_ext import AdamW, Tiger

METHODS: dict[str, Method] = {
    "Tiger": ours(Tiger),
    "torch SparseAdam": torchs(SparseAdam),
    "torch SGD": torchs(SGD),  # without momentum
    "AdamW": ours(AdamW),
    "Tiger decay": ours(Tiger, lazy="decay"),
    "Tiger exact": ours(Tiger, lazy="exact"),
    "AdamW decay": ours(AdamW, lazy="decay"),
}
_LARGEST_TABLE = 1 << 31  # elements
_MOST_VALUES = 1 << 27  # elements of a gradient
_COPIES = 5  # of the tables: parameters, two momenta, two while an optimizer creates its own


def gradients(cell: SparseCell, rotations: int) -> list[list[Tensor]]:
    """Return ``rotations`` lists with one sparse gradient for each table, on the device."""
    generator = torch.Generator().manual_seed(cell.n)

    def gradient(rows: int) -> Tensor:
        ids = harness.make_ids(cell.ids, rows, cell.n, generator).to(gpu_harness.DEVICE)
        values = torch.randn(cell.n, cell.dim, device=gpu_harness.DEVICE)
        values = values.mul_(0.01).to(cell.dtype)
        sparse = torch.sparse_coo_tensor(ids[None], values, (rows, cell.dim))
        return sparse.coalesce() if cell.coalesced else sparse

    return [[gradient(rows) for rows in cell.tables] for _ in range(rotations)]


def create_tables(cell: SparseCell, report: GpuReport) -> Tables:
    """Return the tables of a cell with all optimizers."""
    params = [
        Parameter(torch.empty(s, dtype=cell.dtype, device=gpu_harness.DEVICE).normal_(0, 0.1))
        for s in ((rows, cell.dim) for rows in cell.tables)
    ]
    (first,) = gradients(replace(cell, n=1, coalesced=False), 1)
    return gpu_harness.create_optimizers(params, METHODS, first, report)


def measure(cell: SparseCell, tables: Tables, report: GpuReport, budget: float) -> Cell:
    """Time all optimizers on a cell, in turn."""
    at_most = cell.n * len(cell.tables) * cell.dim * cell.dtype.itemsize * 5
    inputs = gradients(cell, bench_sparse._rotations(at_most))
    race = gpu_harness.alternate(
        tables.contenders(inputs), len(inputs), budget=budget, max_rounds=60
    )
    tables.set_gradients([None] * len(tables.params))
    floors = {"Tiger": cell.floor_bytes(inputs, 1), "AdamW": cell.floor_bytes(inputs, 2)}
    shares = {f"{name} floor share": report.share(f, race, name) for name, f in floors.items()}
    return report.add(cell.name, race, "Tiger", floor_bytes=floors["Tiger"], **shares)


def matrix(quick: bool) -> list[SparseCell]:
    """Return the headline cell, then what differs from it in one respect."""
    rows, n = (1 << 16, 1 << 13) if quick else (1 << 24, 1 << 20)
    rows = min(rows, gpu_harness.free_bytes() // (2 * _COPIES * 128 * 4))
    headline = SparseCell((rows,), 128, n, "zipf 1.05")
    if quick:
        uniform, one_row = replace(headline, ids="uniform"), replace(headline, ids=ONE_ROW)
        return [headline, uniform, one_row, replace(headline, dim=64, dtype=torch.bfloat16)]
    return [
        headline,
        *(replace(headline, n=k) for k in (1, 8192, 65536, 262144)),
        *(replace(headline, ids=ids) for ids in ("uniform", "zipf 0.8", "zipf 1.15")),
        replace(headline, coalesced=True),
        replace(headline, ids=ONE_ROW),
        *(
            replace(
                headline,
                tables=(min(rows, _LARGEST_TABLE // dim),),
                dim=dim,
                n=min(n, _MOST_VALUES // dim),
            )
            for dim in (16, 64, 512, 4096)
        ),
        replace(headline, dtype=torch.bfloat16),
        replace(headline, tables=CRITEO_KAGGLE, n=32768),
    ]


def measure_matrix(wanted: Sequence[SparseCell], report: GpuReport) -> dict[SparseCell, Cell]:
    """Time the cells in their order, as many as time and memory allow."""
    results: dict[SparseCell, Cell] = {}
    tables, shapes = None, None
    for done, cell in enumerate(harness.progress(wanted, "sparse")):
        left = gpu_harness.seconds_left(report.args)
        if results and left < 2:
            report.note(f"{cell.name} left out: the time is over")
            continue
        if shapes != (cell.tables, cell.dim, cell.dtype):
            tables, shapes = None, (cell.tables, cell.dim, cell.dtype)
            if gpu_harness.free_bytes() > _COPIES * cell.table_bytes:
                tables = create_tables(cell, report)
        if tables is None:
            report.note(f"{cell.name} left out: too large for the memory of this GPU")
            continue
        budget = min(3.0, 0.3 * left / (len(wanted) - done))
        results[cell] = measure(cell, tables, report, budget)
    return results


def verify(report: GpuReport) -> None:
    cell = SparseCell((500,), 24, 2000, "zipf 1.05")
    inputs = [100 * g for (g,) in cell.gradients(3)]
    gpu_harness.verify(METHODS, inputs, report)
    gpu_harness.verify(METHODS, inputs, report, torch.bfloat16)
    gpu_harness.verify(METHODS, [g.coalesce() for g in inputs], report)


def bars(results: Mapping[SparseCell, Cell]) -> list[Bar]:
    headline = next(iter(results))

    def ratios(peer: str, ours: str) -> dict[SparseCell, float]:
        pairs = ((cell, result.race.ratio(peer, ours)) for cell, result in results.items())
        return {cell: ratio.median for cell, ratio in pairs if ratio is not None}

    def times(
        peer: str, ours: str, bar: float | None = None, goal: float | None = None
    ) -> list[Bar]:
        found = ratios(peer, ours)
        counted = [value for cell, value in found.items() if cell.ids != ONE_ROW]
        what = f"GPU sparse: {ours} vs {peer}"
        return [
            Bar(f"{what}, {headline.name}", found.get(headline, math.nan), bar, goal),
            Bar(f"{what}, geometric mean of all cells", geometric_mean(counted)),
            Bar(f"{what}, worst cell", min(counted, default=math.nan)),
        ]

    def share(name: str) -> float:
        return results[headline].figures[f"{name} floor share"]

    def over_uniform(ids: str) -> float:
        pair = [results.get(replace(headline, ids=kind)) for kind in (ids, "uniform")]
        skewed, uniform = (c.race.timings["Tiger"].median if c else math.nan for c in pair)
        return skewed / uniform

    def over_frozen(mode: str, frozen: str) -> float:
        return ratios(mode, frozen).get(headline, math.nan)

    skew = [over_uniform(ids) for ids in ("zipf 1.05", "zipf 1.15", ONE_ROW)]
    return [
        Bar(
            f"GPU sparse: Tiger, share of the byte floor, {headline.name}", share("Tiger"), 0.6, 0.8
        ),
        *times("torch SparseAdam", "Tiger", 10, 30),
        Bar(f"GPU sparse: AdamW, share of the byte floor, {headline.name}", share("AdamW")),
        *times("torch SparseAdam", "AdamW"),
        *times("torch SGD", "Tiger"),
        *(
            Bar(
                f'GPU sparse: time of {name} lazy="{mode}" over "frozen", {headline.name}',
                over_frozen(f"{name} {mode}", name),
                1.25,
                1.1,
                at_most=True,
            )
            for name, mode in (("Tiger", "decay"), ("Tiger", "exact"), ("AdamW", "decay"))
        ),
        Bar(
            "GPU sparse: time, Zipf or one row over uniform, worst",
            max((s for s in skew if not math.isnan(s)), default=math.nan),
            at_most=True,
        ),
    ]


def main() -> None:
    args = gpu_harness.parse_arguments(__doc__, 100)
    report = GpuReport("gpu_sparse", "Row-sparse optimizer step on a GPU", args)
    verify(report)
    report.finish(bars(measure_matrix(matrix(args.quick), report)))


if __name__ == "__main__":
    main()
