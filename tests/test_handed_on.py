# SPDX-License-Identifier: Apache-2.0
"""State that is cleared, groups that are copied and handed on: no step is made up for twice."""

import copy

import pytest
import torch
from cases import clock_of
from torch import nn

from tiger_ext import AdamW, Lion, Tiger

ROWS, DIM = 6, 2
LR, DECAY = 0.1, 0.1

every_road = pytest.mark.parametrize("fused", [None, False], ids=["native", "reference"])
every_mode = pytest.mark.parametrize(
    "cls,lazy", [(Tiger, "exact"), (Lion, "decay"), (AdamW, "decay")], ids=lambda x: str(x)
)


def table():
    return nn.Parameter(torch.ones(ROWS, DIM))


def make(cls, params, lazy, fused, **options):
    return cls(params, lr=LR, weight_decay=DECAY, lazy=lazy, fused=fused, **options)


def touch(optimizer, p, row):
    """Take a step with a gradient in a row; None: without a gradient."""
    p.grad = None
    if row is not None:
        p.grad = torch.sparse_coo_tensor(torch.tensor([[row]]), torch.ones(1, DIM), p.shape)
    optimizer.step()


def decayed(steps):
    return torch.full((DIM,), (1 - LR * DECAY) ** steps)


@every_mode
@every_road
@pytest.mark.parametrize("first", [0, None], ids=["touched", "idle"])
def test_state_that_was_cleared_is_current(cls, lazy, fused, first):
    p = table()
    optimizer = make(cls, [p], lazy, fused)
    for row in (0, 1, 0, 2, 1):
        touch(optimizer, p, row)
    optimizer.flush()
    before = p.detach().clone()
    optimizer.state.clear()
    touch(optimizer, p, first)
    touch(optimizer, p, 1)
    optimizer.flush()
    torch.testing.assert_close(p[5] / before[5], decayed(2))
    if cls is AdamW:
        assert int(optimizer.state[p]["step"]) == 2


@every_mode
@every_road
@pytest.mark.parametrize("how", ["groups", "copies", "a deep copy", "its dicts' copies"])
def test_groups_handed_to_another_optimizer_begin_anew(cls, lazy, fused, how):
    p = table()
    first = make(cls, [p], lazy, fused)
    for row in (0, 1, 0, 2, 1):
        touch(first, p, row)
    first.flush()
    groups = {
        "groups": first.param_groups,
        "copies": [dict(group) for group in first.param_groups],
        "a deep copy": [{**copy.deepcopy(group), "params": [p]} for group in first.param_groups],
        "its dicts' copies": [
            dict(group, params=[p]) for group in first.state_dict()["param_groups"]
        ],
    }[how]
    second = cls(groups)
    before = p.detach().clone()
    touch(second, p, 0)
    second.flush()
    torch.testing.assert_close(p[5] / before[5], decayed(1))
    assert clock_of(second).history.steps == 1
    assert clock_of(first).history.steps == 5  # not shared
    assert all(
        isinstance(value, (int, float, str, bool, list, tuple, type(None), torch.Tensor))
        for value in second.param_groups[0].values()
    )


@every_road
def test_windows_of_groups_handed_to_another_optimizer_begin_anew(fused):
    p = nn.Parameter(torch.ones(3))
    first = Tiger([p], lr=LR, accumulation_steps=3, fused=fused)
    for _ in range(5):
        p.grad = torch.ones(3)
        first.step()
    second = Tiger(first.param_groups)
    start = p.detach().clone()
    for _ in range(2):
        second.step()
        assert torch.equal(p, start)
    second.step()
    assert not torch.equal(p, start)
    assert (clock_of(first).windows, clock_of(first).micro_steps) == (1, 2)


