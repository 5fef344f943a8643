# SPDX-License-Identifier: Apache-2.0
"""The dense optimizer step on a GPU: tiger_ext against torch's fused and foreach optimizers.

One tensor of 1e9 and of 1e8 elements, float32 and bfloat16. All contenders update the same
parameter in turn, and share their momenta, so that the largest size fits them all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial

import gpu_harness
import harness
import torch
from bench_dense import DenseCell
from gpu_harness import GpuReport, Method, ours, torchs
from harness import Bar, Cell
from torch.nn import Parameter
from torch.optim import SGD, Optimizer

from tiger_ext import AdamW, Lion, Tiger

_DECAY = 0.01
_LION = dict(betas=(0.9, 0.99), weight_decay=_DECAY)
_ROTATIONS = 2
# Of a float32 element: parameter, two gradients, two momenta, and room for a peer's temporaries.
_ROOM = 44


def _lion_pytorch(*args, **options) -> Optimizer:
    from lion_pytorch import Lion

    return Lion(*args, **options)


def _bitsandbytes_lion(*args, **options) -> Optimizer:
    from bitsandbytes.optim import Lion

    return Lion(*args, **options)


def _deepspeed_lion(*args, **options) -> Optimizer:
    from deepspeed.ops.lion import FusedLion

    return FusedLion(*args, **options)


METHODS: dict[str, Method] = {
    "Tiger": ours(Tiger, weight_decay=_DECAY),
    "torch fused AdamW": torchs(torch.optim.AdamW, way={"fused": True}, weight_decay=_DECAY),
    "torch foreach AdamW": torchs(torch.optim.AdamW, way={"foreach": True}, weight_decay=_DECAY),
    "torch fused SGD": torchs(SGD, way={"fused": True}, momentum=0.9),
    "Lion": ours(Lion, **_LION),
    "AdamW": ours(AdamW, weight_decay=_DECAY),
    **{
        name: Method(partial(make, **_LION), partial(Lion, fused=False, **_LION))
        for name, make in (
            ("lion-pytorch", _lion_pytorch),
            ("bitsandbytes Lion", _bitsandbytes_lion),
            ("DeepSpeed FusedLion", _deepspeed_lion),
        )
    },
}
WIDE_MOMENTUM = "Tiger, float32 momentum"
NARROW_METHODS = {
    WIDE_MOMENTUM: ours(Tiger, weight_decay=_DECAY, momentum_dtype=torch.float32),
    **{name: METHODS[name] for name in ("Tiger", "AdamW", "torch fused AdamW", "torch fused SGD")},
}


def measure(
    cell: DenseCell, methods: Mapping[str, Method], report: GpuReport, budget: float
) -> Cell:
    """Time all optimizers on a cell, in turn."""
    where = dict(dtype=cell.dtype, device=gpu_harness.DEVICE)
    params = [Parameter(torch.empty(s, **where).normal_(0, 0.1)) for s in cell.shapes]
    gradients = [
        [torch.empty(s, **where).normal_(0, 0.01) for s in cell.shapes] for _ in range(_ROTATIONS)
    ]
    tables = gpu_harness.create_optimizers(params, methods, gradients[0], report)
    race = gpu_harness.alternate(
        tables.contenders(gradients), _ROTATIONS, budget=budget, max_rounds=60
    )
    shares = {
        f"{name} share": report.share(gpu_harness.dense_step_bytes(tables, name), race, name)
        for name in race.timings
        if "Tiger" in name or "AdamW" in name
    }
    return report.add(cell.name, race, "Tiger", **shares)


def verify(report: GpuReport) -> None:
    generator = torch.Generator().manual_seed(2)
    gradients = [torch.randn(100, 333, generator=generator) for _ in range(3)]
    gpu_harness.verify(METHODS, gradients, report)
    gpu_harness.verify(NARROW_METHODS, gradients, report, torch.bfloat16)


def cells(quick: bool) -> dict[str, DenseCell]:
    """Return the cells by the key that the bars use."""
    fitting = gpu_harness.free_bytes() // _ROOM
    large, small = (min(n, fitting) for n in ((10**7, 10**6) if quick else (10**9, 10**8)))
    return {
        "large": DenseCell(f"{large:.3g} float32", ((large,),)),
        "bfloat16": DenseCell(f"{large:.3g} bfloat16", ((large,),), torch.bfloat16),
        "small": DenseCell(f"{small:.3g} float32", ((small,),)),
    }


def bars(results: Mapping[str, Cell]) -> list[Bar]:
    def times(
        key: str, ours: str, peer: str, bar: float | None = None, goal: float | None = None
    ) -> Bar:
        ratio = results[key].race.ratio(peer, ours)
        value = ratio.median if ratio else math.nan
        return Bar(f"GPU dense {results[key].name}: {ours} vs {peer}", value, bar, goal)

    def share(key: str, name: str, bar: float | None = None, goal: float | None = None) -> Bar:
        value = results[key].figures.get(f"{name} share", math.nan)
        return Bar(f"GPU dense {results[key].name}: {name}, share of copy", value, bar, goal)

    fused = "torch fused AdamW"
    return [
        share("large", "Tiger", 0.9, 0.95),
        times("large", "Tiger", fused, 1.35, 1.4),
        times("large", "Lion", fused),
        times("large", "AdamW", fused),
        share("large", "AdamW"),
        times("large", "Tiger", "torch foreach AdamW"),
        times("large", "Tiger", "torch fused SGD"),
        share("bfloat16", "Tiger"),
        share("bfloat16", WIDE_MOMENTUM),
        times("bfloat16", "Tiger", fused),
        share("small", "Tiger"),
        times("small", "Tiger", fused),
    ]


def main() -> None:
    args = gpu_harness.parse_arguments(__doc__, 40)
    report = GpuReport("gpu_dense", "Dense optimizer step on a GPU", args)
    verify(report)
    wanted = cells(args.quick)
    results = {}
    for key, cell in harness.progress(wanted.items(), "dense", len(wanted)):
        methods = METHODS if cell.dtype == torch.float32 else NARROW_METHODS
        budget = 0.6 * gpu_harness.seconds_left(args) / (len(wanted) - len(results))
        results[key] = measure(cell, methods, report, budget)
    report.finish(bars(results))


if __name__ == "__main__":
    main()
