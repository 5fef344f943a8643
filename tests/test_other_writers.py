# SPDX-License-Identifier: Apache-2.0
"""Weights that others write while rows of a table are behind: averaged, restored, edited."""

import copy
import warnings

import pytest
import torch
from torch import nn

from tiger_ext import Tiger

ROWS, DIM = 20, 4

every_road = pytest.mark.parametrize("fused", [None, False], ids=["native", "reference"])
every_lazy = pytest.mark.parametrize("lazy", ["decay", "exact"])
SAYS = r"parameter \(group 0, position 0\) was written to by others .* Call optimizer.flush\(\)"


class Run:
    def __init__(self, lazy, fused, **options):
        torch.manual_seed(0)
        self.table = nn.Embedding(ROWS, DIM, sparse=True, **options)
        self.optimizer = Tiger(
            self.table.parameters(), lr=0.01, weight_decay=0.5, lazy=lazy, fused=fused
        )
        self.optimizer.track(self.table)

    def train(self, steps):
        for step in steps:
            self.optimizer.zero_grad()
            self.table(torch.arange(step % 7, ROWS, 7)).square().sum().backward()
            self.optimizer.step()


def edit(table):
    with torch.no_grad():
        table.weight.mul_(0.5)


def restore(table):
    table.load_state_dict(copy.deepcopy(table.state_dict()))


@every_lazy
@every_road
@pytest.mark.parametrize("write", [edit, restore])
@pytest.mark.parametrize("seen_by", ["read", "step", "flush"])
def test_writers_are_noticed_once_while_rows_are_behind(lazy, fused, write, seen_by):
    run = Run(lazy, fused)
    run.train(range(5))
    write(run.table)

    def look():
        if seen_by == "read":
            run.table(torch.arange(3))
        elif seen_by == "flush":
            run.optimizer.flush()
        else:
            run.optimizer.step()

    with pytest.warns(UserWarning, match=SAYS):
        look()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run.train(range(3))
        write(run.table)
        look()  # once for a table


@every_lazy
@every_road
def test_nothing_is_said_after_a_flush(lazy, fused):
    run = Run(lazy, fused)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for begin in range(0, 20, 5):
            run.train(range(begin, begin + 5))
            run.optimizer.flush()
            kept = run.table.weight.detach().clone()
            edit(run.table)
            run.table(torch.arange(ROWS))
            with torch.no_grad():
                run.table.weight.copy_(kept)


@every_lazy
@every_road
def test_ordinary_runs_are_silent(lazy, fused):
    run = Run(lazy, fused)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run.train(range(6))
        twin, other = copy.deepcopy((run.table, run.optimizer))
        other.track(twin)
        saved = copy.deepcopy((run.table.state_dict(), run.optimizer.state_dict()))
        run.train(range(6, 9))
        run.table.load_state_dict(saved[0])  # both: the run is continued from there
        run.optimizer.load_state_dict(saved[1])
        run.train(range(6, 9))
        run.table.weight.requires_grad_(False)
        run.optimizer.zero_grad()
        run.optimizer.step()
        run.table.weight.requires_grad_(True)
        run.train(range(9, 12))
        other.zero_grad()
        other.step()
        other.flush()


@every_lazy
@every_road
def test_a_failed_read_or_step_is_no_writer(lazy, fused):
    run = Run(lazy, fused)
    run.train(range(3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(IndexError):
            run.table(torch.tensor([ROWS]))
        run.optimizer.param_groups[0]["nonfinite"] = "raise"
        run.table.weight.grad = torch.full((ROWS, DIM), torch.nan)
        with pytest.raises(FloatingPointError):
            run.optimizer.step()
        run.train(range(3, 6))


@every_lazy
@every_road
def test_what_a_failed_step_noticed_is_said_by_the_next(lazy, fused):
    run = Run(lazy, fused)
    run.train(range(3))
    edit(run.table)
    late = nn.Parameter(torch.ones(2))
    run.optimizer.add_param_group({"params": [late], "nonfinite": "raise"})
    late.grad = torch.full((2,), torch.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing was made up for
        with pytest.raises(FloatingPointError):
            run.optimizer.step()
    late.grad = None
    with pytest.warns(UserWarning, match=SAYS):
        run.optimizer.step()


@every_lazy
@every_road
def test_rows_that_the_embedding_renorms_are_current(lazy, fused):
    run = Run(lazy, fused, max_norm=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run.train(range(9))