@every_mode
@every_road
def test_copied_groups_of_the_same_optimizer_go_on(cls, lazy, fused):
    def run(between):
        p, q = table(), table()
        optimizer = make(cls, [{"params": [p]}, {"params": [q]}], lazy, fused)
        for row in (0, 1, 0):
            q.grad = None
            touch(optimizer, p, row)
        between(optimizer)
        for row in (2, 0, None):
            touch(optimizer, p, row)
        optimizer.flush()
        return p.detach(), q.detach()

    def copy_groups(optimizer):
        optimizer.param_groups = [dict(group) for group in optimizer.param_groups]

    def turn_around(optimizer):
        optimizer.param_groups.reverse()

    expected = run(lambda optimizer: None)
    for between in (copy_groups, turn_around):
        found = run(between)
        assert all(torch.equal(a, b) for a, b in zip(found, expected))


@every_mode
@every_road
def test_a_group_that_is_removed_takes_its_clock_along(cls, lazy, fused):
    p, q = table(), table()
    optimizer = make(cls, [p], lazy, fused)
    for row in (0, 1):
        touch(optimizer, p, row)
    optimizer.add_param_group({"params": [q]})
    touch(optimizer, p, 0)
    del optimizer.param_groups[0]
    touch(optimizer, q, 0)
    optimizer.flush()
    assert clock_of(optimizer).history.steps == 2
    torch.testing.assert_close(q[5], decayed(2))


@every_mode
@every_road
@pytest.mark.parametrize("how", ["appended", "replaced"])
def test_a_parameter_put_into_a_group_is_current(cls, lazy, fused, how):
    p, q = table(), table()
    optimizer = make(cls, [p], lazy, fused)
    for row in (0, 1, 0):
        touch(optimizer, p, row)
    if how == "appended":
        optimizer.param_groups[0]["params"].append(q)
    else:
        optimizer.param_groups[0]["params"][0] = q
    touch(optimizer, q, 0)
    touch(optimizer, q, None)
    optimizer.flush()
    torch.testing.assert_close(q[5], decayed(2))


@every_mode
@every_road
@pytest.mark.parametrize("loaded", [False, True], ids=["", "loaded"])
def test_a_group_made_lazy_counts_from_then_on(cls, lazy, fused, loaded):
    p = table()
    optimizer = make(cls, [p], "frozen", fused)
    for row in (0, 1):
        touch(optimizer, p, row)
    if loaded:  # a frozen optimizer's state, into a lazy one, which stays lazy
        saved = copy.deepcopy(optimizer.state_dict())
        optimizer = make(cls, [p], lazy, fused)
        optimizer.load_state_dict(saved)
        assert optimizer.param_groups[0]["lazy"] == lazy
    else:
        optimizer.flush()
        optimizer.param_groups[0]["lazy"] = lazy
    before = p.detach().clone()
    for _ in range(5):
        touch(optimizer, p, None)
    optimizer.flush()
    torch.testing.assert_close(p[5] / before[5], decayed(5))
    assert optimizer.state[p]["last_step"].abs().tolist() == [5] * ROWS


def two_groups(cls, lazy, fused, **options):
    """Return tables of two groups of which the second came three steps, or windows, later."""
    p, q, other = table(), table(), nn.Parameter(torch.ones(2))
    optimizer = make(cls, [p, other], lazy, fused, **options)
    steps = options.get("accumulation_steps", 1)
    for row in (0, 1, 0) * steps:
        touch(optimizer, p, row)
    optimizer.add_param_group({"params": [q], "lr": LR, "weight_decay": DECAY})
    for row in (2, 1) * steps:
        touch(optimizer, p, row)
    return p, q, optimizer


def move(optimizer, p, source, target):
    params = optimizer.param_groups[source]["params"]
    del params[next(i for i, own in enumerate(params) if own is p)]
    optimizer.param_groups[target]["params"].append(p)


