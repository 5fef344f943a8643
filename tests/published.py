# SPDX-License-Identifier: Apache-2.0
"""Tiger's published rule (and Lion's) for one parameter, in plain float64, a window at a time.

``window`` takes θ, the gradients of the micro-steps of one accumulation window (one gradient where
there is no accumulation), m and the options, and returns the new θ and m, together with the values
that a few roundings of the arithmetic type may make of them. The directions are monotone, so that a
rounding error of c becomes an interval of d(c), of either sign near zero.

``verified_window`` takes the steps of one window and compares every element with ``window``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from cases import set_grad
from oracle import arithmetic, same_bits
from torch import Tensor

backends = pytest.mark.parametrize("fused", [None, False], ids=["native", "reference"])
SCALES = {"sign": 1.0, "clip": 1e4, "power": 0.5, "atan": 1e4}
every_direction = pytest.mark.parametrize("direction", SCALES)
DIMS = [1, 7, 64, 256, 257, 1000]
PRECISIONS = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
}
precisions = pytest.mark.parametrize("dtype", PRECISIONS.values(), ids=PRECISIONS)


@dataclass(frozen=True)
class Options:
    """What a parameter group says about the rule."""

    lr: float
    betas: tuple[float, ...]
    weight_decay: float
    direction: str = "sign"
    direction_scale: float | None = None
    scale: str | None = None
    rms_floor: float = 1e-3
    rows: str | None = None
    nonfinite: str = "propagate"
    shrink_ratio: float = 0.99
    shrink_to: float = 0.0
    accumulation_steps: int = 1
    maximize: bool = False

    @classmethod
    def of(cls, group: Mapping[str, Any]) -> Options:
        own = {k: group[k] for k in cls.__dataclass_fields__ if k in group}
        return cls(**{**own, "lr": float(group["lr"]), "betas": tuple(group["betas"])})


@dataclass
class Outcome:
    """The new θ and m, what they may be, and which rows changed, as ``[rows, dim]`` matrices."""

    theta: Tensor
    momentum: Tensor
    low: Tensor
    high: Tensor
    momentum_error: Tensor
    moved: Tensor
    touched: Tensor


def apply_direction(c: Tensor, name: str, kappa: float | None = None) -> Tensor:
    kappa = SCALES[name] if kappa is None else kappa
    if name == "sign":
        return torch.where(c.isnan(), c, c.sign())
    if name == "clip":
        return (kappa * c).clamp(-1.0, 1.0)
    if name == "power":
        return c.sign() * c.abs() ** kappa
    return (2.0 / math.pi) * (kappa * c).atan()


def linear_rows(indices: Tensor, shape: Sequence[int]) -> Tensor:
    rows = torch.zeros_like(indices[0])
    for index, size in zip(indices, shape):
        rows = rows * size + index
    return rows


def touched_rows(
    g: Tensor, rows: int, dim: int, wide: torch.dtype, how: str | None, tracked: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Return a gradient's row ids, their sums, the sums of absolute values, most entries a row."""
    if g.layout == torch.sparse_coo:
        ids, at = linear_rows(g._indices(), g.shape).unique(return_inverse=True)
        values = g._values().to(wide).double().reshape(len(at), dim)
        sums = torch.zeros(len(ids), values.shape[1], dtype=torch.float64)
        sizes = sums.index_add(0, at, values.abs())
        sums = sums.index_add(0, at, values)
        entries = int(at.bincount().max()) if len(at) else 0
    else:
        sums = g.detach().to(wide).double().reshape(rows, dim)
        if how == "tracked":
            ids = tracked.reshape(-1).long().unique()
        elif how == "nonzero":
            ids = (sums != 0).any(1).nonzero()[:, 0]
        else:
            ids = torch.arange(rows)
        sums = sums[ids]
        sizes, entries = sums.abs(), 1
    rounded = sums.to(wide).double()  # a sum beyond the largest number is infinite
    return ids, torch.where(rounded.isfinite(), sums, rounded), sizes, entries


def rms(x: Tensor, per_row: bool) -> Tensor:
    square = x * x
    return (square.mean(1, keepdim=True) if per_row else square.mean()).sqrt()


