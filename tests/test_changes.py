# SPDX-License-Identifier: Apache-2.0
"""Delta checkpoints: a full one and its deltas give back the run bit by bit, or are refused."""

import copy
import io
import json
import os
import random

import pytest
import torch
from cases import clock_of
from oracle import same_bits
from torch import nn
from torch.nn import Parameter

from tiger_ext import AdamW, Lion, Tiger
from tiger_ext.change_file import read_changes
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


def rows_in(path):
    """Return how many rows of the first table a file has."""
    header, tensors = read_changes(path)
    return len(tensors[header["groups"][0]["parameters"][0]["parameter"]])


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
    assert (rows_in(paths[1]) == ROWS) == (rows is None)


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


# --------------------------------------------------------------------------- which rows are saved


@every_road
def test_only_touched_rows_are_in_a_file(fused, tmp_path):
    rows, touched = 20000, torch.arange(0, 20000, 100)
    for lazy in ("decay", "exact"):
        table = Parameter(torch.randn(rows, 16))
        optimizer = Tiger([table], lr=0.01, lazy=lazy, fused=fused)
        since = position(optimizer)
        for ids in (torch.arange(0, rows, 10), touched):
            since_then, since = since, position(optimizer)
            table.grad = torch.sparse_coo_tensor(ids[None], torch.ones(len(ids), 16), (rows, 16))
            optimizer.step()
        save_changes(optimizer, tmp_path / "both", since_then)
        optimizer.flush()
        since = position(optimizer)
        optimizer.step()
        save_changes(optimizer, tmp_path / "one", since)
        size = os.path.getsize(tmp_path / "one")
        bytes_of_rows = len(touched) * (2 * 16 * 4 + 4 + 4)
        assert bytes_of_rows < size < bytes_of_rows + 12000
        assert rows_in(tmp_path / "one") == len(touched)


def test_after_a_flush_all_rows_are_saved_once(tmp_path):
    run = Run()
    run.train(range(5))
    since = position(run.optimizer)
    run.optimizer.flush()
    since = save_changes(run.optimizer, tmp_path / "flushed", since)
    assert rows_in(tmp_path / "flushed") == ROWS
    run.train(range(5, 7))
    since = save_changes(run.optimizer, tmp_path / "next", since)
    assert rows_in(tmp_path / "next") == len(torch.cat([batch(5), batch(6)]).unique())


@every_road
def test_rows_that_were_only_read_are_saved(fused, tmp_path):
    run, other = Run(fused=fused), Run(fused=fused, seed=1)
    run.train(range(5))
    other.load(run.full())
    since = position(run.optimizer)
    read(run)
    save_changes(run.optimizer, tmp_path / "delta", since)
    reached = apply_changes(other.optimizer, tmp_path / "delta")
    assert_alike(run, other)
    assert reached["groups"][0]["steps"] == 5


@every_road
@pytest.mark.parametrize("lazy", ["decay", "exact"])
@pytest.mark.parametrize("nonfinite", ["skip", "shrink"])
@pytest.mark.parametrize("first", [nothing, flush], ids=["behind", "flushed"])
def test_rows_with_a_gradient_that_is_not_finite(lazy, nonfinite, first, fused, tmp_path):
    options = dict(nonfinite=nonfinite, fused=fused)
    run, other = Run(Tiger, lazy, **options), Run(Tiger, lazy, seed=1, **options)
    run.train(range(5))
    first(run)
    other.load(run.full())
    since = position(run.optimizer)
    table = run.net.table.weight
    before = table.detach().clone()
    values = torch.ones(2, DIM)
    values[0, 1] = torch.inf
    run.optimizer.zero_grad()
    table.grad = torch.sparse_coo_tensor([[ROWS - 1, ROWS - 2]], values, table.shape)
    run.optimizer.step()
    assert (nonfinite == "shrink") <= (not torch.equal(table[-1], before[-1]))
    save_changes(run.optimizer, tmp_path / "delta", since)
    apply_changes(other.optimizer, tmp_path / "delta")
    assert_alike(run, other)


@every_road
@pytest.mark.parametrize("lazy", ["decay", "exact"])
@pytest.mark.parametrize("seen_by", ["save", "step", "read"])
def test_tables_that_others_wrote_to_are_saved_whole(lazy, seen_by, fused, tmp_path):
    run, other = Run(Tiger, lazy, fused=fused), Run(Tiger, lazy, fused=fused, seed=1)
    run.train(range(5))
    run.optimizer.flush()
    other.load(run.full())
    since = position(run.optimizer)
    with torch.no_grad():
        run.net.table.weight.mul_(0.5)
    if seen_by == "step":
        run.train(range(5, 8))
    elif seen_by == "read":
        run.net.table(torch.arange(3))
    since = save_changes(run.optimizer, tmp_path / "1", since)
    assert rows_in(tmp_path / "1") == ROWS
    run.train(range(8, 9))
    save_changes(run.optimizer, tmp_path / "2", since)
    assert rows_in(tmp_path / "2") < 20
    for name in "12":
        apply_changes(other.optimizer, tmp_path / name)
    assert_alike(run, other)