@every_mode
@every_road
@pytest.mark.parametrize("back", [False, True], ids=["to the younger", "to the older"])
def test_a_parameter_moved_to_another_group_goes_by_its_clock(cls, lazy, fused, back):
    p, q, optimizer = two_groups(cls, lazy, fused)
    optimizer.flush()
    moved, source = (q, 1) if back else (p, 0)
    touch(optimizer, q, 4)
    optimizer.flush()
    move(optimizer, moved, source, 1 - source)
    before, momentum = moved.detach().clone(), optimizer.state[moved]["exp_avg"].clone()
    q.grad = None
    for row in (0, None, 0):
        touch(optimizer, moved, row)
    optimizer.flush()
    torch.testing.assert_close(moved[5] / before[5], decayed(3))
    now = clock_of(optimizer, 1 - source).history.steps
    assert optimizer.state[moved]["last_step"].tolist() == [now] * ROWS
    assert bool((momentum[0 if moved is p else 4] != 0).all())  # which has stayed


@every_road
@pytest.mark.parametrize("back", [False, True], ids=["to the younger", "to the older"])
@pytest.mark.parametrize("rows", [False, True], ids=["dense", "sparse"])
def test_a_parameter_moved_to_another_group_is_in_none_of_its_windows(fused, back, rows):
    p, q, optimizer = two_groups(Tiger, "frozen", fused, accumulation_steps=2)
    moved, source = (q, 1) if back else (p, 0)
    p.grad = q.grad = None

    def micro_step(value):
        if rows:
            moved.grad = torch.sparse_coo_tensor([[1]], [[value] * DIM], moved.shape)
        else:
            moved.grad = torch.full_like(moved, value)
        optimizer.step()

    micro_step(1.0)
    micro_step(1.0)
    move(optimizer, moved, source, 1 - source)
    before, momentum = moved.detach().clone(), optimizer.state[moved]["exp_avg"].clone()
    micro_step(0.5)
    assert torch.equal(moved, before)  # a window's first: the momentum decays, and is added to
    beta = optimizer.param_groups[0]["betas"][0]
    expected = beta * momentum[1] + (1 - beta) * 0.25
    torch.testing.assert_close(optimizer.state[moved]["exp_avg"][1], expected)
    micro_step(0.5)
    torch.testing.assert_close(moved[1], before[1] * (1 - LR * DECAY) - LR)
    assert int(optimizer.state[moved]["window"].max()) == clock_of(optimizer, 1 - source).windows


@every_road
def test_exact_makes_up_for_the_drift_after_the_change(fused):
    p = nn.Parameter(torch.ones(3, 1))
    optimizer = Tiger([p], lr=0.1, betas=(0.5,), weight_decay=0.1, fused=fused)
    p.grad = torch.sparse_coo_tensor(torch.tensor([[0]]), torch.ones(1, 1), p.shape)
    optimizer.step()
    optimizer.param_groups[0]["lazy"] = "exact"
    expected = p[0].item()
    for _ in range(5):
        p.grad = None
        optimizer.step()
        expected = (1 - 0.01) * expected - 0.1
    optimizer.flush()
    assert p[0].item() == pytest.approx(expected, rel=1e-6)


@every_road
def test_sparse_dims_may_change_where_no_gradient_has_come_in_the_window(fused):
    p, other = nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(2))
    optimizer = Tiger([p, other], lr=0.1, accumulation_steps=2, fused=fused)

    def step(grad):
        p.grad, other.grad = grad, torch.ones(2)
        optimizer.step()

    rows = torch.sparse_coo_tensor(torch.tensor([[1]]), torch.ones(1, 3), p.shape)
    elements = torch.sparse_coo_tensor(torch.tensor([[2], [0]]), torch.ones(1), p.shape)
    step(rows)
    step(None)
    step(None)  # of a second window
    step(elements)
    moved = (p != 1).nonzero().tolist()
    assert moved == [[1, 0], [1, 1], [1, 2], [2, 0]]
    step(rows)
    before = p.detach().clone()
    with pytest.raises(RuntimeError, match="sparse_dim changed from 1 to 2 within"):
        step(elements)
    assert torch.equal(p, before)


@every_mode
def test_state_dicts_hold_plain_numbers(cls, lazy):
    p = table()
    optimizer = make(cls, [p], lazy, None)
    touch(optimizer, p, 0)
    for group in optimizer.state_dict()["param_groups"]:
        for key, value in group.items():
            assert isinstance(value, (int, float, str, bool, list, tuple, type(None))), key
