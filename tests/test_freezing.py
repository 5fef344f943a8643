# SPDX-License-Identifier: Apache-2.0
"""Parameters that do not train for a while (``requires_grad`` is False), in the lazy modes."""

import copy

import pytest
import torch
from cases import clock_of
from torch import nn

from tiger_ext import AdamW, Tiger

ROWS, DIM = 6, 3
BETA, DECAY, EPS = 0.8, 0.5, 1e-8

every_road = pytest.mark.parametrize("fused", [None, False], ids=["native", "reference"])
every_mode = pytest.mark.parametrize(
    "cls,lazy", [(Tiger, "exact"), (Tiger, "decay"), (AdamW, "decay")], ids=lambda x: str(x)
)


class Rule:
    """The dense rule in float64; rows without a gradient as the lazy mode has them."""

    def __init__(self, p, cls, lazy):
        self.p, self.adam, self.lazy = p.detach().double().clone(), cls is AdamW, lazy
        self.m, self.v, self.steps = torch.zeros_like(self.p), torch.zeros_like(self.p), 0

    def step(self, lr, touched, grad):
        beta = 0.9 if self.adam else BETA
        self.steps += 1
        self.p *= 1 - lr * DECAY
        self.m *= beta
        self.v *= 0.99
        self.m[touched] += (1 - beta) * grad
        self.v[touched] += 0.01 * grad**2
        if self.adam:
            m, v = self.m / (1 - 0.9**self.steps), self.v / (1 - 0.99**self.steps)
            moves = m / (v.sqrt() + EPS)
        else:
            moves = self.m.sign()
        rows = slice(None) if self.lazy == "exact" else touched
        self.p[rows] -= lr * moves[rows]


class Run:
    """A table beside a parameter that always trains."""

    def __init__(self, cls, lazy, fused, *, trains=True):
        torch.manual_seed(0)
        self.table = nn.Embedding(ROWS, DIM, sparse=True)
        self.table.weight.requires_grad_(trains)
        self.other = nn.Parameter(torch.ones(2))
        betas = (0.9, 0.99) if cls is AdamW else (BETA,)
        self.optimizer = cls(
            [self.table.weight, self.other],
            lr=0.01,
            betas=betas,
            weight_decay=DECAY,
            lazy=lazy,
            fused=fused,
        )
        self.rule = Rule(self.table.weight, cls, lazy)
        self.lr = 0.01

    def step(self, rows=None):
        """Take a step that touches some rows; None: no gradient."""
        p = self.table.weight
        self.lr = self.lr * 0.9 + 0.003  # another in each step
        self.optimizer.param_groups[0]["lr"] = self.lr
        p.grad, self.other.grad = None, torch.ones(2)
        grad = None
        if rows is not None:
            grad = torch.randn(len(rows), DIM)
            p.grad = torch.sparse_coo_tensor(torch.tensor([rows]), grad, p.shape)
        self.optimizer.step()
        if p.requires_grad:
            self.rule.step(self.lr, rows or [], 0.0 if grad is None else grad.double())

    def assert_as_the_rule(self):
        self.optimizer.flush()
        torch.testing.assert_close(self.table.weight.double(), self.rule.p, rtol=1e-5, atol=1e-6)


def thawing(fused):
    """Return a run whose table trains again, from the next step on."""
    run = Run(Tiger, "exact", fused)
    for rows in ([0, 1], [2], None):
        run.step(rows)
    run.table.weight.requires_grad_(False)
    run.step()
    run.table.weight.requires_grad_(True)
    return run


@every_mode
@every_road
@pytest.mark.parametrize("reads", [False, True], ids=["", "read"])
def test_a_frozen_table_stands_and_then_goes_on_from_where_it_was(cls, lazy, fused, reads):
    run = Run(cls, lazy, fused)
    if reads:
        run.optimizer.track(run.table)
    for rows in ([0, 1], [2], None, [1]):
        run.step(rows)
    run.table.weight.requires_grad_(False)
    before = run.table.weight.clone()
    for _ in range(7):
        run.table(torch.arange(ROWS))
        run.step()
        run.optimizer.flush()
    run.table(torch.arange(ROWS))
    assert torch.equal(run.table.weight, before)
    run.table.weight.requires_grad_(True)
    if reads:
        run.table(torch.arange(2, ROWS))
    for rows in (None, [2, 3], [0], None):
        run.step(rows)
    run.assert_as_the_rule()


