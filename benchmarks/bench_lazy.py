# SPDX-License-Identifier: Apache-2.0
"""What lazy="decay" and "exact" cost over "frozen", CPU: the step, and tracking in the forward."""

from __future__ import annotations

import math

import harness
import torch
from harness import Bar, Cell, Contender, Report
from torch import Tensor, nn
from torch.nn import Parameter

from tiger_ext import AdamW, Lion, Tiger

MODES = ("frozen", "decay", "exact")
_TOUCHED_BY_A_ROTATION = 256 << 20


def make_ids(kind: str, rows: int, n: int, count: int) -> list[Tensor]:
    """Return the ids of ``count`` steps."""
    generator = torch.Generator().manual_seed(rows + n)
    return [harness.make_ids(kind, rows, n, generator) for _ in range(count)]


def gradients(ids: list[Tensor], rows: int, dim: int) -> list[Tensor]:
    """Return a sparse gradient for each step."""
    generator = torch.Generator().manual_seed(1)
    return [
        torch.sparse_coo_tensor(
            i[None],
            torch.randn(len(i), dim, generator=generator),
            (rows, dim),
            check_invariants=False,
        )
        for i in ids
    ]


def schedule(optimizer: torch.optim.Optimizer, step: int) -> None:
    """Change the learning rate at every step."""
    optimizer.param_groups[0]["lr"] = 1e-4 * (1 + 0.5 * math.sin(step / 100))


def steps(name: str, cls: type, kind: str, rows: int, dim: int, n: int, report: Report) -> Cell:
    """Time steps in each mode, on tables of their own with the same ids."""
    rotations = max(8, math.ceil(_TOUCHED_BY_A_ROTATION / (4 * n * dim)))
    grads = gradients(make_ids(kind, rows, n, rotations), rows, dim)
    contenders = []
    for mode in MODES if cls is not AdamW else MODES[:2]:
        p = Parameter(harness.fill_random_(torch.empty(rows, dim), 0.1))
        optimizer = cls([p], lr=1e-4, weight_decay=0.1, lazy=mode)
        taken = [0]

        def prepare(i: int, p: Parameter = p, o=optimizer, taken: list[int] = taken) -> None:
            p.grad = grads[i]
            taken[0] += 1
            schedule(o, taken[0])

        contenders.append(Contender(mode, lambda _, o=optimizer: o.step(), prepare))
    race = harness.alternate(
        contenders, len(grads), budget=0.5 if report.args.quick else 8.0, min_rounds=9
    )
    return report.add(name, race, MODES[0])


def tracking(name: str, rows: int, dim: int, n: int, report: Report) -> Cell:
    """Time the forward pass of an embedding, tracked and not; each is followed by a step."""
    batches = make_ids("zipf 1.05", rows, n, 16)
    grads = gradients(batches, rows, dim)
    contenders = []
    for mode in ("not tracked", "decay", "exact"):
        embedding = nn.Embedding(1, 1, sparse=True)
        embedding.weight = Parameter(harness.fill_random_(torch.empty(rows, dim), 0.1))
        lazy = "frozen" if mode == "not tracked" else mode
        optimizer = Tiger(embedding.parameters(), lr=1e-4, weight_decay=0.1, lazy=lazy)
        if lazy != "frozen":
            optimizer.track(embedding)

        def train(i: int, e: nn.Embedding = embedding, o=optimizer) -> None:
            # The step before: of another batch.
            e.weight.grad = grads[i - 1]
            o.step()

        contenders.append(Contender(mode, lambda i, e=embedding: e(batches[i]), train))
    race = harness.alternate(
        contenders, len(batches), budget=0.5 if report.args.quick else 8.0, min_rounds=9
    )
    return report.add(name, race, "not tracked")


def verify() -> None:
    """Check every mode against the reference."""
    ids = make_ids("uniform", 500, 40, 6)
    for cls, modes in ((Tiger, MODES), (Lion, MODES), (AdamW, MODES[:2])):
        for mode in modes:
            harness.check_against_reference(
                lambda params, cls=cls, mode=mode, **extra: cls(params, lazy=mode, **extra),
                (500, 24),
                gradients(ids, 500, 24),
            )


def main() -> None:
    args = harness.parse_arguments(__doc__)
    report = Report("bench_lazy", "The cost of the lazy modes, on the CPU", args)
    verify()
    rows = 10**5 if args.quick else 10**6
    found: dict[str, Cell] = {}
    for cls, kind, dim in (
        (Tiger, "uniform", 64),
        (Tiger, "uniform", 128),
        (Tiger, "uniform", 256),
        (Tiger, "zipf 1.05", 64),
        (Tiger, "uniform", 16),
        (Lion, "uniform", 64),
        (AdamW, "uniform", 64),
    ):
        size = rows if dim < 256 else rows // 4
        key = f"{cls.__name__}, {kind}, D = {dim}"
        found[key] = steps(
            f"{cls.__name__}, {size:,} x {dim}, n 65,536, {kind}, lr scheduled",
            cls,
            kind,
            size,
            dim,
            65536,
            report,
        )
    forward = tracking(f"forward of {rows:,} x 64, 65,536 ids, zipf", rows, 64, 65536, report)

    def cost(cell: Cell, option: str, plain: str) -> float:
        ratio = cell.race.ratio(option, plain)
        return ratio.median if ratio else math.nan

    bars = []
    for key, cell in found.items():
        for mode in cell.race.timings:
            if mode == "frozen":
                continue
            bar = (1.25, 1.1) if "D = 16" not in key else (None, None)
            bars.append(
                Bar(
                    f'time of "{mode}" over "frozen", {key}',
                    cost(cell, mode, "frozen"),
                    *bar,
                    at_most=True,
                )
            )
    for mode in ("decay", "exact"):
        bars.append(
            Bar(
                f'time of the tracked forward pass over the plain one, "{mode}"',
                cost(forward, mode, "not tracked"),
                1.5,
                at_most=True,
            )
        )
    report.finish(bars)


if __name__ == "__main__":
    main()
