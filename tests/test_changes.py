# SPDX-License-Identifier: Apache-2.0
"""Delta checkpoints: a full one and its deltas give back the run bit by bit, or are refused."""

import copy
import io
import json
import os
import random
import re

import pytest
import torch
from cases import clock_of
from oracle import same_bits
from torch import nn
from torch.nn import Parameter

from tiger_ext import AdamW, Lion, Tiger
from tiger_ext.checkpoint import CheckpointError, apply_changes, position, save_changes

ROWS, DIM = 300, 4
MODES = {
    "tiger-decay": (Tiger, "decay"),
    "tiger-exact": (Tiger, "exact"),
    "lion-exact": (Lion, "exact"),
    "adamw-decay": (AdamW, "decay"),
}
every_mode = pytest.mark.parametrize("cls,lazy", MODES.values(), ids=MODES)
every_road = pytest.mark.parametrize("fused", [None, False], ids=["native", "reference"])


class Net(nn.Module):
    """Two tables and a dense layer."""

    def __init__(self, sparse, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.table = nn.Embedding(ROWS, DIM, sparse=sparse)
        self.other = nn.Embedding(ROWS // 2, DIM, sparse=sparse)
        self.head = nn.Linear(DIM, 3)

    def forward(self, ids):
        return self.head(self.table(ids) + self.other(ids // 2)).square().sum()


class Run:
    """A model, its optimizer, and what has been saved of them."""

    def __init__(self, cls=Tiger, lazy="exact", *, sparse=True, seed=0, dtype=None, **options):
        self.net = Net(sparse, seed).to(dtype)
        hyper = dict(lr=0.01, weight_decay=0.1)
        self.optimizer = cls(self.net.named_parameters(), lazy=lazy, **hyper, **options)
        self.optimizer.track(self.net.table)
        self.optimizer.track(self.net.other)

    def train(self, steps):
        for step in steps:
            for group in self.optimizer.param_groups:
                group["lr"] = 0.01 * (1 + step // 3 % 3)
            self.optimizer.zero_grad()
            self.net(batch(step)).backward()
            self.optimizer.step()

    def full(self):
        file = io.BytesIO()
        saved = {"model": self.net.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save(saved, file)
        file.seek(0)
        return torch.load(file, weights_only=True)

    def load(self, full):
        self.net.load_state_dict(full["model"])
        self.optimizer.load_state_dict(full["optimizer"])

    def everything(self):
        """Return a copy of all that a checkpoint is to give back."""
        optimizer = self.optimizer
        numbers = []
        for k in range(len(optimizer.param_groups)):
            clock = clock_of(optimizer, k)
            numbers += [clock.numbers(), [clock.numbers_of(p) for p in clock.params]]
        groups = optimizer.state_dict()["param_groups"]
        return copy.deepcopy([list(self.net.parameters()), optimizer.state_dict()["state"]]), (
            numbers,
            [{k: v for k, v in g.items() if k not in ("fused", "capturable")} for g in groups],
        )


def batch(step):
    """Ids of the first half of the table, some more than once."""
    return torch.randint(ROWS // 2, (6,), generator=torch.Generator().manual_seed(1000 + step))


def same(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and same_bits(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))
    return a == b


def assert_alike(run, other):
    assert same(run.everything(), other.everything())


def read(run):
    """Rows that no gradient touches are read, as by an evaluation, and catch up."""
    run.net.eval()
    with torch.no_grad():
        run.net(torch.arange(ROWS - 40, ROWS - 20))
    run.net.train()


def flush(run):
    run.optimizer.flush()


def nothing(run):
    pass


BETWEEN = {"nothing": nothing, "read": read, "flush": flush}
between = pytest.mark.parametrize("event", BETWEEN.values(), ids=BETWEEN)


def follow(run, other, tmp_path, event=nothing, steps=8, deltas=3):
    """Train, save in full, then deltas; restore them in the other run; both go on alike.

    ``event`` comes directly after a save, and again before the next one.
    """
    run.train(range(steps))
    full, since = run.full(), position(run.optimizer)
    paths = []
    for k in range(1, deltas + 1):
        event(run)
        run.train(range(steps * k, steps * (k + 1)))
        event(run)
        paths.append(tmp_path / f"delta{k}")
        since = save_changes(run.optimizer, paths[-1], since)
    other.load(full)
    for path in paths:
        reached = apply_changes(other.optimizer, path)
    assert_alike(run, other)
    assert strip(reached) == strip(since) == strip(position(other.optimizer))
    event(run)
    event(other)
    going_on = range(steps * (deltas + 1), steps * (deltas + 2))
    run.train(going_on)
    other.train(going_on)
    assert_alike(run, other)
    flush(run)
    flush(other)
    assert_alike(run, other)
    return paths


def strip(place):
    """Return a position without what tells one process' optimizers apart."""
    place = copy.deepcopy(place)
    for group in place["groups"]:
        group.pop("line")
        for each in group["params"]:
            each.pop("rewritten", None)
    return place


# ------------------------------------------------------------------------------- the same bits


@every_mode
@every_road
@between
def test_full_save_and_deltas_give_back_the_run(cls, lazy, fused, event, tmp_path):
    make = lambda seed: Run(cls, lazy, fused=fused, seed=seed)  # noqa: E731
    follow(make(0), make(1), tmp_path, event)


@every_mode
@every_road
@pytest.mark.parametrize("rows", ["nonzero", "tracked", None])
def test_strided_gradients(cls, lazy, fused, rows, tmp_path):
    make = lambda seed: Run(cls, lazy, sparse=False, fused=fused, rows=rows, seed=seed)  # noqa: E731
    paths = follow(make(0), make(1), tmp_path, read)
    whole = ROWS * DIM * 4 * 2
    assert (os.path.getsize(paths[0]) > whole) == (rows is None or cls is AdamW and False)


@every_mode
@between
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(cls, lazy, event, dtype, tmp_path):
    make = lambda seed: Run(cls, lazy, dtype=dtype, seed=seed)  # noqa: E731
    follow(make(0), make(1), tmp_path, event)
    make = lambda seed: Run(cls, lazy, dtype=dtype, seed=seed, momentum_dtype=torch.float32)  # noqa: E731
    follow(make(0), make(1), tmp_path, event)


@every_road
@between
@pytest.mark.parametrize("lazy", ["frozen", "decay", "exact"])
@pytest.mark.parametrize("steps", [6, 7, 8])
def test_open_accumulation_windows(lazy, fused, event, steps, tmp_path):
    make = lambda seed: Run(Tiger, lazy, fused=fused, seed=seed, accumulation_steps=3)  # noqa: E731
    follow(make(0), make(1), tmp_path, event, steps)


@every_road
@pytest.mark.parametrize("cls", [Tiger, Lion, AdamW])
def test_frozen_groups_are_saved_whole(cls, fused, tmp_path):
    make = lambda seed: Run(cls, "frozen", fused=fused, seed=seed)  # noqa: E731
    follow(make(0), make(1), tmp_path)
