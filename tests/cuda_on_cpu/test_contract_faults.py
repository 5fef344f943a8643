# SPDX-License-Identifier: Apache-2.0
"""What the CUDA kernels do about bad row indices and false claims, and when it is reported."""

import pytest
import torch
from both import (
    DEVICE,
    agree,
    assert_agree,
    device_step,
    entries,
    memory,
    moved,
    shifted,
    synchronize,
)
from cases import RULES, clock_of, every_rule, parameter
from oracle import same_bits, unchanged
from torch.nn import Parameter

from tiger_ext import _native
from tiger_ext.group_step import GroupStep

ROWS, DIM = 30, 5
LOWEST, HIGHEST = -(2**63), 2**63 - 1


class Trainer:
    """An optimizer of a table, which NaNs surround in memory, and of a bias."""

    def __init__(self, rule, table, *, named=True, **options):
        self.table = Parameter(moved(shifted(table, 7), DEVICE))
        self.bias = Parameter(torch.ones(8, device=DEVICE))
        params = [("table", self.table), ("bias", self.bias)]
        self.opt = rule(params if named else [p for _, p in params], fused=True, **options)

    def step(self, grad):
        self.table.grad = None if grad is None else moved(grad, DEVICE)
        self.bias.grad = torch.linspace(-1, 1, 8, device=DEVICE)
        self.opt.step()
        synchronize()  # so that the next step knows what this one found

    def assert_same(self, other):
        assert_agree(self.table, other.table, "table")
        assert_agree(self.bias, other.bias, "bias")
        for p, q in ((self.table, other.table), (self.bias, other.bias)):
            assert self.opt.state[p].keys() == other.opt.state[q].keys()
            for name, t in self.opt.state[p].items():
                assert_agree(t, other.opt.state[q][name], name)
        whole = memory(self.table)
        assert bool(whole[:7].isnan().all()) and bool(whole[7 + self.table.numel() :].isnan().all())

    def assert_reported(self, error, match):
        """The next step changes nothing and raises; the one after that is in order again."""
        with unchanged(self.opt), pytest.raises(error, match=match):
            self.step(entries(self.table, [3, 3, 0]))


def spoiled(table, good, bad, at=None):
    """Return a gradient with the entries ``good`` and ``bad``, and the one without ``bad``.

    ``at``: before which of the good entries the bad ones stand; by default scattered.
    """
    good, bad = (torch.as_tensor(x) for x in (good, bad))
    good, bad = (x.reshape(1, -1) if x.dim() < 2 else x for x in (good, bad))
    count, wrong = good.shape[1], bad.shape[1]
    clean = entries(table, good)
    if at is None:
        order = torch.randperm(count + wrong)
        keep = order.argsort()[:count].sort().values  # good entries stay in their order
        is_good = torch.zeros(count + wrong, dtype=torch.bool)
        is_good[keep] = True
    else:
        is_good = torch.ones(count + wrong, dtype=torch.bool)
        is_good[at : at + wrong] = False
    ids = torch.empty(len(good), count + wrong, dtype=torch.int64)
    values = torch.full((count + wrong, *clean._values().shape[1:]), 1e3)
    ids[:, is_good], ids[:, ~is_good] = good, bad
    values[is_good] = clean._values()
    return entries(table, ids, values=values), clean


def check(rule, table, with_bad, clean, error, match, *, named=True):
    """Take a good step, the faulty one, the one that reports it, and another good one."""
    first, last = entries(table, [1, 2, 2]), entries(table, [0, 3, 1])
    faulty, expected = (Trainer(rule, table, named=named) for _ in range(2))
    faulty.step(first)
    faulty.step(with_bad)
    expected.step(first)
    expected.step(clean)
    faulty.assert_same(expected)
    faulty.assert_reported(error, match)
    faulty.assert_same(expected)
    for _ in range(2):
        faulty.step(last)
        expected.step(last)
        faulty.assert_same(expected)


# ------------------------------------------------------------------------------------ bad indices


