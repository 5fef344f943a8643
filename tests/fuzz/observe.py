# SPDX-License-Identifier: Apache-2.0
"""What an optimizer holds, in a form that can be compared bit by bit."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor


class Failure(Exception):
    """The product did something else than the model.

    Attributes:
        kind: which, without numbers and names; shrinking keeps it.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def plain_bits(t: Tensor) -> Any:
    t = t.detach()
    if t.layout != torch.strided or t.is_meta:
        return repr(t)
    flat = t.clone(memory_format=torch.contiguous_format).reshape(-1)
    raw = flat.view(torch.uint8).numpy().tobytes()
    return (str(t.dtype), tuple(t.shape), raw)


def clocks_of(optimizer: Any) -> list[Any]:
    """Return the clock of each group as the optimizer would find it; changes nothing.

    Looking for a clock matches groups and may drop state, hence the copies.
    """
    own, groups = optimizer._clocks, optimizer.param_groups
    tables = ("params", "begins", "frozen", "clocked", "versions", "warned")
    known = [p for clock in own._clocks for table in tables for p in getattr(clock, table)]
    memo = {id(thing): thing for thing in [*known, *own._groups, *groups]}
    clocks = copy.deepcopy(own, memo).of(groups, {p: dict(s) for p, s in optimizer.state.items()})
    for clock in clocks:
        clock.look_for_cleared(optimizer.state)
    return clocks


def snapshot(optimizer: Any) -> dict[str, Any]:
    """Return all that a failed step or a copy must leave as it is, bit by bit; changes nothing."""
    found: dict[str, Any] = {}
    clocks = clocks_of(optimizer)
    for i, group in enumerate(optimizer.param_groups):
        for key, value in group.items():
            if key not in ("params", "param_names", "history", "micro_steps", "windows"):
                found[f"group {i} {key}"] = repr(value)
        for j, p in enumerate(group["params"]):
            found[f"parameter {i}.{j}"] = plain_bits(p)
            for name, value in optimizer.state.get(p, {}).items():
                bits = plain_bits(value) if isinstance(value, Tensor) else repr(value)
                found[f"parameter {i}.{j} {name}"] = bits
        clock = clocks[i]
        for key, number in clock.numbers().items():
            found[f"group {i} {key}"] = number
        for j, p in enumerate(group["params"]):
            for key, number in clock.numbers_of(p).items():
                found[f"parameter {i}.{j} {key}"] = number
    # What a first look at a group, and loading, may create.
    nothing = ("", "0.0 0.0", 0, ("torch.int64", (0, 0), b""))
    return {k: v for k, v in found.items() if v not in nothing}


def plain_grad(g: Tensor | None) -> Any:
    if g is None:
        return None
    if g.layout == torch.sparse_coo:
        return (plain_bits(g._indices()), plain_bits(g._values()))
    return plain_bits(g)


def clock_shape(found: dict[str, Any], i: int, j: int) -> Any:
    clock = found.get(f"parameter {i}.{j} last_step")
    return None if clock is None else clock[1]


def elements(g: Tensor) -> Tensor:
    return g._values() if g.layout == torch.sparse_coo else g


def summed(g: Tensor) -> Tensor:
    g = g.detach().to(torch.float64, copy=True)
    return g.to_dense() if g.layout == torch.sparse_coo else g


def short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 200 else text[:200] + "..."
