# SPDX-License-Identifier: Apache-2.0
"""The dense optimizer step on the CPU: tiger_ext against fused torch and the Lion packages.

One tensor of 32M elements, float32 and bfloat16, and the shapes of GPT-2. All contenders update
the same parameters in turn; each has state of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import harness
import torch
from harness import Bar, Cell, Contender, Report
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

import tiger_ext

Params = Sequence[Parameter]
_LR, _DECAY = 1e-4, 0.01
_LION_BETAS = (0.9, 0.99)  # the packages' defaults differ
# DeepSpeed's kernel brings an OpenMP runtime of its own.
_RESTS = {"DeepSpeedCPULion": 0.002}


@dataclass(frozen=True)
class DenseCell:
    """A list of tensors, all with strided gradients."""

    name: str
    shapes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype = torch.float32

    @property
    def elements(self) -> int:
        """Return how many elements the tensors have together."""
        return sum(map(math.prod, self.shapes))

    def floor_bytes(self, state_tensors: int) -> int:
        """Return ``N·(size(g) + 2·size(θ) + 2·size(state))``: 20 B a float32 element for Tiger."""
        return self.elements * (3 + 2 * state_tensors) * self.dtype.itemsize


# ----------------------------------------------------------------------------------- contenders


def _lion_pytorch(params: Params) -> Optimizer:
    from lion_pytorch import Lion

    return Lion(params, lr=_LR, betas=_LION_BETAS, weight_decay=_DECAY)


def _pytorch_optimizer_tiger(params: Params) -> Optimizer:
    from pytorch_optimizer import Tiger

    return Tiger(params, lr=_LR, weight_decay=_DECAY)


def _pytorch_optimizer_lion(params: Params) -> Optimizer:
    from pytorch_optimizer import Lion

    return Lion(params, lr=_LR, betas=_LION_BETAS, weight_decay=_DECAY)


def _optimi_lion(params: Params) -> Optimizer:
    from optimi import Lion

    return Lion(params, lr=_LR, betas=_LION_BETAS, weight_decay=_DECAY)


def _deepspeed_lion(params: Params) -> Optimizer:
    from deepspeed.ops.lion import DeepSpeedCPULion  # compiles its kernel when first used

    # State in the parameters' dtype, like everybody else's.
    return DeepSpeedCPULion(
        params, lr=_LR, betas=_LION_BETAS, weight_decay=_DECAY, fp32_optimizer_states=False
    )


OPTIMIZERS: dict[str, Callable[[Params], Optimizer]] = {
    "Tiger": lambda p: tiger_ext.Tiger(p, lr=_LR, weight_decay=_DECAY),
    "torch fused AdamW": lambda p: torch.optim.AdamW(p, lr=_LR, weight_decay=_DECAY, fused=True),
    "Lion": lambda p: tiger_ext.Lion(p, lr=_LR, betas=_LION_BETAS, weight_decay=_DECAY),
    "torch fused SGD": lambda p: torch.optim.SGD(p, lr=_LR, momentum=0.9, fused=True),
    "AdamW": lambda p: tiger_ext.AdamW(p, lr=_LR, weight_decay=_DECAY),
    "DeepSpeedCPULion": _deepspeed_lion,
    "lion-pytorch": _lion_pytorch,
    "pytorch-optimizer Tiger": _pytorch_optimizer_tiger,
    "pytorch-optimizer Lion": _pytorch_optimizer_lion,
    "optimi Lion": _optimi_lion,
}


def make_contenders(params: Params, gradients: Sequence[Sequence[Tensor]]) -> list[Contender]:
    """Return one contender for each optimizer that creates its state when it first runs.

    What cannot be imported or built raises in its warm-up, and is left out with that message.
    """

    def contender(name: str, make: Callable[[Params], Optimizer]) -> Contender:
        optimizer: Optimizer | None = None

        def prepare(rotation: int) -> None:
            nonlocal optimizer
            if optimizer is None:
                optimizer = make(params)
            for p, gradient in zip(params, gradients[rotation], strict=True):
                p.grad = gradient

        return Contender(name, lambda _: optimizer.step(), prepare, _RESTS.get(name, 0.0))

    return [contender(name, make) for name, make in OPTIMIZERS.items()]


def measure(cell: DenseCell, report: Report, *, rotations: int = 2, budget: float = 5.0) -> Cell:
    """Time all optimizers on a cell, in turn."""
    params = [
        Parameter(harness.fill_random_(torch.empty(s, dtype=cell.dtype), 0.1)) for s in cell.shapes
    ]
    generator = torch.Generator().manual_seed(1)
    gradients = [
        [torch.randn(p.shape, generator=generator).mul_(0.01).to(p.dtype) for p in params]
        for _ in range(rotations)
    ]
    race = harness.alternate(
        make_contenders(params, gradients),
        rotations,
        budget=0.5 if report.args.quick else budget,
    )
    shares = {
        f"floor share {name}": report.floor_share(cell.floor_bytes(states), race.timings[name])
        for name, states in (("Tiger", 1), ("AdamW", 2))
        if cell.elements * cell.dtype.itemsize >= 32 << 20  # smaller ones live in the cache
    }
    return report.add(cell.name, race, "Tiger", **shares)


# --------------------------------------------------------------------------------- verification


def _after_three_steps(make: Callable[[Params], Optimizer]) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    p = Parameter(torch.randn(1000, generator=generator))
    optimizer = make([p])
    for _ in range(3):
        p.grad = torch.randn(1000, generator=generator)
        optimizer.step()
    return p.detach()


def verify(report: Report) -> None:
    """Check ours against their reference, and against the peers with the same mathematics."""
    gradients = [torch.randn(100, 30) for _ in range(3)]
    for optimizer in (tiger_ext.Tiger, tiger_ext.Lion, tiger_ext.AdamW):
        harness.check_against_reference(optimizer, (100, 30), gradients)
    pairs = {
        "torch fused AdamW": "AdamW",
        "lion-pytorch": "Lion",
        "pytorch-optimizer Tiger": "Tiger",
        "pytorch-optimizer Lion": "Lion",
        "optimi Lion": "Lion",
        "DeepSpeedCPULion": "Lion",
    }
    for peer, ours in pairs.items():
        try:
            theirs = _after_three_steps(OPTIMIZERS[peer])
        except Exception as error:
            report.note(f"{peer} does not run: {harness.one_line(error)}")
            continue
        try:
            expected = _after_three_steps(OPTIMIZERS[ours])
            harness.check_close(f"{ours} against {peer}", expected, theirs, rtol=1e-5, atol=1e-6)
        except AssertionError as error:
            report.note(f"{error} (timed all the same)")


# ----------------------------------------------------------------------------------------- main


def gpt2_shapes(
    layers: int = 12, width: int = 768, words: int = 50257
) -> tuple[tuple[int, ...], ...]:
    """Return the parameter shapes of GPT-2, 124M elements by default."""
    layer = [
        *(4 * [(width,)]),
        (width, 3 * width), (3 * width,), (width, width), (width,),
        (width, 4 * width), (4 * width,), (4 * width, width), (width,),
    ]  # fmt: skip
    return ((words, width), (1024, width), *(layers * layer), (width,), (width,))


def cells(quick: bool) -> list[DenseCell]:
    size = (1 << 22,) if quick else (1 << 25,)
    gpt2 = gpt2_shapes(2, 256, 5000) if quick else gpt2_shapes()
    return [
        DenseCell(f"{size[0] >> 20}M float32", (size,)),
        DenseCell(f"{size[0] >> 20}M bfloat16", (size,), torch.bfloat16),
        DenseCell(f"GPT-2{' (small)' if quick else ''}, {len(gpt2)} tensors, float32", gpt2),
    ]


def bars(cell: Cell) -> list[Bar]:
    def times(peer: str, ours: str = "Tiger") -> float:
        ratio = cell.race.ratio(peer, ours)
        return ratio.median if ratio else math.nan

    # Goals: the ratios of the bytes that the two must move.
    return [
        Bar("Tiger vs torch fused AdamW", times("torch fused AdamW"), 1.35, 28 / 20),
        Bar("Tiger vs lion-pytorch", times("lion-pytorch"), 3.5, 76 / 20),
        Bar("Tiger vs DeepSpeedCPULion", times("DeepSpeedCPULion"), 0.95, 1),
        Bar("Lion vs torch fused AdamW", times("torch fused AdamW", "Lion")),
        Bar("Lion vs lion-pytorch", times("lion-pytorch", "Lion")),
        Bar("Lion vs DeepSpeedCPULion", times("DeepSpeedCPULion", "Lion")),
        Bar("AdamW vs torch fused AdamW", times("torch fused AdamW", "AdamW")),
        Bar("Tiger vs torch fused SGD with momentum", times("torch fused SGD")),
        Bar("Tiger vs pytorch-optimizer Tiger", times("pytorch-optimizer Tiger")),
        Bar("Tiger vs optimi Lion", times("optimi Lion")),
        *(Bar(name, value) for name, value in cell.figures.items()),
    ]


def main() -> None:
    args = harness.parse_arguments(__doc__)
    report = Report("bench_dense", "Dense optimizer step on the CPU", args)
    verify(report)
    for cell in harness.progress(cells(args.quick), "dense"):
        measure(cell, report)
    report.finish(bars(report.cells[0]))


if __name__ == "__main__":
    main()