def test_a_table_written_to_before_the_first_step_after_loading(tmp_path):
    run, other, third = Run(), Run(seed=1), Run(seed=2)
    run.train(range(5))
    full = run.full()
    other.load(full)
    third.load(full)
    since = position(other.optimizer)
    with torch.no_grad():
        other.net.table.weight.mul_(0.5)
    with pytest.warns(UserWarning, match="was written to by others"):
        other.train(range(5, 7))
    save_changes(other.optimizer, tmp_path / "delta", since)
    apply_changes(third.optimizer, tmp_path / "delta")
    assert_alike(other, third)


@every_mode
def test_state_that_began_or_was_cleared_since(cls, lazy, tmp_path):
    run, other = Run(cls, lazy), Run(cls, lazy, seed=1)
    full, since = run.full(), position(run.optimizer)
    run.train(range(4))
    since = save_changes(run.optimizer, tmp_path / "1", since)
    del run.optimizer.state[run.net.table.weight]
    since = save_changes(run.optimizer, tmp_path / "2", since)
    run.train(range(4, 6))
    since = save_changes(run.optimizer, tmp_path / "3", since)
    run.optimizer.flush()
    since = save_changes(run.optimizer, tmp_path / "4", since)
    run.optimizer.state.clear()
    run.train(range(6, 9))
    save_changes(run.optimizer, tmp_path / "5", since)
    other.load(full)
    for name in "12345":
        apply_changes(other.optimizer, tmp_path / name)
    assert_alike(run, other)
    run.train(range(9, 12))
    other.train(range(9, 12))
    assert_alike(run, other)


@every_mode
@every_road
def test_parameters_that_are_frozen_and_thawed(cls, lazy, fused, tmp_path):
    run, other = Run(cls, lazy, fused=fused), Run(cls, lazy, fused=fused, seed=1)
    run.train(range(4))
    full, since = run.full(), position(run.optimizer)
    other.load(full)
    freezing = [(4, False), (8, False), (12, True), (16, True), (20, False), (24, True)]
    for step, trains in freezing:
        run.net.table.weight.requires_grad_(trains)
        run.train(range(step, step + 4))
        since = save_changes(run.optimizer, tmp_path / f"{step}", since)
        apply_changes(other.optimizer, tmp_path / f"{step}")
        other.net.table.weight.requires_grad_(trains)
        assert_alike(run, other)
    for each in (run, other):
        each.train(range(30, 34))
        flush(each)
    assert_alike(run, other)


@every_road
@pytest.mark.parametrize("lazy", ["decay", "exact"])
def test_rows_of_several_dimensions_and_rows_divided_anew(lazy, fused, tmp_path):
    def make(seed):
        torch.manual_seed(seed)
        # In memory the second lies by columns.
        tables = [Parameter(torch.randn(20, 5, 3)), Parameter(torch.randn(5, 20).mT)]
        return tables, Tiger(tables, lr=0.01, lazy=lazy, fused=fused)

    def step(made, number, dims):
        generator = torch.Generator().manual_seed(number)
        for t in made[0]:
            dense = torch.zeros_like(t)
            where = torch.randint(t.shape[0], (3,), generator=generator)
            dense[where, torch.randint(5, (3,), generator=generator)] = 1.0 + number
            t.grad = dense.to_sparse(dims)
        made[1].step()

    def saved(made):
        return [t.detach() for t in made[0]], made[1].state_dict()

    run, other = make(0), make(1)
    for number in range(4):
        step(run, number, 2)
    for t, own in zip(run[0], other[0]):
        own.data.copy_(t)
    other[1].load_state_dict(run[1].state_dict())
    since = position(run[1])
    for k, dims in enumerate([2, 1, 1, 2]):
        for number in range(4 + 3 * k, 7 + 3 * k):
            step(run, number, dims)
        since = save_changes(run[1], tmp_path / "delta", since)
        apply_changes(other[1], tmp_path / "delta")
        assert same(saved(run), saved(other))
        header, _ = read_changes(tmp_path / "delta")
        rows = header["groups"][0]["parameters"][0]["rows"]
        assert (rows is not None) == (k in (0, 2))


