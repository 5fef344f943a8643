# SPDX-License-Identifier: Apache-2.0
"""A small model with a table, its batches, and every class in every lazy mode."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from cases import clock_of
from oracle import same_bits
from torch import Tensor, nn

from tiger_ext import AdamW, Lion, Tiger

ROWS, DIM = 12, 4
HYPER: dict[str, Any] = dict(lr=0.01, weight_decay=0.1)
MODES = [(c, mode) for c in (Tiger, Lion) for mode in ("frozen", "decay", "exact")]
MODES += [(AdamW, "frozen"), (AdamW, "decay")]
every_mode = pytest.mark.parametrize("cls,lazy", MODES, ids=[f"{c.__name__}-{m}" for c, m in MODES])
every_lazy = pytest.mark.parametrize("lazy", ["frozen", "decay", "exact"])


class Model(nn.Module):
    """A table, rows of which are looked up, and a dense layer on them; returns the loss."""

    def __init__(self, sparse: bool = True, seed: int = 0) -> None:
        super().__init__()
        self.table = nn.Embedding(ROWS, DIM, sparse=sparse)
        self.head = nn.Linear(DIM, 3)
        generator = torch.Generator().manual_seed(seed)
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=generator)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.table(ids)).square().sum()


def batch(step: int) -> Tensor:
    """Ids, most rows of the table not among them, some twice."""
    return torch.randint(ROWS, (5,), generator=torch.Generator().manual_seed(1000 + step))


def train(
    model: nn.Module,
    optimizer: Any,
    steps: Iterable[int],
    call: Callable[[Tensor], Tensor] | None = None,
) -> None:
    """Take these steps, each with a learning rate of its own."""
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * (1 + step % 3)
        optimizer.zero_grad()
        (model if call is None else call)(batch(step)).backward()
        optimizer.step()


def assert_alike(optimizer: Any, other: Any) -> None:
    """Check that two optimizers have the same parameters and states, bit by bit."""
    groups = zip(optimizer.param_groups, other.param_groups, strict=True)
    for k, (group, twin) in enumerate(groups):
        a, b = clock_of(optimizer, k).history, clock_of(other, k).history
        assert (a and a.saved()) == (b and b.saved())
        for p, q in zip(group["params"], twin["params"], strict=True):
            assert same_bits(p, q)
            assert set(optimizer.state.get(p, {})) == set(other.state.get(q, {}))
            for name, value in optimizer.state.get(p, {}).items():
                assert same_bits(value, other.state[q][name]), name