@every_mode
@every_road
def test_a_table_that_is_frozen_from_the_start(cls, lazy, fused):
    run = Run(cls, lazy, fused, trains=False)
    before = run.table.weight.clone()
    for _ in range(5):
        run.step()
    run.optimizer.flush()
    for _ in range(4):
        run.step()
    assert torch.equal(run.table.weight, before)
    run.table.weight.requires_grad_(True)
    for rows in (None, [2, 3], None, [0], None):
        run.step(rows)
    run.assert_as_the_rule()
    if cls is AdamW:
        assert int(run.optimizer.state[run.table.weight]["step"]) == 5


@every_mode
@every_road
def test_a_table_frozen_before_its_first_gradient(cls, lazy, fused):
    run = Run(cls, lazy, fused)
    for _ in range(3):
        run.step()  # its rows decay
    run.table.weight.requires_grad_(False)
    for _ in range(4):
        run.step()
    run.optimizer.flush()
    run.table.weight.requires_grad_(True)
    for rows in ([2, 3], None, [0]):
        run.step(rows)
    run.assert_as_the_rule()


@every_mode
@every_road
@pytest.mark.parametrize("thawed_first", [False, True])
@pytest.mark.parametrize("how", ["state dict", "deepcopy"])
def test_a_frozen_table_is_saved_as_one(cls, lazy, fused, thawed_first, how):
    run = Run(cls, lazy, fused)
    for rows in ([0, 1], [2], None):
        run.step(rows)
    run.table.weight.requires_grad_(False)
    for _ in range(3):
        run.step()
    if how == "deepcopy":
        run = copy.deepcopy(run)
    else:
        saved = copy.deepcopy(run.optimizer.state_dict())
        run.optimizer = cls([run.table.weight, run.other], lazy=lazy, fused=fused)
        run.optimizer.load_state_dict(saved)
        assert clock_of(run.optimizer).frozen == {run.table.weight: 3}
        assert "frozen_at" not in run.optimizer.state[run.table.weight]
    if not thawed_first:
        run.step()
    run.table.weight.requires_grad_(True)
    for rows in ([2, 3], None, [0]):
        run.step(rows)
    run.assert_as_the_rule()


@every_road
def test_a_failed_step_does_not_thaw(fused):
    run = thawing(fused)
    before = run.table.weight.clone(), run.optimizer.state[run.table.weight]["last_step"].clone()
    run.optimizer.param_groups[0]["nonfinite"] = "raise"
    run.table.weight.grad = torch.full((ROWS, DIM), torch.nan)
    with pytest.raises(FloatingPointError):
        run.optimizer.step()
    after = run.table.weight, run.optimizer.state[run.table.weight]["last_step"]
    assert all(torch.equal(a, b) for a, b in zip(before, after))
    run.step([1])
    run.assert_as_the_rule()


@every_road
def test_a_gradient_is_taken_whatever_requires_grad_says(fused):
    # As by torch's optimizers: engines hand over gradients of parameters that autograd ignores.
    p = nn.Parameter(torch.ones(4, 2), requires_grad=False)
    optimizer = Tiger([p], lr=0.1, weight_decay=0.0, lazy="exact", fused=fused)
    for _ in range(3):
        p.grad = torch.ones(4, 2)
        optimizer.step()
    torch.testing.assert_close(p, torch.full((4, 2), 0.7))


@every_road
def test_a_table_thaws_beside_one_of_equal_values(fused):
    first, second = (nn.Parameter(torch.ones(ROWS, DIM)) for _ in range(2))
    optimizer = Tiger([first, second], lr=0.1, weight_decay=0.1, lazy="decay", fused=fused)
    second.requires_grad_(False)
    for _ in range(2):
        optimizer.step()
    second.requires_grad_(True)
    optimizer.flush()
    optimizer.step()
    optimizer.flush()
    torch.testing.assert_close(first, torch.full((ROWS, DIM), 0.99**3))
    torch.testing.assert_close(second, torch.full((ROWS, DIM), 0.99))