def test_groups_and_parameters_added_since(tmp_path):
    run, other = Run(), Run(seed=1)
    run.train(range(4))
    other.load(run.full())
    since = position(run.optimizer)
    more = [nn.Embedding(30, 2, sparse=True), nn.Embedding(30, 2, sparse=True)]
    twins = copy.deepcopy(more)
    nn.init.zeros_(twins[0].weight)

    def train(run, more, steps):
        for step in steps:
            for table in more:
                table.zero_grad()
                table(torch.tensor([step, 20])).square().sum().backward()
            run.train([step])

    for each, tables in ((run, more), (other, twins)):
        each.optimizer.add_param_group({"params": [("more", tables[0].weight)], "lazy": "decay"})
    train(run, more[:1], range(4, 7))
    since = save_changes(run.optimizer, tmp_path / "1", since)
    apply_changes(other.optimizer, tmp_path / "1")
    for each, tables in ((run, more), (other, twins)):
        each.optimizer.param_groups[1]["params"].append(tables[1].weight)
        each.optimizer.param_groups[1]["param_names"].append("most")
    train(run, more, range(7, 9))
    save_changes(run.optimizer, tmp_path / "2", since)
    apply_changes(other.optimizer, tmp_path / "2")
    train(run, more, range(9, 12))
    train(other, twins, range(9, 12))
    assert_alike(run, other)
    assert same([t.weight for t in more], [t.weight for t in twins])


def test_options_changed_since_and_schedulers(tmp_path):
    run, other = Run(), Run(seed=1)
    schedulers = [
        torch.optim.lr_scheduler.OneCycleLR(each.optimizer, 0.02, 40, cycle_momentum=True)
        for each in (run, other)
    ]

    def train(run, scheduler, steps):
        for step in steps:
            run.optimizer.zero_grad()
            run.net(batch(step)).backward()
            run.optimizer.step()
            scheduler.step()

    train(run, schedulers[0], range(5))
    other.load(run.full())
    since = position(run.optimizer)
    run.optimizer.param_groups[0].update(weight_decay=0.3, name="tables", nonfinite="skip")
    train(run, schedulers[0], range(5, 12))
    save_changes(run.optimizer, tmp_path / "delta", since)
    apply_changes(other.optimizer, tmp_path / "delta")
    schedulers[1].load_state_dict(schedulers[0].state_dict())
    train(run, schedulers[0], range(12, 30))
    train(other, schedulers[1], range(12, 30))
    assert_alike(run, other)
    assert other.optimizer.param_groups[0]["name"] == "tables"


def test_a_group_that_leaves_its_lazy_mode_is_saved_whole(tmp_path):
    run, other = Run(), Run(seed=1)
    run.train(range(4))
    other.load(run.full())
    since = position(run.optimizer)
    for lazy in ("frozen", "frozen", "decay", "decay", "exact"):
        run.optimizer.param_groups[0]["lazy"] = lazy
        run.train(range(4, 7))
        since = save_changes(run.optimizer, tmp_path / "delta", since)
        apply_changes(other.optimizer, tmp_path / "delta")
        assert_alike(run, other)


def test_tensor_learning_rates_and_a_users_own_state(tmp_path):
    run, other = Run(), Run(seed=1)
    run.train(range(3))
    table = run.net.table.weight
    run.optimizer.state[table]["noted"] = {"seen": 3}
    run.optimizer.state[table]["scores"] = torch.arange(3.0)
    run.optimizer.state[table]["like"] = torch.ones(ROWS, dtype=torch.int16)
    other.load(run.full())
    since = position(run.optimizer)
    run.train(range(3, 5))
    run.optimizer.param_groups[0]["lr"] = torch.tensor(0.03)
    run.optimizer.state[table]["noted"] = {"seen": 5}
    run.optimizer.state[table]["like"][7] = 5
    run.optimizer.state[table]["scores"] = torch.arange(4.0)
    save_changes(run.optimizer, tmp_path / "delta", since)
    apply_changes(other.optimizer, tmp_path / "delta")
    assert_alike(run, other)
    assert isinstance(other.optimizer.param_groups[0]["lr"], torch.Tensor)


# -------------------------------------------------------------------------------------- positions


def test_a_position_may_be_kept_as_json(tmp_path):
    run, other = Run(), Run(seed=1)
    run.train(range(4))
    other.load(run.full())
    since = json.loads(json.dumps(position(run.optimizer)))
    run.train(range(4, 8))
    since = json.loads(json.dumps(save_changes(run.optimizer, tmp_path / "1", since)))
    apply_changes(other.optimizer, tmp_path / "1")
    # The restored run goes on, from where the other one was saved.
    other.train(range(8, 9))
    save_changes(other.optimizer, tmp_path / "2", since)
    apply_changes(run.optimizer, tmp_path / "2")
    assert_alike(run, other)


