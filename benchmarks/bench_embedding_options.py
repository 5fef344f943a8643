# SPDX-License-Identifier: Apache-2.0
"""What the options cost, CPU: touched rows of strided gradients, relative rates, verdicts.

Each option against the same step without it, on the same gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import harness
import torch
from harness import Bar, Cell, Contender, Report
from torch import Tensor
from torch.nn import Parameter

from tiger_ext import Tiger

PLAIN = "plain"
_TOUCHED_BY_A_ROTATION = 256 << 20


def strided(rows: int, dim: int, share: float) -> Tensor:
    """Return a dense gradient that touches a share of the rows."""
    generator = torch.Generator().manual_seed(rows + dim)
    grad = torch.zeros(rows, dim)
    touched = torch.randperm(rows, generator=generator)[: int(share * rows)]
    grad[touched] = torch.randn(len(touched), dim, generator=generator)
    return grad


def sparse(rows: int, dim: int, n: int, seed: int) -> Tensor:
    """Return a sparse gradient of uniform ids."""
    generator = torch.Generator().manual_seed(seed)
    ids = harness.make_ids("uniform", rows, n, generator)
    return torch.sparse_coo_tensor(
        ids[None],
        torch.randn(n, dim, generator=generator),
        (rows, dim),
        check_invariants=False,
    )


def measure(
    name: str,
    ours: str,
    options: dict[str, dict[str, Any]],
    shape: tuple[int, ...],
    make_grads: Callable[[], list[Tensor]],
    report: Report,
) -> Cell:
    """Time steps with each set of options on a table of their own."""
    grads = make_grads()
    contenders = []
    for label, extra in options.items():
        p = Parameter(harness.fill_random_(torch.empty(shape), 0.1))
        optimizer = Tiger([p], lr=1e-4, weight_decay=0.1, **extra)

        def set_grad(i: int, p: Parameter = p) -> None:
            p.grad = grads[i]

        contenders.append(Contender(label, lambda _, o=optimizer: o.step(), set_grad))
    race = harness.alternate(
        contenders, len(grads), budget=0.5 if report.args.quick else 5.0, min_rounds=9
    )
    return report.add(name, race, ours)


def verify() -> None:
    """Check the native step of every option against the reference."""
    cases: list[tuple[dict[str, Any], Tensor]] = [
        (dict(rows="nonzero"), strided(500, 24, 0.1)),
        (dict(scale="rms"), sparse(500, 24, 300, 0)),
        (dict(scale="rms"), strided(500, 24, 1.0)),
        (dict(nonfinite="skip"), sparse(500, 24, 300, 0)),
        *((dict(direction=d), strided(500, 24, 1.0)) for d in ("clip", "power", "atan")),
    ]
    for options, grad in cases:
        harness.check_against_reference(
            lambda params, options=options, **extra: Tiger(params, **options, **extra),
            (500, 24),
            [grad, grad],
        )


def main() -> None:
    args = harness.parse_arguments(__doc__)
    report = Report("bench_embedding_options", "The cost of options, on the CPU", args)
    verify()
    rows = 10**5 if args.quick else 10**6
    found: dict[str, Cell] = {}
    for dim in (16, 64, 256):
        size = (rows if dim < 256 else rows // 4, dim)
        found[f"nonzero {dim}"] = measure(
            f'rows="nonzero", 1 % of {size[0]:,} x {dim}',
            'rows="nonzero"',
            {PLAIN: {}, 'rows="nonzero"': dict(rows="nonzero")},
            size,
            lambda size=size: [strided(*size, 0.01)],
            report,
        )
    for dim in (64, 128, 256, 1024):
        n = 65536 if dim < 1024 else 16384
        size = (rows if dim < 256 else rows // 8, dim)
        rotations = max(2, math.ceil(_TOUCHED_BY_A_ROTATION / (4 * n * dim)))
        found[f"rms {dim}"] = measure(
            f'scale="rms", {size[0]:,} x {dim}, n {n:,}, uniform',
            'scale="rms"',
            {PLAIN: {}, 'scale="rms"': dict(scale="rms"), "skip": dict(nonfinite="skip")},
            size,
            lambda size=size, n=n, rotations=rotations: [
                sparse(*size, n, seed) for seed in range(rotations)
            ],
            report,
        )
    elements = 2**22 if args.quick else 2**24
    found["dense"] = measure(
        f"dense, {elements:,} elements",
        PLAIN,
        {
            PLAIN: {},
            'scale="rms"': dict(scale="rms"),
            'nonfinite="skip"': dict(nonfinite="skip"),
            "accumulation_steps=4": dict(accumulation_steps=4),
            **{f'direction="{d}"': dict(direction=d) for d in ("clip", "power", "atan")},
        },
        (elements,),
        lambda: [strided(elements, 1, 1.0).flatten()],
        report,
    )

    def faster(key: str) -> float:
        ratio = found[key].race.ratio(PLAIN, found[key].ours)
        return ratio.median if ratio else math.nan

    def cost(key: str, option: str) -> float:
        ratio = found[key].race.ratio(option, PLAIN)
        return ratio.median if ratio else math.nan

    report.finish(
        [
            Bar('rows="nonzero" vs dense update, 1 % of 1e6 x 64', faster("nonzero 64"), 2, 3),
            Bar("the same, x 16", faster("nonzero 16")),
            Bar("the same, 2.5e5 x 256", faster("nonzero 256")),
            *(
                Bar(
                    f"time with per-row RMS over without, D = {dim}",
                    cost(f"rms {dim}", 'scale="rms"'),
                    1.15,
                    at_most=True,
                )
                for dim in (64, 128, 256, 1024)
            ),
            Bar("time with nonfinite=skip, rows, D = 64", cost("rms 64", "skip"), at_most=True),
            *(
                Bar(f"time with {option}, dense", cost("dense", option), at_most=True)
                for option in found["dense"].race.timings
                if option != PLAIN
            ),
        ]
    )


if __name__ == "__main__":
    main()
