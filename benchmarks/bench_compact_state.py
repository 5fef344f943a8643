# SPDX-License-Identifier: Apache-2.0
"""What state and parameters in few bytes cost, CPU: half precision, int8 momentum, moments of rows.

Each option against the same rule in float32 on the same ids, beyond the caches; and the memory that
the state takes in the process once all of it is written.
"""

from __future__ import annotations

import math
from typing import Any

import harness
import torch
from harness import Bar, Cell, Contender, Report
from torch import Tensor
from torch.nn import Parameter

from tiger_ext import AdamW, Tiger

_ROTATIONS = 8

# name -> (class, parameter's dtype, options)
TIGERS: dict[str, tuple[type, torch.dtype, dict[str, Any]]] = {
    "float32": (Tiger, torch.float32, {}),
    "float32, momentum bfloat16": (Tiger, torch.float32, {"momentum_dtype": torch.bfloat16}),
    "float32, momentum int8": (Tiger, torch.float32, {"momentum_dtype": torch.int8}),
    "bfloat16": (Tiger, torch.bfloat16, {}),
    "bfloat16, stochastic": (Tiger, torch.bfloat16, {"stochastic_rounding": True}),
    "bfloat16, momentum int8, stochastic": (
        Tiger,
        torch.bfloat16,
        {"momentum_dtype": torch.int8, "stochastic_rounding": True},
    ),
    "float16": (Tiger, torch.float16, {}),
}
ADAMWS: dict[str, tuple[type, torch.dtype, dict[str, Any]]] = {
    "AdamW": (AdamW, torch.float32, {}),
    "AdamW, moment a row": (AdamW, torch.float32, {"second_moment": "row"}),
    "RMSprop": (AdamW, torch.float32, {"betas": (0.0, 0.99)}),
    "RMSprop, moment a row": (
        AdamW,
        torch.float32,
        {"betas": (0.0, 0.99), "second_moment": "row"},
    ),
}


def sparse(rows: int, dim: int, n: int, dtype: torch.dtype) -> list[Tensor]:
    """Return gradients of uniform rows."""
    generator = torch.Generator().manual_seed(rows + n)
    grads = []
    for _ in range(_ROTATIONS):
        ids = harness.make_ids("uniform", rows, n, generator)
        values = torch.randn(n, dim, generator=generator).to(dtype)
        grads.append(
            torch.sparse_coo_tensor(ids[None], values, (rows, dim), check_invariants=False)
        )
    return grads


def race(
    name: str, sides: dict[str, Any], shape: tuple[int, ...], n: int, base: str, report: Report
) -> Cell:
    """Time a step of each side, on tensors of its own; without ``n`` the gradients are dense."""
    contenders = []
    for side, (cls, dtype, options) in sides.items():
        p = Parameter(harness.fill_random_(torch.empty(shape), 0.1).to(dtype))
        optimizer = cls([p], lr=1e-4, weight_decay=0.1, **options)
        grads = sparse(*shape, n, dtype) if n else [torch.randn(shape).to(dtype)]

        def prepare(i: int, p: Parameter = p, grads: list[Tensor] = grads) -> None:
            p.grad = grads[i % len(grads)]

        contenders.append(Contender(side, lambda _, o=optimizer: o.step(), prepare))
    result = harness.alternate(
        contenders, _ROTATIONS, budget=0.5 if report.args.quick else 10.0, min_rounds=9
    )
    return report.add(name, result, base)


def state_bytes(cls: type, rows: int, dim: int, **options: Any) -> float:
    """Return the bytes that the written state of a float32 table takes, for each row."""
    p = Parameter(torch.zeros(rows, dim))
    optimizer = cls([p], lr=1e-4, **options)
    before = harness.resident()["anonymous"]
    optimizer.init_state()
    for value in optimizer.state[p].values():
        value.fill_(1)
    return (harness.resident()["anonymous"] - before) / rows


def verify() -> None:
    """Check every option against the reference, or its own numbers where they are random."""
    for cls, dtype, options in (*TIGERS.values(), *ADAMWS.values()):
        if dtype != torch.float32 or "momentum_dtype" in options or "betas" in options:
            continue
        harness.check_against_reference(
            lambda params, cls=cls, options=options, **extra: cls(params, **options, **extra),
            (500, 24),
            sparse(500, 24, 40, dtype),
        )
    for cls, dtype, options in (*TIGERS.values(), *ADAMWS.values()):
        outcomes = []
        for fused in (True, False):
            torch.manual_seed(0)
            p = Parameter(torch.randn(500, 24).to(dtype))
            optimizer = cls([p], lr=1e-2, fused=fused, **options)
            for p.grad in sparse(500, 24, 40, dtype):
                optimizer.step()
            outcomes.append(p.detach().float())
        torch.testing.assert_close(*outcomes, atol=0.02, rtol=0.02)


def main() -> None:
    args = harness.parse_arguments(__doc__)
    report = Report("bench_compact_state", "Parameters and state in few bytes, on the CPU", args)
    verify()
    rows = 10**5 if args.quick else 2 * 10**6
    cells = {}
    for dim in (64, 128):
        size = rows * 64 // dim
        key = f"D = {dim}"
        cells[key] = race(
            f"Tiger, {size:,} x {dim}, n 65,536, uniform",
            TIGERS,
            (size, dim),
            65536,
            "float32",
            report,
        )
    million = 2**20 if args.quick else 2**25
    cells["dense"] = race(
        f"Tiger, dense, {million >> 20}M", TIGERS, (million,), 0, "float32", report
    )
    cells["rows"] = race(
        f"AdamW, {rows:,} x 64, n 65,536, uniform", ADAMWS, (rows, 64), 65536, "AdamW", report
    )

    def over(cell: str, side: str, base: str) -> float:
        ratio = cells[cell].race.ratio(side, base)
        return ratio.median if ratio else math.nan

    bars = []
    for dim in (64, 128):
        key = f"D = {dim}"
        int8 = "float32, momentum int8"
        bars += [
            Bar(f"time, int8 over float32 momentum, {key}", over(key, int8, "float32"), 1.0, 0.8,
                at_most=True),
            Bar(f"time, bfloat16 over float32, {key}", over(key, "bfloat16", "float32"), 0.65, 0.5,
                at_most=True),
        ]  # fmt: skip
    dense = over("dense", "bfloat16", "float32")
    bars.append(Bar("time, bfloat16 over float32, dense", dense, 0.6, 0.5, at_most=True))
    by_row = over("rows", "AdamW, moment a row", "AdamW")
    bars.append(Bar("time, second moment a row over one an element", by_row, 1.0, at_most=True))
    table = 4 * rows // 8, 64
    full = state_bytes(Tiger, *table)
    int8_bytes = state_bytes(Tiger, *table, momentum_dtype=torch.int8) / full
    bars.append(Bar("bytes, int8 over float32 momentum, D = 64", int8_bytes, 0.28, at_most=True))
    moment = state_bytes(AdamW, *table, betas=(0.0, 0.99), second_moment="row")
    bars.append(Bar("bytes a row of RMSprop with a moment a row", moment, 4.1, at_most=True))
    report.finish(bars)


if __name__ == "__main__":
    main()