def window(
    theta: Tensor,
    grads: Sequence[Tensor | None],
    momentum: Tensor,
    options: Options,
    *,
    tracked: Sequence[Tensor] | None = None,
    momentum_dtype: torch.dtype | None = None,
) -> Outcome:
    """Return what one window makes of a parameter.

    ``grads`` has one entry a micro-step; ``tracked`` has the ids that each of them used, where
    ``rows="tracked"``. A micro-step's non-finite gradient is judged by itself.
    """
    o, steps = options, options.accumulation_steps
    assert len(grads) == steps
    wide = arithmetic(theta.dtype)
    eps = torch.finfo(wide).eps
    stored = torch.finfo(momentum_dtype or momentum.dtype).eps if steps > 1 else 0.0
    sparse = [g for g in grads if g is not None and g.layout == torch.sparse_coo]
    dims = sparse[0].sparse_dim() if sparse else min(1, theta.dim())
    rows, dim = math.prod(theta.shape[:dims]), math.prod(theta.shape[dims:])
    by_rows = o.rows is not None and theta.dim() >= 2
    lazy = bool(sparse) or by_rows

    p = theta.detach().double().reshape(rows, dim).clone()
    m = momentum.detach().double().reshape(rows, dim).clone()
    c, size = m.clone(), m.abs()  # size: of all terms, to which the rounding errors are relative
    c_size = size.clone()
    touched = torch.zeros(rows, dtype=torch.bool)
    shrunk = touched.clone()
    most = 1
    beta1, beta2 = o.betas[0], o.betas[-1]
    wide_betas = torch.tensor([beta1, beta2], dtype=torch.float64)
    for k, g in enumerate(grads):
        if g is None:
            continue
        ids, sums, sizes, entries = touched_rows(
            g, rows, dim, wide, o.rows if by_rows else None, tracked[k] if tracked else None
        )
        most = max(most, entries)
        if o.maximize:
            sums = -sums
        bad = ~sums.isfinite().all(1)
        if not lazy and o.scale != "rms_rows":  # what is updated together is judged together
            bad = bad.any().expand(len(bad))
        if o.nonfinite == "raise" and bool(bad.any()):
            raise FloatingPointError
        if o.nonfinite in ("skip", "shrink"):
            if o.nonfinite == "shrink":
                shorter = o.shrink_to + o.shrink_ratio * (p[ids[bad]] - o.shrink_to)
                # Written at once: a narrow θ is rounded here and once more when it moves.
                narrow = theta.dtype in (torch.bfloat16, torch.float16)
                p[ids[bad]] = shorter.to(theta.dtype).double() if narrow else shorter
                shrunk[ids[bad]] = True
            ids, sums, sizes = ids[~bad], sums[~bad], sizes[~bad]
        first = ~touched[ids, None]
        keep1, keep2 = (first * beta + ~first * 1.0 for beta in wide_betas)
        c[ids] = keep1 * m[ids] + (1.0 - beta1) / steps * sums
        c_size[ids] = keep1 * size[ids] + (1.0 - beta1) / steps * sizes
        m[ids] = keep2 * m[ids] + (1.0 - beta2) / steps * sums
        size[ids] = keep2 * size[ids] + (1.0 - beta2) / steps * sizes
        touched[ids] = True

    relative = (16 + most) * eps + steps * stored

    def error(x: Tensor) -> Tensor:
        return torch.where(x > 0, relative * x + 2.0**-140, 0.0)

    low, high = p - 4 * eps * p.abs(), p + 4 * eps * p.abs()
    low[~shrunk], high[~shrunk] = p[~shrunk], p[~shrunk]
    if bool(touched.any()):
        old, near = p[touched], error(c_size[touched])
        d, d_low, d_high = (
            apply_direction(x, o.direction, o.direction_scale)
            for x in (c[touched], c[touched] - near, c[touched] + near)
        )
        rate = slow = fast = torch.tensor(o.lr, dtype=torch.float64)
        kept = 1.0 - o.lr * o.weight_decay
        if o.scale is not None:
            per_row = o.scale == "rms_rows" or lazy
            of_theta = rms(old, per_row).clamp(min=o.rms_floor)
            if o.direction == "sign":
                of_d, spread = torch.ones_like(of_theta), torch.zeros_like(of_theta)
            else:
                of_d, spread = rms(d, per_row), rms(d_high - d_low, per_row)
                spread = spread.where(of_d > 0, 0.0)
                of_d = of_d.clamp(min=2.0**-126)
            kept = 1.0 - (o.lr * of_theta * o.weight_decay).clamp(max=1.0)
            rate = o.lr * of_theta / of_d
            slow = o.lr * of_theta / (of_d + spread) * (1 - 32 * eps)
            fast = o.lr * of_theta / (of_d - spread) * (1 + 32 * eps)
            unsure = (2 * spread > of_d).expand(old.shape)
            size_of_d = old[0].numel() if per_row else old.numel()
            at_most = (o.lr * of_theta * size_of_d**0.5).expand(old.shape)
        p[touched] = kept * old - rate * d
        ends = [kept * old - r * x for r in (slow, fast) for x in (d_low, d_high)]
        slack = 8 * eps * (old.abs() + (rate * d).abs())
        lowest, highest = torch.stack(ends).amin(0), torch.stack(ends).amax(0)
        # Where RMS(d) is of rounding errors only: |d| is at most sqrt(number of elements) RMS(d).
        if o.scale is not None:
            lowest[unsure] = (kept * old - at_most)[unsure]
            highest[unsure] = (kept * old + at_most)[unsure]
        low[touched], high[touched] = lowest - slack, highest + slack
    return Outcome(p, m, low, high, error(size), touched | shrunk, touched)