@every_mode
@between
def test_steps_are_enough_where_one_group_counts_them(cls, lazy, event, tmp_path):
    run, other = Run(cls, lazy), Run(cls, lazy, seed=1)
    for each in (run, other):
        dense = {"params": [("dense", Parameter(torch.ones(3)))], "lazy": "frozen"}
        each.optimizer.add_param_group(dense)
    run.train(range(5))
    other.load(run.full())
    event(run)
    run.train(range(5, 8))
    since = save_changes(run.optimizer, tmp_path / "1", 5)
    event(run)
    run.train(range(8, 10))
    save_changes(run.optimizer, tmp_path / "2", 8)
    with pytest.raises(CheckpointError, match="counts from step 8 of group 0, which is at step 5"):
        apply_changes(other.optimizer, tmp_path / "2")
    assert apply_changes(other.optimizer, tmp_path / "1")["groups"][0]["steps"] == 8
    apply_changes(other.optimizer, tmp_path / "2")
    assert_alike(run, other)
    assert since["groups"][0]["steps"] == 8


def test_all_since_the_beginning_goes_into_a_fresh_optimizer(tmp_path):
    run, other = Run(), Run(seed=1)
    run.train(range(5))
    save_changes(run.optimizer, tmp_path / "all", 0)
    apply_changes(other.optimizer, tmp_path / "all")
    assert_alike(run, other)


def two_lazy_groups(run):
    run.optimizer.add_param_group({"params": [("more", Parameter(torch.ones(3)))]})
    return 3


def later(run):
    since = position(run.optimizer)
    since["groups"][0]["steps"] += 1
    return since


def of_two_groups(run):
    since = position(run.optimizer)
    return {**since, "groups": since["groups"] * 2}


def of_adamw(run):
    return position(Run(AdamW, "decay").optimizer)


def resized(run):
    since = position(run.optimizer)
    run.net.table.weight.data = torch.randn(ROWS + 3, DIM)
    del run.optimizer.state[run.net.table.weight]
    return since


def rolled_back(run):
    full = run.full()
    run.train(range(4, 8))
    since = position(run.optimizer)
    run.load(full)
    run.train(range(4, 20))
    return since


def unsaveable(run):
    run.optimizer.param_groups[0]["custom"] = random.Random(0)
    return position(run.optimizer)


WRONG_SINCE = {
    "None": (lambda run: None, TypeError, "since is a NoneType, expected what position"),
    "True": (lambda run: True, TypeError, "since is a bool"),
    "a float": (lambda run: 3.0, TypeError, "since is a float"),
    "-1": (lambda run: -1, ValueError, "since=-1: expected 0 to 4"),
    "too many steps": (lambda run: 5, ValueError, "since=5: expected 0 to 4, the steps that group"),
    "two clocks": (two_lazy_groups, ValueError, "since=3, but 2 groups are in a lazy mode"),
    "another dict": (lambda run: {"steps": 3}, ValueError, "since has format None"),
    "later": (later, ValueError, "since is at step 5 of group 0, which has taken 4"),
    "two groups": (of_two_groups, ValueError, "with 2 groups, this one has 1"),
    "another algorithm": (of_adamw, ValueError, "4 parameters of adamw in group 0, expected 4 of"),
    "resized": (resized, ValueError, r"'table.weight' .* is torch.float32 \[303, 4\], but since"),
    "rolled back": (rolled_back, ValueError, "since is at step 8 of group 0, where this optimizer"),
    "a value": (unsaveable, ValueError, "a value that cannot be saved for torch.load"),
}


@pytest.mark.parametrize("since,error,says", WRONG_SINCE.values(), ids=WRONG_SINCE)
def test_a_since_that_does_not_fit_is_refused(since, error, says, tmp_path):
    run = Run()
    run.train(range(4))
    wrong = since(run)
    with pytest.raises(error, match=says):
        save_changes(run.optimizer, tmp_path / "delta", wrong)
    assert os.listdir(tmp_path) == []


def test_other_optimizers_are_refused(tmp_path):
    sgd = torch.optim.SGD([Parameter(torch.ones(3))], lr=0.1)
    with pytest.raises(TypeError, match="got a SGD, expected a Tiger, Lion or AdamW"):
        save_changes(sgd, tmp_path / "delta", 0)
    with pytest.raises(ValueError, match=r"position 0.* is on the device meta, expected data"):
        position(Tiger([Parameter(torch.ones(3, device="meta"))]))
