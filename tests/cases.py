# SPDX-License-Identifier: Apache-2.0
"""Named cases that several test files share. Weight decay is never zero."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from tiger_ext import AdamW, Lion, Tiger

FLOATS = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class Rule:
    """An optimizer class with hyperparameters that make every term of its rule count."""

    name: str
    cls: type[torch.optim.Optimizer]
    options: dict[str, Any] = field(default_factory=dict)

    def __call__(self, params: Any, **options: Any) -> torch.optim.Optimizer:
        return self.cls(params, **{**self.options, **options})


RULES = [
    Rule("tiger", Tiger, dict(lr=0.02, betas=(0.9,), weight_decay=0.3)),
    Rule("lion", Lion, dict(lr=0.02, betas=(0.7, 0.95), weight_decay=0.3)),
    Rule("adamw", AdamW, dict(lr=0.02, betas=(0.8, 0.99), eps=1e-6, weight_decay=0.3)),
    Rule("adamw-beta1-0", AdamW, dict(lr=0.02, betas=(0.0, 0.99), eps=1e-6, weight_decay=0.3)),
]
every_rule = pytest.mark.parametrize("rule", RULES, ids=lambda r: r.name)
SIGN_RULES = RULES[:2]


def _compact(name: str, base: int, **options: Any) -> Rule:
    rule = RULES[base]
    return Rule(f"{rule.name}-{name}", rule.cls, {**rule.options, **options})


# Rules whose state costs little, and whose parameters are rounded at random in half precision.
COMPACT_RULES = [
    _compact("int8", 0, momentum_dtype=torch.int8),
    _compact("int8-rounding", 1, momentum_dtype=torch.int8, stochastic_rounding=True),
    _compact("rounding", 0, stochastic_rounding=True),
    _compact("rounding", 2, stochastic_rounding=True),
    _compact("int8", 2, momentum_dtype=torch.int8),
    _compact("row", 2, second_moment="row", stochastic_rounding=True),
    _compact("row-int8", 2, second_moment="row", momentum_dtype=torch.int8),
    _compact("row", 3, second_moment="row"),
]


def floats(name: str):
    """Parametrize an argument over the four storage types."""
    return pytest.mark.parametrize(name, FLOATS.values(), ids=[f"{name}={k}" for k in FLOATS])


def parameter(*shape: int, dtype: torch.dtype = torch.float32) -> Parameter:
    return Parameter(torch.randn(shape, dtype=torch.float64).to(dtype))


def set_grad(p: Tensor, grad: Tensor | None) -> None:
    """Set ``.grad``, which torch ties to the parameter's dtype unless told otherwise."""
    if grad is not None and grad.dtype != p.dtype:
        p.grad_dtype = None
    p.grad = grad


def clock_of(optimizer: Any, group: int = 0) -> Any:
    """Return what an optimizer counts for a group."""
    return optimizer._clocks.of(optimizer.param_groups, optimizer.state)[group]


def dense_grad(p: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.randn(p.shape, dtype=torch.float64).to(dtype or p.dtype)


def sparse_grad(
    p: Tensor,
    nnz: int,
    *,
    sparse_dim: int = 1,
    dtype: torch.dtype | None = None,
    rows: int | None = None,
    coalesced: bool = False,
) -> Tensor:
    """Make a random sparse gradient; indices repeat, in any order, below ``rows`` if given."""
    sizes = [max(1, min(rows or n, n)) for n in p.shape[:sparse_dim]]
    indices = torch.stack([torch.randint(n, (nnz,)) for n in sizes])
    values = torch.randn(nnz, *p.shape[sparse_dim:], dtype=torch.float64).to(dtype or p.dtype)
    grad = torch.sparse_coo_tensor(indices, values, p.shape)
    return grad.coalesce() if coalesced else grad


def unchecked_sparse(indices: Any, values: Tensor, shape: Any) -> Tensor:
    """Make a sparse tensor without looking at its indices, as a faulty producer would."""
    return torch.sparse_coo_tensor(
        torch.as_tensor(indices, dtype=torch.int64), values, shape, check_invariants=False
    )


@dataclass(frozen=True)
class View:
    """A way in which a tensor can lie in memory; ``make(t)`` copies t into such a view."""

    name: str
    dims: int
    make: Callable[[Tensor], Tensor]


def _transposed(t: Tensor) -> Tensor:
    return t.mT.clone(memory_format=torch.contiguous_format).mT


def _sliced(t: Tensor) -> Tensor:
    big = torch.full([2 * n + 1 for n in t.shape], 7.0, dtype=t.dtype)
    view = big[tuple(slice(1, 2 * n + 1, 2) for n in t.shape)]
    view.copy_(t)
    return view


def _columns(t: Tensor) -> Tensor:
    big = torch.full([*t.shape[:-1], t.shape[-1] + 3], 7.0, dtype=t.dtype)
    view = big[..., 1 : 1 + t.shape[-1]]
    view.copy_(t)
    return view


def _misaligned(t: Tensor) -> Tensor:
    big = torch.full([t.numel() + 1], 7.0, dtype=t.dtype)
    view = big[1:].view(t.shape)
    view.copy_(t)
    return view


VIEWS = [
    View("contiguous", 0, torch.Tensor.clone),
    View("misaligned", 1, _misaligned),
    View("every-second", 1, _sliced),
    View("transposed", 2, _transposed),
    View("columns", 2, _columns),
    View(
        "permuted",
        3,
        lambda t: (
            t.permute(*reversed(range(t.dim()))).contiguous().permute(*reversed(range(t.dim())))
        ),
    ),
    View("channels-last", 4, lambda t: t.contiguous(memory_format=torch.channels_last)),
]


def views(name: str, dims: int):
    """Parametrize an argument over the memory layouts that a tensor of ``dims`` dimensions has."""
    fitting = [v for v in VIEWS if v.dims <= dims and (v.name != "channels-last" or dims == 4)]
    return pytest.mark.parametrize(name, fitting, ids=[f"{name}={v.name}" for v in fitting])
