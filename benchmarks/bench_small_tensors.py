# SPDX-License-Identifier: Apache-2.0
"""The overhead of an optimizer step on the CPU: many small tensors, one tensor, one sparse entry.

Next to no bytes move here; the time is Python's and the dispatcher's. The cell with as many
elements in one tensor shows what the number of tensors costs.
"""

from __future__ import annotations

import math

import bench_dense
import bench_sparse
import harness
from bench_dense import DenseCell
from bench_sparse import SparseCell
from harness import Bar, Cell, Report

_ELEMENTS = 64


def cells() -> dict[str, DenseCell]:
    """Return the dense cells by the key that the bars use."""
    return {
        "one": DenseCell("one tensor of 64", ((_ELEMENTS,),)),
        "1000": DenseCell("1,000 tensors of 64", 1000 * ((_ELEMENTS,),)),
        "1000 in one": DenseCell("one tensor of 64,000", ((1000 * _ELEMENTS,),)),
        "5000": DenseCell("5,000 tensors of 64", 5000 * ((_ELEMENTS,),)),
        "5000 in one": DenseCell("one tensor of 320,000", ((5000 * _ELEMENTS,),)),
    }


def measure_one_entry(report: Report) -> Cell:
    """Time one entry in one table, sparse."""
    cell = SparseCell((10**5 if report.args.quick else 10**6,), 64, 1, "uniform")
    (result,) = bench_sparse.measure_matrix([cell], report).values()
    return result


def bars(dense: dict[str, Cell], sparse: Cell) -> list[Bar]:
    def times(cell: Cell, peer: str = "torch fused AdamW", ours: str = "Tiger") -> float:
        ratio = cell.race.ratio(peer, ours)
        return ratio.median if ratio else math.nan

    def microseconds_a_tensor(count: str) -> float:
        many, one = (dense[key].race.timings["Tiger"].median for key in (count, f"{count} in one"))
        return (many - one) / int(count) * 1e6

    adam = "torch SparseAdam"
    return [
        Bar("1,000 tensors, Tiger vs torch fused AdamW", times(dense["1000"]), 4, 8),
        Bar("5,000 tensors, Tiger vs torch fused AdamW", times(dense["5000"]), 4, 8),
        Bar("one tensor, Tiger vs torch fused AdamW", times(dense["one"]), 1, 2.5),
        Bar("one sparse entry, Tiger vs SparseAdam", times(sparse, adam), 3, 5),
        Bar("1,000 tensors, AdamW vs torch fused AdamW", times(dense["1000"], ours="AdamW")),
        Bar("1,000 tensors, Tiger vs lion-pytorch", times(dense["1000"], "lion-pytorch")),
        Bar("1,000 tensors, Tiger vs DeepSpeedCPULion", times(dense["1000"], "DeepSpeedCPULion")),
        Bar("one sparse entry, AdamW vs SparseAdam", times(sparse, adam, "AdamW")),
        Bar("microseconds a tensor, of 1,000", microseconds_a_tensor("1000"), at_most=True),
        Bar("microseconds a tensor, of 5,000", microseconds_a_tensor("5000"), at_most=True),
    ]


def main() -> None:
    args = harness.parse_arguments(__doc__)
    report = Report("bench_small_tensors", "Optimizer step on small tensors, on the CPU", args)
    bench_dense.verify(report)
    bench_sparse.verify()
    dense = {
        key: bench_dense.measure(cell, report, rotations=2 if args.quick else 8, budget=3.0)
        for key, cell in harness.progress(cells().items(), "small tensors", len(cells()))
    }
    report.finish(bars(dense, measure_one_entry(report)))


if __name__ == "__main__":
    main()