@every_rule
@pytest.mark.parametrize("index", [-1, ROWS, ROWS + 1, 10**12, 2**32, LOWEST, HIGHEST])
@pytest.mark.parametrize("good", [0, 3, 5000])
def test_a_bad_row_index(rule, index, good):
    table = parameter(ROWS, DIM).detach()
    ids = (torch.rand(good) ** 3 * ROWS).long()  # one row has more than 256 entries
    with_bad, clean = spoiled(table, ids, [index])
    match = rf"'table'.* {index}\b.*\b{ROWS} rows"
    check(rule, table, with_bad, clean, IndexError, match)


@pytest.mark.parametrize("at", [0, 1, 31, 32, 255, 256, 257, 999, 1000])
@pytest.mark.parametrize("index", [-1, ROWS])
def test_where_the_bad_entry_stands(at, index):
    table = parameter(ROWS, DIM).detach()
    with_bad, clean = spoiled(table, torch.randint(ROWS, (1000,)), [index], at)
    match = rf"entry {at}\b.* {index}\b.*\b{ROWS} rows"
    check(RULES[0], table, with_bad, clean, IndexError, match)


@every_rule
def test_without_names_the_place_is_reported(rule):
    table = parameter(ROWS, DIM).detach()
    with_bad, clean = spoiled(table, [4, 4], [77])
    match = rf"group 0.*position 0.* 77\b.*\b{ROWS} rows"
    check(rule, table, with_bad, clean, IndexError, match, named=False)


