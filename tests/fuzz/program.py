# SPDX-License-Identifier: Apache-2.0
"""Programs as plain data, and the text of their parts.

A program names an optimizer class, its groups and a list of operations. Parameters are called a, b,
c, ... and groups by their number; an operation on what does not exist does nothing, so that any
part of a program can be taken away.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

_SHARED = dict(
    lazy="frozen",
    rows=None,
    nonfinite="propagate",
    shrink_ratio=0.99,
    momentum_dtype=None,
    stochastic_rounding=False,
    maximize=False,
    capturable=False,
)
_SIGN = dict(scale=None, rms_floor=1e-3, direction="sign", direction_scale=None, **_SHARED)
DEFAULTS: dict[str, dict[str, Any]] = {
    "tiger": dict(lr=1e-3, betas=(0.965,), weight_decay=0.01, accumulation_steps=1, **_SIGN),
    "lion": dict(lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0, **_SIGN),
    "adamw": dict(
        lr=1e-3,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.0,
        second_moment="element",
        **_SHARED,
    ),
}


@dataclass(frozen=True)
class Code:
    """A value that is written as this text."""

    text: str

    def __repr__(self) -> str:
        return self.text


@dataclass
class Param:
    """A parameter: what ``parameter`` of prelude.py takes."""

    name: str
    shape: tuple[int, ...]
    seed: int
    dtype: str = "f32"
    layout: str = "contiguous"


@dataclass
class GroupSpec:
    params: list[Param]
    options: dict[str, Any] = field(default_factory=dict)

    def text(self, fused: bool | None, bare: bool = False) -> str:
        """Return the group as it is written; ``bare``: without what state dicts know."""
        names = "[" + ", ".join(p.name for p in self.params) + "]"
        kept = {k: v for k, v in self.options.items() if not bare or k == "algorithm"}
        options = "".join(f", {k}={v!r}" for k, v in kept.items())
        # A group of another algorithm than the optimizer's does not take the optimizer's `fused`.
        options += "" if fused is None else f", fused={fused}"
        return f"dict(params={names}{options})"


@dataclass
class Grad:
    """A gradient: the function of prelude.py that makes it, and its arguments."""

    kind: str  # "dense" or "sparse"
    options: dict[str, Any]

    def text(self, name: str, **more: Any) -> str:
        options = {**self.options, **more}
        return f"{self.kind}({name}, {', '.join(f'{k}={v!r}' for k, v in options.items())})"


@dataclass
class Op:
    """An operation: see ``operations.Run``, which has a method for each kind."""

    kind: str
    options: dict[str, Any] = field(default_factory=dict)
    grads: dict[str, Grad] = field(default_factory=dict)


@dataclass
class Program:
    cls: str
    groups: list[GroupSpec]
    ops: list[Op]
    fused: bool | None = None


def complete(spec: GroupSpec, cls: str) -> dict[str, Any]:
    """Return a group's options with the defaults of its algorithm, as numbers."""
    algorithm = spec.options.get("algorithm", cls.lower())
    options = {"algorithm": algorithm, **DEFAULTS[algorithm], **spec.options}
    return {k: value_of(v) for k, v in options.items()}


def value_of(value: Any) -> Any:
    """Return what a written value is."""
    import torch

    if isinstance(value, Code):
        value = eval(value.text, {"torch": torch})
        return float(value) if isinstance(value, torch.Tensor) else value
    return value