@every_road
def test_a_table_frozen_just_before_its_window_is_closed_early(fused):
    table, other = nn.Parameter(torch.ones(ROWS, DIM)), nn.Parameter(torch.ones(2))
    optimizer = Tiger(
        [table, other],
        lr=0.1,
        weight_decay=0.1,
        lazy="decay",
        accumulation_steps=2,
        fused=fused,
    )
    other.grad = torch.ones(2)
    for _ in range(3):  # one window, and the first micro-step of another
        optimizer.step()
    table.requires_grad_(False)
    optimizer.close_window()
    table.requires_grad_(True)
    optimizer.flush()
    torch.testing.assert_close(table, torch.full((ROWS, DIM), 0.99))


@every_mode
@every_road
@pytest.mark.parametrize("reads", [False, True], ids=["stepped", "read"])
def test_a_frozen_table_whose_state_was_cleared_begins_when_it_thaws(cls, lazy, fused, reads):
    run = Run(cls, lazy, fused)
    if reads:
        run.optimizer.track(run.table)
    for rows in ([0, 1], [2]):
        run.step(rows)
    run.optimizer.flush()
    run.table.weight.requires_grad_(False)
    run.step()
    del run.optimizer.state[run.table.weight]
    run.step()
    run.table.weight.requires_grad_(True)
    run.rule = Rule(run.table.weight, cls, lazy)
    if reads:
        run.table(torch.arange(ROWS))
        assert torch.equal(run.table.weight.double(), run.rule.p)
    for rows in (None, [2, 3], [0]):
        run.step(rows)
    run.assert_as_the_rule()


@every_road
def test_a_table_that_thaws_is_named_if_its_state_does_not_fit(fused):
    run = thawing(fused)
    state = run.optimizer.state[run.table.weight]
    kept, state["exp_avg"] = state["exp_avg"], torch.zeros(ROWS, DIM + 1)
    before = run.table.weight.detach().clone()
    says = rf"\(group 0, position 0\).* exp_avg has shape \[{ROWS}, {DIM + 1}\], the parameter"
    for _ in range(2):
        with pytest.raises(RuntimeError, match=says):
            run.optimizer.step()
    assert torch.equal(run.table.weight, before)
    state["exp_avg"] = kept
    run.step([1])
    run.assert_as_the_rule()


@every_road
@pytest.mark.parametrize("lazy", ["exact", "decay"])
@pytest.mark.parametrize("gathered", [False, True], ids=["untouched", "gathered"])
@pytest.mark.parametrize("early", [False, True], ids=["", "closed early"])
def test_a_table_frozen_within_a_window(lazy, gathered, early, fused):
    # What has been gathered for it in the window is applied at the window's end, and it ages by it.
    lr, decay, beta = 0.1, 0.5, 0.8
    table, other = nn.Parameter(torch.ones(2, 1)), nn.Parameter(torch.ones(2))
    optimizer = Tiger(
        [table, other],
        lr=lr,
        betas=(beta,),
        weight_decay=decay,
        lazy=lazy,
        accumulation_steps=3,
        fused=fused,
    )

    def step(row):
        table.grad, other.grad = None, torch.ones(2)
        if row is not None:
            table.grad = torch.sparse_coo_tensor([[row]], torch.ones(1, 1), table.shape)
        optimizer.step()

    def window(rows):
        for row in rows:
            step(row)

    window([0, None, None])
    expected = torch.tensor([0.95 - 0.1, 0.95])
    step(1 if gathered else None)
    table.requires_grad_(False)
    step(None)
    if early:
        optimizer.close_window()
    else:
        step(None)
    if gathered:
        drift = 0.1 if lazy == "exact" else 0.0
        expected = 0.95 * expected - torch.tensor([drift, 0.1])
    before = table.detach().clone()
    window([None, None, None])  # it stands: what its rows have missed is made up for later
    optimizer.flush()
    assert torch.equal(table, before)
    table.requires_grad_(True)
    window([None, 1, None])
    optimizer.flush()
    drift = 0.1 if lazy == "exact" else 0.0
    expected = 0.95 * expected - torch.tensor([drift, 0.1])
    torch.testing.assert_close(table.detach().view(2), expected)
