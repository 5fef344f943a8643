# SPDX-License-Identifier: Apache-2.0
"""Clipping by the total norm on row-sparse gradients, CPU: tiger_ext against plain torch.

The plain ways are `coalesce()` and `unique()` with `index_add_()`; torch's own function refuses
sparse gradients. All contenders scale the gradient that they leave in `.grad`: "clipped" with a
norm above `max_norm`, "unclipped" with one below, where torch's habit is to multiply by 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import harness
import torch
from harness import Bar, Cell, Contender, Report
from torch import Tensor
from torch.nn import Parameter

from tiger_ext.clip import clip_grad_norm_

OURS, COALESCE, UNIQUE = "tiger_ext", "coalesce", "unique, index_add_"
_TOUCHED_BY_A_ROTATION = 256 << 20


@dataclass(frozen=True)
class ClipCell:
    """One table, one gradient of ``n`` entries; or ``tables`` equal ones."""

    n: int
    ids: str
    dim: int = 64
    rows: int = 10**6
    tables: int = 1
    clipped: bool = True

    @property
    def name(self) -> str:
        """Return a readable name."""
        tables = f"{self.tables} tables of " if self.tables > 1 else ""
        clipped = "clipped" if self.clipped else "unclipped"
        rows = f"{self.rows:.3g}".replace("e+0", "e")
        return f"{tables}{rows} x {self.dim}, n {self.n:,}, {self.ids}, {clipped}"

    def parameters(self) -> list[Parameter]:
        """Return the tables; one page of memory each, as nobody reads them."""
        zero = torch.zeros(1, self.dim)
        return [Parameter(zero.expand(self.rows, self.dim)) for _ in range(self.tables)]

    def gradients(self, rotations: int) -> list[list[Tensor]]:
        """Return ``rotations`` lists with one gradient for each table."""
        generator = torch.Generator().manual_seed(self.n)
        return [[self._gradient(generator) for _ in range(self.tables)] for _ in range(rotations)]

    def _gradient(self, generator: torch.Generator) -> Tensor:
        ids = harness.make_ids(self.ids, self.rows, self.n, generator)
        values = torch.randn(self.n, self.dim, generator=generator)
        return torch.sparse_coo_tensor(ids[None], values, (self.rows, self.dim))

    def max_norm(self, norm: float) -> float:
        """Return a limit a little below ``norm``, so that values last many rounds; or above it."""
        return norm * (0.999 if self.clipped else 2.0)


def clip_coalesced(parameters: list[Parameter], max_norm: float) -> Tensor:
    """Clip what `coalesce()` returns, and leave that in `.grad`."""
    for p in parameters:
        p.grad = p.grad.coalesce()
    values = [p.grad._values() for p in parameters]
    total = torch.nn.utils.get_total_norm(values)
    torch._foreach_mul_(values, torch.clamp(max_norm / (total + 1e-6), max=1.0))
    return total


def clip_by_unique(parameters: list[Parameter], max_norm: float) -> Tensor:
    """Sum the rows beside the gradient, and scale its values as they are."""
    values = [p.grad._values() for p in parameters]
    sums = []
    for p, v in zip(parameters, values, strict=True):
        rows, run = p.grad._indices()[0].unique(return_inverse=True)
        sums.append(v.new_zeros(len(rows), v.shape[1]).index_add_(0, run, v))
    total = torch.nn.utils.get_total_norm(sums)
    torch._foreach_mul_(values, torch.clamp(max_norm / (total + 1e-6), max=1.0))
    return total


CONTENDERS: dict[str, Callable[[list[Parameter], float], Tensor]] = {
    OURS: clip_grad_norm_,
    COALESCE: clip_coalesced,
    UNIQUE: clip_by_unique,
}


def fresh(gradient: Tensor, *, copy: bool) -> Tensor:
    """Return a gradient with the same entries, not known to be coalesced."""
    values = gradient._values().clone() if copy else gradient._values()
    return torch.sparse_coo_tensor(gradient._indices(), values, gradient.shape)


def verify() -> None:
    """Check that all contenders return the norm of the dense gradient, and scale to it."""
    cell = ClipCell(5000, "zipf 1.05", dim=8, rows=1000, tables=2)
    (gradients,) = cell.gradients(1)
    dense = [Parameter(torch.zeros(g.shape)) for g in gradients]
    for p, g in zip(dense, gradients, strict=True):
        p.grad = g.to_dense()
    expected = torch.nn.utils.clip_grad_norm_(dense, 10.0)
    for name, clip in CONTENDERS.items():
        parameters = cell.parameters()
        for p, g in zip(parameters, gradients, strict=True):
            p.grad = fresh(g, copy=True)
        harness.check_close(f"{name}'s norm", clip(parameters, 10.0), expected, 1e-5, 0.0)
        for p, d in zip(parameters, dense, strict=True):
            harness.check_close(f"{name}'s gradient", p.grad.to_dense(), d.grad, 1e-4, 1e-6)


def measure(cell: ClipCell, report: Report) -> Cell:
    """Time one call on gradients that are in no cache."""
    size = cell.tables * cell.n * cell.dim * 4
    gradients = cell.gradients(max(2, min(32, math.ceil(_TOUCHED_BY_A_ROTATION / size))))
    parameters = cell.parameters()

    def set_gradients(i: int) -> None:
        for p, g in zip(parameters, gradients[i], strict=True):
            p.grad = fresh(g, copy=False)

    set_gradients(0)
    limit = cell.max_norm(float(clip_grad_norm_(parameters, math.inf)))
    race = harness.alternate(
        [
            Contender(name, lambda _, clip=clip: clip(parameters, limit), set_gradients)
            for name, clip in CONTENDERS.items()
        ],
        len(gradients),
        budget=0.5 if report.args.quick else 6.0,
    )
    floor = 3 * size if cell.clipped else size  # read for the norm, read and written to scale
    return report.add(
        cell.name,
        race,
        OURS,
        floor_bytes=floor,
        floor_share=report.floor_share(floor, race.timings[OURS]),
    )


def cells(quick: bool) -> dict[str, ClipCell]:
    """Return the cells by the key that the bars use."""
    found = {
        "clipped": ClipCell(65536, "uniform"),
        "unclipped": ClipCell(65536, "uniform", clipped=False),
        "zipf": ClipCell(65536, "zipf 1.05"),
        "one row": ClipCell(65536, "one row"),
        "26 tables": ClipCell(2048, "zipf 1.05", dim=16, tables=26),
    }
    return dict(list(found.items())[:3]) if quick else found


def bars(measured: dict[str, Cell]) -> list[Bar]:
    def times(key: str, peer: str = COALESCE) -> float:
        ratio = measured[key].race.ratio(peer, OURS) if key in measured else None
        return ratio.median if ratio else math.nan

    return [
        Bar("clipping 65,536 uniform entries, vs coalesce", times("clipped"), 10),
        Bar("the same, norm below the limit", times("unclipped")),
        Bar("clipping 65,536 uniform entries, vs unique", times("clipped", UNIQUE)),
        Bar("65,536 zipf 1.05 entries, vs coalesce", times("zipf")),
        Bar("65,536 entries of one row, vs coalesce", times("one row")),
        Bar("26 tables of 2,048 zipf 1.05 entries, vs coalesce", times("26 tables")),
    ]


def main() -> None:
    args = harness.parse_arguments(__doc__)
    report = Report("bench_clip", "Clipping the norm of sparse gradients, on the CPU", args)
    verify()
    wanted = cells(args.quick)
    measured = {
        key: measure(cell, report)
        for key, cell in harness.progress(wanted.items(), "clipping", len(wanted))
    }
    report.finish(bars(measured))


if __name__ == "__main__":
    main()