@every_rule
@pytest.mark.parametrize("wrong", [2, 300, 4000])
def test_several_bad_indices_are_reported_once(rule, wrong):
    table = parameter(ROWS, DIM).detach()
    bad = torch.tensor([-1, ROWS, -5, 10**12]).repeat(wrong // 2)[:wrong]
    with_bad, clean = spoiled(table, torch.randint(ROWS, (1000,)), bad)
    match = rf"'table'.* (-1|{ROWS}|-5|{10**12})\b.*\b{ROWS} rows"
    check(rule, table, with_bad, clean, IndexError, match)


# Entries of a 4 x 5 x 6 table; the linear index of some is that of a row. Then dimension and index.
IN_DIMENSIONS = [
    ([4], [(0, 4)]),
    ([1, 7], [(1, 7)]),
    ([1, -1], [(1, -1)]),
    ([-1, 6], [(0, -1), (1, 6)]),
    ([4, 0], [(0, 4)]),
    ([1, 7, 0], [(1, 7)]),
    ([1, 2, 6], [(2, 6)]),
    ([1, 2, -1], [(2, -1)]),
    ([3, 10**12, 0], [(1, 10**12)]),
    ([LOWEST, HIGHEST, LOWEST], [(0, LOWEST), (1, HIGHEST), (2, LOWEST)]),
    ([0, 2**62, 0], [(1, 2**62)]),
]


@every_rule
@pytest.mark.parametrize("column,wrong", IN_DIMENSIONS, ids=lambda x: str(x).replace(" ", ""))
@pytest.mark.parametrize("good", [0, 500])
def test_a_bad_index_in_any_sparse_dimension(rule, column, wrong, good):
    table = torch.randn(4, 5, 6)
    ids = torch.stack([torch.randint(n, (good,)) for n in table.shape[: len(column)]])
    with_bad, clean = spoiled(table, ids, torch.tensor(column)[:, None])
    match = "|".join(rf"'table'.* {i}\b.*dimension {d}\b.* {table.shape[d]} rows" for d, i in wrong)
    check(rule, table, with_bad, clean, IndexError, match)


@every_rule
@pytest.mark.parametrize("shape,index", [((0, 5), 0), ((0, 5), 3), ((5, 0), 5), ((5, 0), -1)])
def test_a_bad_index_into_an_empty_table(rule, shape, index):
    trainer = Trainer(rule, torch.randn(shape))
    trainer.step(entries(trainer.table, [index]))
    match = rf"'table'.* {index}\b.*\b{shape[0]} rows"
    with unchanged(trainer.opt), pytest.raises(IndexError, match=match):
        trainer.step(None)
    trainer.step(None)


@every_rule
@pytest.mark.parametrize("index,at", [(-1, 0), (LOWEST, 0), (ROWS, 20), (10**12, 20)])
def test_a_bad_index_among_coalesced_ones(rule, index, at):
    table = parameter(ROWS, DIM).detach()
    grads = spoiled(table, torch.arange(20) + 3, [index], at)
    with_bad, clean = (
        entries(table, g._indices(), values=g._values(), coalesced=True) for g in grads
    )
    match = rf"'table'.* {index}\b.*\b{ROWS} rows"
    check(rule, table, with_bad, clean, IndexError, match)


@every_rule
def test_tables_beside_the_faulty_one(rule):
    tables = [torch.randn(40, d) for d in (3, 20, 64)]
    steps = [entries(t, torch.randint(40, (90,))) for t in tables]
    outcome = []
    for grad in (spoiled(tables[1], [5, 39], [40, -1]), (entries(tables[1], [5, 39]),) * 2):
        torch.manual_seed(3)
        params = [Parameter(moved(t, DEVICE)) for t in tables]
        opt = rule([("first", params[0]), ("second", params[1]), ("third", params[2])])
        for p, g in zip(params, (steps[0], grad[0], steps[2])):
            p.grad = moved(g, DEVICE)
        opt.step()
        synchronize()
        outcome.append((opt, params))
    values = [[p.detach().cpu() for p in params] for _, params in outcome]
    assert agree(values[0][0], values[1][0]) and agree(values[0][2], values[1][2])
    with pytest.raises(IndexError, match=r"'second'.* (40|-1)\b.*\b40 rows"):
        outcome[0][0].step()
    outcome[1][0].step()


# ------------------------------------------------------------------------------------ who reports


@every_rule
def test_a_step_without_gradients_reports_too(rule):
    trainer = Trainer(rule, torch.randn(ROWS, DIM))
    trainer.step(entries(trainer.table, [2, ROWS]))
    trainer.opt.zero_grad()
    with unchanged(trainer.opt), pytest.raises(IndexError):
        trainer.opt.step()
    trainer.opt.step()


@every_rule
def test_the_reporting_step_creates_no_state(rule):
    trainer = Trainer(rule, torch.randn(ROWS, DIM))
    late = Parameter(torch.ones(4, device=DEVICE))
    trainer.opt.add_param_group({"params": [("late", late)]})
    trainer.step(entries(trainer.table, [ROWS]))
    late.grad = torch.ones(4, device=DEVICE)
    trainer.assert_reported(IndexError, "'table'")
    assert late not in trainer.opt.state
    trainer.opt.step()
    assert late in trainer.opt.state


@every_rule
def test_another_optimizer_does_not_report(rule):
    first, second = (Trainer(rule, torch.randn(ROWS, DIM)) for _ in range(2))
    good = entries(first.table, [1, 2])
    second.step(good)
    first.step(entries(first.table, [2, 500]))
    for _ in range(3):
        second.step(good)
    Trainer(rule, torch.randn(ROWS, DIM)).step(good)
    first.assert_reported(IndexError, r" 500\b")
    second.step(good)
    first.step(good)


@every_rule
def test_the_first_fault_stays_until_it_is_read(rule):
    trainer = Trainer(rule, torch.randn(ROWS, DIM))
    good = entries(trainer.table, [1, 2])
    trainer.step(good)
    # Steps that have begun before the other's kernels found anything.
    steps = [_native.C.Step(trainer.opt._faults, None, None) for _ in range(2)]
    trainer.bias.grad = None
    for step, ids in zip(steps, ([3, 77], [88, 4, 99])):
        trainer.table.grad = moved(entries(trainer.table, ids), DEVICE)
        group = GroupStep(0, trainer.opt.param_groups[0], clock_of(trainer.opt))
        arguments = (group.params, trainer.opt.state, 0, group.rule(True), group.lr, {})
        assert step.add_group(*arguments, None, None) == ([], [], [], [], [])
        step.prepare()
    synchronize()
    trainer.assert_reported(IndexError, r" 77\b.*\b30 rows \(one of 3 faulty entries\)$")
    trainer.step(good)
    trainer.step(entries(trainer.table, [5, 77]))
    trainer.assert_reported(IndexError, r" 77\b.*\b30 rows$")


@every_rule
def test_two_kinds_of_faults_in_one_step_are_both_reported(rule):
    trainer = Trainer(rule, torch.randn(ROWS, DIM), lazy="decay")
    good = entries(trainer.table, [1, 2])
    trainer.step(good)
    lr, group = trainer.opt.param_groups[0]["lr"], trainer.opt.param_groups[0]
    group["lr"] = torch.tensor(200.0, device=DEVICE)
    group["weight_decay"] = 0.01
    trainer.table.grad = moved(entries(trainer.table, [3, 77]), DEVICE)
    device_step(trainer.opt)
    synchronize()
    group["lr"] = lr
    trainer.assert_reported(IndexError, r" 77\b")
    trainer.assert_reported(ValueError, "lr \\* weight_decay")
    trainer.step(good)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=["int64", "int32"])
