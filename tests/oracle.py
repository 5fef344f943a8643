# SPDX-License-Identifier: Apache-2.0
"""The rules in plain float64, written from the published equations, as intervals.

An expected value is an interval around the exact result, as wide as a few roundings of the
arithmetic type, then rounded to the storage type. Where the direction's argument may be zero within
its own rounding error, the interval of either sign is allowed; everywhere else the sign is exact.

``verified(optimizer)`` watches one step of any optimizer of the package and checks every element of
every parameter and state against these intervals, and that nothing else was written.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

PIECE = 256
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def arithmetic(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


# ----------------------------------------------------------------------------------- summed rows


def add_runs(values: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Sum values[start : start + length] left to right, for each run, in the array's own type."""
    sums = values[starts].copy()
    for k in range(1, int(lengths.max(initial=1))):
        going_on = np.flatnonzero(lengths > k)
        sums[going_on] += values[starts[going_on] + k]
    return sums


def sum_rows(rows: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (touched rows, their sums) with the summation order of the specification.

    ``rows`` is ``[nnz]``, ``values`` is ``[nnz, D]`` in the arithmetic type.
    """
    if len(rows) == 0:
        return rows, values
    order = np.argsort(rows, kind="stable")
    rows, values = rows[order], values[order]
    starts = np.flatnonzero(np.concatenate(([True], rows[1:] != rows[:-1])))
    lengths = np.diff(np.append(starts, len(rows)))
    pieces = -(-lengths // PIECE)
    first_piece = np.concatenate(([0], np.cumsum(pieces)[:-1]))
    number = np.arange(pieces.sum()) - np.repeat(first_piece, pieces)
    piece_starts = np.repeat(starts, pieces) + number * PIECE
    piece_lengths = np.minimum(np.repeat(starts + lengths, pieces) - piece_starts, PIECE)
    return rows[starts], add_runs(
        add_runs(values, piece_starts, piece_lengths), first_piece, pieces
    )


def summed_gradient(grad: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return (row ids, ``[touched, D]`` sums) of a sparse gradient, summed in ``dtype``."""
    indices, values = grad._indices(), grad._values()
    sparse_dim = indices.shape[0]
    rows = np.zeros(indices.shape[1], dtype=np.int64)
    for d in range(sparse_dim):
        rows = rows * grad.shape[d] + indices[d].numpy()
    dim = int(np.prod(grad.shape[sparse_dim:]))
    flat = values.to(dtype).reshape(len(rows), dim).numpy()
    touched, sums = sum_rows(rows, flat)
    return torch.from_numpy(touched), torch.from_numpy(sums)


# ------------------------------------------------------------------------------------- intervals


@dataclass
class Band:
    """Allowed values: the union of intervals ``[low, high]``; a NaN interval allows nothing."""

    intervals: list[tuple[Tensor, Tensor]]

    def check(self, actual: Tensor, what: str) -> None:
        value = actual.to(torch.float64)
        inside = torch.zeros(value.shape, dtype=torch.bool)
        for low, high in self.intervals:
            low, high = (x.to(actual.dtype).to(torch.float64) for x in (low, high))
            inside |= (low <= value) & (value <= high)
        if not bool(inside.all()):
            at = int((~inside).flatten().nonzero()[0])
            bounds = [(float(a.flatten()[at]), float(b.flatten()[at])) for a, b in self.intervals]
            raise AssertionError(
                f"{what}: {int((~inside).sum())} of {inside.numel()} elements are out of band, "
                f"first {at}: {float(value.flatten()[at])!r}, expected one of {bounds}"
            )


def around(center: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
    return center - error, center + error


# Roundings of one multiply-add of rounded constants, and of an AdamW quotient.
_FEW = 6.0
_MORE = 24.0


def _mix(beta: float, old: Tensor, new: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return beta old + (1 - beta) new and a bound of its error."""
    a, b = beta * old, (1.0 - beta) * new
    size = a.abs() + b.abs()
    # Results below the smallest normal number have an absolute error.
    return a + b, torch.where(size > 0, _FEW * eps * size + 8 * 2.0**-149, 0.0)


def lion(
    param: Tensor,
    grad: Tensor,
    state: dict[str, Tensor],
    *,
    eps: float,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
) -> dict[str, Band]:
    c, c_error = _mix(betas[0], state["exp_avg"], grad, eps)
    m, m_error = _mix(betas[1], state["exp_avg"], grad, eps)
    decayed = (1.0 - lr * weight_decay) * param
    error = _FEW * eps * (decayed.abs() + lr)
    intervals = []
    for sign in (-1.0, 0.0, 1.0):
        low, high = c - c_error, c + c_error
        legal = low < 0 if sign < 0 else high > 0 if sign > 0 else (low <= 0) & (high >= 0)
        center = torch.where(legal, decayed - lr * sign, torch.nan)
        intervals.append(around(center, error))
    return {"param": Band(intervals), "exp_avg": Band([around(m, m_error)])}


def tiger(param, grad, state, *, betas, **hyper) -> dict[str, Band]:
    return lion(param, grad, state, betas=(betas[0], betas[0]), **hyper)


def adamw(
    param: Tensor,
    grad: Tensor,
    state: dict[str, Tensor],
    *,
    eps: float,
    step: int,
    lr: float,
    betas: tuple[float, float],
    adam_eps: float,
    weight_decay: float,
) -> dict[str, Band]:
    beta1, beta2 = betas
    if beta1 > 0:
        m, m_error = _mix(beta1, state["exp_avg"], grad, eps)
    else:
        m, m_error = grad, _FEW * eps * grad.abs()
    v, v_error = _mix(beta2, state["exp_avg_sq"], grad * grad, eps)
    denominator = (v / (1.0 - beta2**step)).sqrt() + adam_eps
    size = lr / (1.0 - beta1**step)
    decayed = (1.0 - lr * weight_decay) * param
    change = size * m / denominator
    error = eps * (_FEW * decayed.abs() + _MORE * change.abs()) + size * m_error / denominator
    bands = {
        "param": Band([around(decayed - change, error + 8 * 2.0**-149)]),
        "exp_avg_sq": Band([around(v, v_error)]),
    }
    if beta1 > 0:
        bands["exp_avg"] = Band([around(m, m_error)])
    return bands


# ---------------------------------------------------------------------------------- a whole step


def state_dtypes(group: dict[str, Any], param: Tensor) -> dict[str, torch.dtype]:
    """Return the names and dtypes of the state that a parameter has after its first step."""
    momentum = group["momentum_dtype"] or param.dtype
    if group["algorithm"] != "adamw":
        return {"exp_avg": momentum}
    names = {"exp_avg_sq": torch.promote_types(momentum, param.dtype), "step": torch.int64}
    return {"exp_avg": momentum, **names} if group["betas"][0] > 0 else names


def expected(
    group: dict[str, Any],
    dtype: torch.dtype,
    param: Tensor,
    grad: Tensor,
    state: dict[str, Any],
    scale: float = 1.0,
) -> dict[str, Band]:
    """Return the bands of one step of a parameter of ``dtype``; all tensors are float64."""
    grad = grad * ((-1.0 if group["maximize"] else 1.0) / scale)
    hyper: dict[str, Any] = dict(
        eps=torch.finfo(arithmetic(dtype)).eps,
        lr=float(group["lr"]),
        betas=tuple(group["betas"]),
        weight_decay=group["weight_decay"],
    )
    if group["algorithm"] == "adamw":
        return adamw(param, grad, state, step=state["step"] + 1, adam_eps=group["eps"], **hyper)
    return (tiger if group["algorithm"] == "tiger" else lion)(param, grad, state, **hyper)


def bits(t: Tensor) -> Tensor:
    """Return the elements' bit patterns, so that NaNs and signed zeros compare too."""
    width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()]
    return t.detach().clone(memory_format=torch.contiguous_format).view(width)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


@dataclass
class _Before:
    group: dict[str, Any]
    param: Tensor
    value: Tensor
    grad: Tensor | None
    grad_parts: list[Tensor]
    grad_copy: list[Tensor]
    state: dict[str, Tensor]


def _parts(grad: Tensor | None) -> list[Tensor]:
    if grad is None:
        return []
    return [grad._indices(), grad._values()] if grad.layout == torch.sparse_coo else [grad]


def _remember(group: dict[str, Any], p: Tensor, state: dict[str, Any]) -> _Before:
    frozen = {k: v for k, v in group.items() if k != "params"}
    frozen["lr"] = float(group["lr"])
    parts = _parts(p.grad)
    return _Before(
        group=frozen,
        param=p,
        value=p.detach().clone(),
        grad=p.grad,
        grad_parts=parts,
        grad_copy=[t.clone() for t in parts],
        state={k: v.clone() for k, v in state.items()},
    )


def _check_parameter(before: _Before, state: dict[str, Any], label: str, scale: float) -> None:
    p, group = before.param, before.group
    assert p.grad is before.grad, f"{label}: .grad was replaced"
    if before.grad is not None and before.grad.layout == torch.sparse_coo:
        assert p.grad._nnz() == before.grad_parts[0].shape[1], f"{label}: .grad was coalesced"
    for part, copy in zip(_parts(p.grad), before.grad_copy, strict=True):
        assert same_bits(part, copy), f"{label}: .grad was changed"

    if before.grad is None:
        assert same_bits(p, before.value), f"{label}: changed without a gradient"
        assert set(state) == set(before.state), f"{label}: state created without a gradient"
        for name, old in before.state.items():
            assert same_bits(state[name], old), f"{label}: {name} changed without a gradient"
        return

    dtypes = state_dtypes(group, p)
    assert set(state) == set(dtypes) | set(before.state), f"{label}: state is {sorted(state)}"
    old: dict[str, Any] = {}
    for name in dtypes:
        assert state[name].shape == (() if name == "step" else p.shape), f"{label}: {name}'s shape"
        if name in before.state:
            assert state[name].dtype == before.state[name].dtype, f"{label}: {name}'s dtype changed"
            old[name] = before.state[name]
        else:
            assert state[name].dtype == dtypes[name], f"{label}: {name} has {state[name].dtype}"
            old[name] = torch.zeros(() if name == "step" else p.shape, dtype=dtypes[name])
    if "step" in dtypes:
        assert int(state["step"]) == int(old["step"]) + 1, f"{label}: step is {state['step']}"

    grad = before.grad
    if grad.layout == torch.sparse_coo:
        dims = grad._indices().shape[0]
        rows = int(np.prod(p.shape[:dims]))
        dim = int(np.prod(p.shape[dims:]))
        touched, summed = summed_gradient(grad, arithmetic(p.dtype))
    else:
        rows, dim, touched = 1, p.numel(), torch.zeros(1, dtype=torch.int64)
        summed = grad.detach().to(arithmetic(p.dtype)).reshape(1, dim)
    untouched = torch.ones(rows, dtype=torch.bool)
    untouched[touched] = False

    def matrix(t: Tensor) -> Tensor:
        return t.detach().reshape(rows, dim)

    def wide(t: Tensor) -> Tensor:
        return matrix(t)[touched].to(torch.float64)

    wide_state = {k: int(t) if k == "step" else wide(t) for k, t in old.items()}
    bands = expected(
        group, p.dtype, wide(before.value), summed.to(torch.float64), wide_state, scale
    )
    pairs = {"param": (p, before.value)} | {k: (state[k], old[k]) for k in dtypes if k != "step"}
    for name, (after, start) in pairs.items():
        assert same_bits(matrix(after)[untouched], matrix(start)[untouched]), (
            f"{label}: {name} of untouched rows changed"
        )
        bands[name].check(matrix(after)[touched], f"{label}: {name}")
    for name in set(state) - set(dtypes):
        assert same_bits(state[name], before.state[name]), f"{label}: {name} changed"


@contextmanager
def verified(optimizer: torch.optim.Optimizer, *, scale: float = 1.0) -> Iterator[None]:
    """Check that what happens inside is exactly one step of ``optimizer``.

    ``scale`` is the loss scale that the step has to take out of the gradients.
    """
    before = [
        _remember(group, p, optimizer.state.get(p, {}))
        for group in optimizer.param_groups
        for p in group["params"]
    ]
    yield
    for k, b in enumerate(before):
        state = optimizer.state.get(b.param, {})
        name = f"parameter {k} {list(b.param.shape)} {b.param.dtype} ({b.group['algorithm']})"
        _check_parameter(b, state, name, scale)


@contextmanager
def unchanged(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Check that what happens inside writes to no parameter and no state, bit by bit."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    values = [p.detach().clone() for p in params]
    states = {p: {k: v.clone() for k, v in s.items()} for p, s in optimizer.state.items()}
    yield
    for p, value in zip(params, values, strict=True):
        assert same_bits(p, value), "a parameter changed"
    assert set(optimizer.state) == set(states), "state was created or removed"
    for p, old in states.items():
        assert set(optimizer.state[p]) == set(old)
        for name, tensor in old.items():
            assert same_bits(optimizer.state[p][name], tensor), f"{name} changed"