# --------------------------------------------------------------------- an optimizer's whole window


def momentum_of(opt: torch.optim.Optimizer, p: Tensor) -> Tensor:
    """Return a copy of a parameter's momentum; zeros where there is none yet."""
    m = opt.state.get(p, {}).get("exp_avg")
    if m is not None:
        return m.detach().clone()
    group = next(g for g in opt.param_groups if any(q is p for q in g["params"]))
    return torch.zeros_like(p.detach(), dtype=group["momentum_dtype"] or p.dtype)


def copy_parts(g: Tensor | None) -> list[Tensor]:
    if g is None:
        return []
    return [g._indices().clone(), g._values().clone()] if g.is_sparse else [g.clone()]


def between(value: Tensor, low: Tensor, high: Tensor, what: str) -> None:
    actual = value.detach().double().reshape(low.shape)
    low, high = (x.to(value.dtype).double() for x in (low, high))
    wrong = ~((low <= actual) & (actual <= high))
    if bool(wrong.any()):
        at = tuple(int(i) for i in wrong.nonzero()[0])
        raise AssertionError(
            f"{what}: {int(wrong.sum())} of {wrong.numel()} elements are wrong, first {at}: got "
            f"{float(actual[at])!r}, expected {float(low[at])!r} to {float(high[at])!r}"
        )


def verified_window(
    opt: torch.optim.Optimizer,
    params: Sequence[Tensor],
    *micro: Sequence[Tensor | None],
    tracked: Sequence[Tensor] | None = None,
) -> list[Outcome]:
    """Take one step a list of gradients; check that together they are exactly one window."""
    group_of = {p: g for g in opt.param_groups for p in g["params"]}
    theta = [p.detach().clone() for p in params]
    momentum = [momentum_of(opt, p) for p in params]
    for grads in micro:
        copies = [copy_parts(g) for g in grads]
        for p, g in zip(params, grads, strict=True):
            set_grad(p, g)
        opt.step()
        for p, g, copy in zip(params, grads, copies):
            assert p.grad is g
            assert all(same_bits(a, b) for a, b in zip(copy_parts(g), copy, strict=True))
    outcomes = []
    for i, p in enumerate(params):
        group = group_of[p]
        after = momentum_of(opt, p)
        name = f"parameter {i} {list(p.shape)} {p.dtype}"
        o = window(
            theta[i],
            [grads[i] for grads in micro],
            momentum[i],
            Options.of(group),
            tracked=tracked,
            momentum_dtype=after.dtype,
        )
        kept = [
            ("θ", p.detach(), theta[i], ~o.moved),
            ("exp_avg", after, momentum[i], ~o.touched),
        ]
        for what, new, old, mask in kept:
            new, old = new.reshape(o.theta.shape), old.reshape(o.theta.shape)
            assert same_bits(new[mask], old[mask]), f"{name}: {what} of untouched rows changed"
        between(p, o.low, o.high, f"{name}: θ")
        error = o.momentum_error
        between(after, o.momentum - error, o.momentum + error, f"{name}: exp_avg")
        outcomes.append(o)
    return outcomes