def test_the_next_op_reports_for_an_op(dtype):
    ops = torch.ops.tiger_ext
    hyper = dict(lr=0.1, beta1=0.5, beta2=0.5, weight_decay=0.3)
    table, momentum = (torch.randn(ROWS, DIM).to(DEVICE) for _ in range(2))
    copies = [table.clone(), momentum.clone()]
    ids = torch.tensor([[4, ROWS, 4, -7]], dtype=dtype).to(DEVICE)
    values = torch.randn(4, DIM).to(DEVICE)
    ops.sign_momentum_rows_([table], [ids], [values], [momentum], **hyper)
    synchronize()
    good = torch.ones(2, 2).to(DEVICE)
    with pytest.raises(IndexError, match=rf"params\[0\].* ({ROWS}|-7)\b.*\b{ROWS} rows"):
        ops.sign_momentum_dense_([good], [good], [good.clone()], **hyper)
    assert bool((good == 1).all())
    ops.sign_momentum_rows_(
        copies[:1], [ids[:, ::2].contiguous()], [values[::2].contiguous()], copies[1:], **hyper
    )
    assert same_bits(table, copies[0]) and same_bits(momentum, copies[1])


# ----------------------------------------------------------------------------------- false claims

FALSE = {
    "two-in-wrong-order": [9, 4],
    "duplicate": [4, 4],
    "reversed": list(range(29, 2, -1)),
    "unsorted-duplicates": [7, 3, 7, 9, 3, 3, 29, 0],
    "one-row": [11] * 600,
}


@every_rule
@pytest.mark.parametrize("ids", FALSE.values(), ids=FALSE)
def test_what_is_not_coalesced_but_marked_so(rule, ids):
    trainer = Trainer(rule, torch.randn(ROWS, DIM))
    trainer.step(entries(trainer.table, [1, 2]))
    before = trainer.table.detach().clone()
    trainer.step(entries(trainer.table, ids, coalesced=True))
    untouched = torch.ones(ROWS, dtype=torch.bool, device=DEVICE)
    untouched[torch.tensor(ids, device=DEVICE)] = False
    assert same_bits(trainer.table[untouched], before[untouched])
    whole = memory(trainer.table)
    assert bool(whole[:7].isnan().all()) and bool(whole[7 + ROWS * DIM :].isnan().all())
    trainer.assert_reported(RuntimeError, "'table'.*coalesced")
    trainer.step(entries(trainer.table, [5, 2]))
    trainer.step(entries(trainer.table, [5, 2]))


@pytest.mark.parametrize("at", [1, 31, 32, 33, 255, 256, 257, 511, 512, 699])
@pytest.mark.parametrize("kind", ["duplicate", "decreasing"])
def test_a_single_break_in_a_coalesced_gradient(at, kind):
    trainer = Trainer(RULES[0], torch.randn(2000, 3))
    ids = torch.arange(700) * 2 + 2
    ids[at] = ids[at - 1] - int(kind == "decreasing")
    trainer.step(entries(trainer.table, ids, coalesced=True))
    trainer.assert_reported(RuntimeError, "'table'.*coalesced")
    trainer.step(None)


def test_a_break_in_a_later_dimension():
    trainer = Trainer(RULES[0], torch.randn(6, 5, 2))
    good = torch.tensor([[0, 1, 1, 3], [4, 0, 3, 1]])
    trainer.step(entries(trainer.table, good, coalesced=True))
    trainer.step(entries(trainer.table, good[:, [0, 2, 1, 3]], coalesced=True))
    trainer.assert_reported(RuntimeError, "'table'.*coalesced")
    trainer.step(None)
