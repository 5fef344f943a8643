# SPDX-License-Identifier: Apache-2.0
"""Delta checkpoints: a full one and its deltas give back the run bit by bit, or are refused."""

import contextlib
import copy
import io
import json
import os
import pickle
import random

import pytest
import torch
from cases import clock_of
from oracle import same_bits
from test_interrupts import Interrupt, interrupt_at
from torch import nn
from torch.nn import Parameter

from tiger_ext import AdamW, Lion, Tiger, change_file
from tiger_ext.change_file import Source, read_changes, write_changes
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

    ``event`` comes directly after each save, and before one of them.
    """
    run.train(range(steps))
    full, since = run.full(), position(run.optimizer)
    paths = []
    for k in range(1, deltas + 1):
        event(run)
        run.train(range(steps * k, steps * (k + 1)))
        if k == 2:
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


def random_event(run, generator, step):
    """Do one thing of a training's life."""
    optimizer, table = run.optimizer, run.net.table
    kind = generator.choice(["train"] * 6 + ["read", "flush", "close", "freeze", "clear", "edit"])
    if kind == "train":
        run.train([step])
    elif kind == "read":
        start = generator.randrange(ROWS - 30)
        with torch.no_grad():
            run.net(torch.arange(start, start + 30))
    elif kind == "flush":
        optimizer.flush()
    elif kind == "close":
        optimizer.close_window()
    elif kind == "freeze":
        table.weight.requires_grad_(not table.weight.requires_grad)
    elif kind == "clear" and not clock_of(optimizer).micro_steps:
        optimizer.state.pop(generator.choice([*run.net.parameters()]), None)
    elif kind == "edit" and generator.random() < 0.3:
        with torch.no_grad():
            table.weight[generator.randrange(ROWS)] += 1


# ------------------------------------------------------------------------------- the same bits


RANDOM = {
    "tiger-decay": (Tiger, dict(lazy="decay", nonfinite="shrink")),
    "tiger-exact": (Tiger, dict(lazy="exact")),
    "windows": (Tiger, dict(lazy="exact", accumulation_steps=3)),
    "strided": (Tiger, dict(lazy="decay", sparse=False, rows="nonzero", accumulation_steps=2)),
    "tracked": (Lion, dict(lazy="exact", sparse=False, rows="tracked")),
    "dense": (AdamW, dict(lazy="decay", sparse=False)),
    "adamw": (AdamW, dict(lazy="decay", dtype=torch.bfloat16)),
    "rmsprop": (AdamW, dict(lazy="decay", betas=(0.0, 0.99))),
}


@every_road
@pytest.mark.filterwarnings("ignore:.*was written to by others")
@pytest.mark.parametrize("cls,options", RANDOM.values(), ids=RANDOM)
@pytest.mark.parametrize("seed", [0, 1, 2, 25])
def test_whatever_happens_between_deltas(cls, options, fused, seed, tmp_path):
    generator = random.Random(seed)
    run, other = (Run(cls, seed=k, fused=fused, **options) for k in (0, 1))
    # Only what is saved tells the other one what happened.
    run.train(range(seed))
    other.load(run.full())
    since = position(run.optimizer)
    for step in range(40):
        random_event(run, generator, step)
        if generator.random() < 0.3:
            since = save_changes(run.optimizer, tmp_path / "delta", since)
            apply_changes(other.optimizer, tmp_path / "delta")
            assert_alike(run, other)
            other.net.table.weight.requires_grad_(run.net.table.weight.requires_grad)
            if generator.random() < 0.3:
                run, other = other, run


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
@pytest.mark.parametrize("lazy", ["decay", "exact"])
def test_a_window_that_was_open_and_still_is(lazy, fused, tmp_path):
    options = dict(fused=fused, accumulation_steps=4)
    run, other = Run(Tiger, lazy, **options), Run(Tiger, lazy, seed=1, **options)
    run.train(range(5))
    run.optimizer.flush()
    other.load(run.full())
    since = position(run.optimizer)
    for step in range(5, 7):
        run.train([step])
        since = save_changes(run.optimizer, tmp_path / "delta", since)
        assert rows_in(tmp_path / "delta") <= 18
        apply_changes(other.optimizer, tmp_path / "delta")
        assert_alike(run, other)
    for each in (run, other):
        each.optimizer.close_window()
    assert_alike(run, other)


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


def test_tables_that_their_module_writes_to_are_saved_whole(tmp_path):
    run, other = Run(), Run(seed=1)
    run.net.table.max_norm = other.net.table.max_norm = 0.5
    run.optimizer.track(run.net.table)
    run.train(range(5))
    run.optimizer.flush()
    other.load(run.full())
    since = position(run.optimizer)
    read(run)
    save_changes(run.optimizer, tmp_path / "delta", since)
    assert rows_in(tmp_path / "delta") == ROWS
    apply_changes(other.optimizer, tmp_path / "delta")
    assert_alike(run, other)


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
def test_state_that_is_cleared_after_a_delta_begins_anew(cls, lazy, tmp_path):
    run, other = Run(cls, lazy), Run(cls, lazy, seed=1)
    run.train(range(5))
    other.load(run.full())
    since = position(run.optimizer)
    run.train(range(5, 9))
    save_changes(run.optimizer, tmp_path / "delta", since)
    apply_changes(other.optimizer, tmp_path / "delta")
    for each in (run, other):
        del each.optimizer.state[each.net.table.weight]
        each.train(range(9, 12))
        flush(each)
    assert_alike(run, other)


def test_rows_that_a_delta_leaves_behind_are_brought_up_to_date_when_read(tmp_path):
    run, other = Run(), Run(seed=1)
    run.train(range(5))
    run.optimizer.flush()
    other.load(run.full())
    other.optimizer.flush()  # all of its rows are known to be current
    since = position(run.optimizer)
    run.train(range(5, 9))
    save_changes(run.optimizer, tmp_path / "delta", since)
    apply_changes(other.optimizer, tmp_path / "delta")
    for each in (run, other):
        read(each)
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


@pytest.mark.filterwarnings("ignore:.*was written to by others")
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


@pytest.mark.parametrize("steps", [0, 6])
def test_asking_for_the_position_changes_nothing(steps, tmp_path):
    for options in ({}, {"accumulation_steps": 4}):
        run, other, asked = (Run(seed=seed, **options) for seed in range(3))
        run.train(range(steps))
        for each in (other, asked):
            each.load(run.full())
        position(asked.optimizer)
        for each in (run, other, asked):
            if options:
                each.optimizer.close_window()
            each.train(range(steps, steps + 5))
        assert_alike(run, other)
        assert_alike(run, asked)


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


# --------------------------------------------------------------------------------------- refusals


@pytest.fixture
def chain(tmp_path):
    """Return a run, another one where its full save was loaded, and three deltas that follow."""
    run, other = Run(), Run(seed=1)
    run.train(range(5))
    other.load(run.full())
    since, paths = position(run.optimizer), []
    for k in range(1, 4):
        run.train(range(5 * k, 5 * k + 5))
        paths.append(tmp_path / f"delta{k}")
        since = save_changes(run.optimizer, paths[-1], since)
    return run, other, paths


def refuse(other, path, says):
    """Check that a file is refused with a sentence that names it, and that nothing has changed."""
    before = other.everything()
    with pytest.raises(CheckpointError, match=says) as caught:
        apply_changes(other.optimizer, path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)
    assert same(other.everything(), before)


def test_missing_deltas_and_a_wrong_order_are_refused(chain):
    run, other, paths = chain
    missing = "does not follow on, it leads from step 10 to 15: group 0 is at 5 steps, expected 10"
    refuse(other, paths[1], missing)
    refuse(other, paths[2], "group 0 is at 5 steps, expected 15")
    apply_changes(other.optimizer, paths[0])
    refuse(other, paths[0], "has been applied already")
    refuse(other, paths[2], "group 0 is at 10 steps, expected 15")
    apply_changes(other.optimizer, paths[1])
    refuse(other, paths[0], "group 0 is at 15 steps, expected 5")
    apply_changes(other.optimizer, paths[2])
    assert_alike(run, other)


def test_a_run_that_went_on_is_not_where_a_delta_counts_from(chain):
    _run, other, paths = chain
    twin = copy.deepcopy(other)
    read(other)
    refuse(other, paths[0], "has had other rows touched: its last_step is another")
    twin.train([77])
    refuse(twin, paths[0], "group 0 is at 6 steps, expected 5")


def test_a_delta_without_a_step_may_be_applied_twice(chain, tmp_path):
    run, _, _ = chain
    save_changes(run.optimizer, tmp_path / "none", position(run.optimizer))
    before = run.everything()
    for _ in range(2):
        apply_changes(run.optimizer, tmp_path / "none")
        assert same(run.everything(), before)


def other_batches(other):
    other.optimizer.load_state_dict(Run().optimizer.state_dict())
    other.train(range(50, 55))


def fresh_weights(other):
    other.net.table.weight.data = torch.randn(ROWS, DIM)


def fresh_head(other):
    other.net.head.weight.data = torch.randn(3, DIM)


def other_momentum(other):
    other.optimizer.state[other.net.other.weight]["exp_avg"].mul_(2)


def other_history(other):
    for number in (0.5, 1.0):
        saved = other.optimizer.state_dict()
        saved["param_groups"][0]["history"] = f"5.0 0.0 1.0 {number} 0.1 0.9 0.9"
        other.optimizer.load_state_dict(saved)


def other_option(other):
    other.optimizer.param_groups[0]["nonfinite"] = "skip"


def frozen_mode(other):
    other.optimizer.param_groups[0]["lazy"] = "frozen"


OTHER_RUNS = {
    "other batches": (other_batches, "has had other (rows touched|hyperparameters)"),
    "weights not loaded": (fresh_weights, r"parameter \(group 0, position 0\) or its state has"),
    "head not loaded": (fresh_head, r"parameter \(group 0, position 2\) or its state has other"),
    "another momentum": (other_momentum, r"parameter \(group 0, position 1\) or its state has"),
    "another history": (other_history, "group 0 has had other hyperparameters in its steps"),
    "another option": (other_option, "group 0 has nonfinite='skip', expected 'propagate'"),
    "another mode": (frozen_mode, "group 0 is at None steps, expected 5"),
}


@pytest.mark.parametrize("change,says", OTHER_RUNS.values(), ids=OTHER_RUNS)
def test_deltas_of_another_run_are_refused(change, says, chain):
    _, other, paths = chain
    change(other)
    refuse(other, paths[0], says)


class Renamed(Run):
    """A run whose optimizer has other names, shapes, groups or algorithms."""

    def __init__(self, cls=Tiger, *, first=(ROWS, DIM), name="table.weight", more=(), dtype=None):
        torch.manual_seed(0)
        shapes = [first, (ROWS // 2, DIM), (3, DIM), (3,)]
        names = [name, "other.weight", "head.weight", "head.bias"]
        params = [Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes]
        self.net = nn.ParameterList(params)
        self.optimizer = cls([*zip(names, params), *more], lr=0.01, weight_decay=0.1, lazy="decay")


def of_two(made):
    made.optimizer.add_param_group({"params": [("x", Parameter(torch.ones(3)))]})
    return made


OTHERS = {
    "a name": (lambda: Renamed(name="words"), "has a parameter 'table.weight', expected.*'words'"),
    "a shape": (
        lambda: Renamed(first=(ROWS + 1, DIM)),
        r"'table.weight'.*: has torch.float32 of shape \[300, 4\], the optimizer torch.float32 of",
    ),
    "a dtype": (
        lambda: Renamed(dtype=torch.float64),
        r"has torch.float32 of shape \[300, 4\], the optimizer torch.float64 of shape \[300, 4\]",
    ),
    "an algorithm": (lambda: Renamed(AdamW), "has 'tiger' in group 0, expected 'adamw'"),
    "groups": (lambda: of_two(Renamed()), "has 1 parameter groups, the optimizer has 2"),
    "parameters": (
        lambda: Renamed(more=[("x", Parameter(torch.ones(3)))]),
        "has 4 parameters in group 0, the optimizer has 5",
    ),
}


@pytest.mark.parametrize("make,says", OTHERS.values(), ids=OTHERS)
def test_deltas_of_another_optimizer_are_refused(make, says, chain):
    refuse(make(), chain[2][0], says)


def test_a_delta_of_steps_alone_needs_the_state_that_it_has_rows_of(tmp_path):
    run, other = Run(), Run(seed=1)
    run.train(range(5))
    save_changes(run.optimizer, tmp_path / "delta", 2)
    steps = other.optimizer.state_dict()
    steps["param_groups"][0]["history"] = "2.0 0.0 1.0 0.01 0.1 0.9 0.9"
    other.optimizer.load_state_dict(steps)
    refuse(other, tmp_path / "delta", "the optimizer lacks parameter 'table.weight'.*: exp_avg")


def test_files_that_were_cut_are_refused(chain, tmp_path):
    _, other, paths = chain
    whole = paths[0].read_bytes()
    generator = random.Random(1)
    lengths = [0, 1, 15, 16, 31, 32, 40, *(generator.randrange(len(whole)) for _ in range(60))]
    for length in [*lengths, len(whole) - 32, len(whole) - 1]:
        (tmp_path / "cut").write_bytes(whole[:length])
        refuse(other, tmp_path / "cut", "is damaged|is empty|is no file of save_changes")
    (tmp_path / "cut").write_bytes(whole + b"\0")
    refuse(other, tmp_path / "cut", f"it has {len(whole) + 1} bytes, expected {len(whole)}")


def test_files_with_a_flipped_bit_are_refused(chain, tmp_path):
    _, other, paths = chain
    whole = paths[0].read_bytes()
    generator = random.Random(2)
    places = [*range(40), *range(len(whole) - 40, len(whole))]
    for place in [*places, *(generator.randrange(len(whole)) for _ in range(200))]:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << generator.randrange(8)
        (tmp_path / "flipped").write_bytes(damaged)
        refuse(other, tmp_path / "flipped", "is damaged|is no file of save_changes")


def test_what_is_no_delta_is_refused(chain, tmp_path):
    _, other, _ = chain
    (tmp_path / "text").write_text("no delta, and longer than what a delta begins with")
    refuse(other, tmp_path / "text", "is no file of save_changes: it begins b'no delta, and lo'")
    torch.save(other.optimizer.state_dict(), tmp_path / "full")
    refuse(other, tmp_path / "full", "is no file of save_changes: it begins b'PK")
    refuse(other, tmp_path, "is a directory, expected a file")
    with pytest.raises(FileNotFoundError):
        apply_changes(other.optimizer, tmp_path / "none")


def rewrite(path, edit):
    """Write a file anew, with a checksum that fits, after an edit of header and tensors."""
    header, tensors = read_changes(path)
    tensors = [t.clone() for t in tensors]
    edit(header, header["groups"][0]["parameters"][0], tensors)
    del header["tensors"], header["byteorder"]
    write_changes(str(path), header, [Source(t) for t in tensors])


def edit_tensor(name, change):
    def edit(header, table, tensors):
        if name == "ids":
            place = table["rows"]["ids"]
        else:
            place = table["parameter"] if name == "p" else table["state"][name]["tensor"]
        tensors[place] = change(tensors[place])

    return edit


class Trap:
    """What a pickle would call."""

    def __reduce__(self):
        return os.mkdir, ("trap",)


CRAFTED = {
    "rows that fall": (edit_tensor("ids", lambda t: t.flip(0)), "has rows that do not rise from 0"),
    "a row twice": (edit_tensor("ids", lambda t: t // 2 * 2), "has rows that do not rise from 0"),
    "rows out of range": (edit_tensor("ids", lambda t: t + ROWS), "do not rise from 0 to 300"),
    "rows below 0": (edit_tensor("ids", lambda t: t - ROWS), "do not rise from 0 to 300"),
    "clocks ahead": (
        edit_tensor("last_step", lambda t: t + 9),
        "last_step: goes from .* to 19, expected clocks from -11 to 10",
    ),
    "fewer rows": (edit_tensor("exp_avg", lambda t: t[1:]), "exp_avg: has torch.float32 of shape"),
    "another dtype": (edit_tensor("p", lambda t: t.double()), "has torch.float64 of shape"),
    "a history": (
        lambda h, p, t: h["groups"][0].update(history="1 2 3"),
        "group 0: history: got '1 2 3', expected finite numbers",
    ),
    "an option": (lambda h, p, t: h["groups"][0].update(lr=-1.0), "group 0: lr=-1.0: expected a"),
    "no parameters": (lambda h, p, t: h["groups"][0].pop("parameters"), "is malformed: KeyError"),
    "a place": (lambda h, p, t: p.update(parameter=1000), "is malformed: IndexError"),
    "a format": (lambda h, p, t: h.update(format=2), "has format 2, expected 1"),
}


@pytest.mark.parametrize("edit,says", CRAFTED.values(), ids=CRAFTED)
def test_crafted_files_are_refused(edit, says, chain):
    _, other, paths = chain
    rewrite(paths[0], edit)
    refuse(other, paths[0], says)


def test_windows_of_crafted_files_are_refused(tmp_path):
    run, other = (Run(accumulation_steps=3, seed=seed) for seed in (0, 1))
    run.train(range(5))
    other.load(run.full())
    since = position(run.optimizer)
    run.train(range(5, 8))
    for name, change, says in (
        ("window", lambda t: t + 5, "window: goes from .* expected numbers from 0 to 3"),
        (
            "window_rows",
            lambda t: t + ROWS,
            "window_rows: goes from .* expected rows from 0 to 299",
        ),
        ("window_rows", lambda t: t.repeat(2, 1), r"has shape .* expected \[1, entries\]"),
        ("window_rows", lambda t: t.int(), "has torch.int32, expected torch.int64"),
    ):
        save_changes(run.optimizer, tmp_path / "delta", since)
        rewrite(tmp_path / "delta", edit_tensor(name, change))
        refuse(other, tmp_path / "delta", says)


def test_a_header_runs_no_code(chain, tmp_path, monkeypatch):
    _, other, paths = chain

    def unchecked(header):
        file = io.BytesIO()
        torch.save(header, file)
        return file.getvalue()

    monkeypatch.setattr(change_file, "_serialized", unchecked)
    monkeypatch.chdir(tmp_path)
    rewrite(paths[0], lambda header, *_: header.update(trap=Trap()))
    refuse(other, paths[0], "cannot be read: UnpicklingError")
    assert not (tmp_path / "trap").exists()


# ---------------------------------------------------------------------------- whole or not at all


def test_interrupted_before_any_line_changes_are_applied_whole_or_not(chain):
    _, other, paths = chain
    full, before = other.full(), other.everything()
    apply_changes(other.optimizer, paths[0])
    after, count, seen = other.everything(), 1, None
    found = set()
    while seen is None or seen["raised"]:
        other.load(full)
        with interrupt_at(count) as seen, contextlib.suppress(Interrupt):
            apply_changes(other.optimizer, paths[0])
        now = other.everything()
        found.add(same(now, after))
        assert same(now, before) or same(now, after), count
        count += 7
    assert found == {False, True} and count > 300


def test_an_interrupted_save_leaves_what_was_there(chain):
    run, _other, paths = chain
    there = paths[0].read_bytes()
    since = position(run.optimizer)
    run.train(range(40, 43))
    count, interrupted = 1, 0
    while True:
        with interrupt_at(count) as seen, contextlib.suppress(Interrupt):
            save_changes(run.optimizer, paths[0], since)
        if not seen["raised"]:
            break
        interrupted += paths[0].read_bytes() == there
        assert sorted(os.listdir(paths[0].parent)) == ["delta1", "delta2", "delta3"]
        count += 31
    assert interrupted > 10
    assert paths[0].read_bytes() != there


def test_a_save_that_fails_leaves_what_was_there(chain, monkeypatch):
    run, _, paths = chain
    there = paths[0].read_bytes()
    since = position(run.optimizer)
    run.train(range(40, 43))

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_changes(run.optimizer, paths[0], since)
    assert paths[0].read_bytes() == there and len(os.listdir(paths[0].parent)) == 3


def test_a_file_has_the_rights_of_other_files_and_goes_through_links(chain, tmp_path):
    run, other, paths = chain
    (tmp_path / "plain").write_bytes(b"")
    (tmp_path / "link").symlink_to(paths[0])
    since = position(run.optimizer)
    run.train(range(40, 43))
    save_changes(run.optimizer, tmp_path / "link", since)
    assert (tmp_path / "link").is_symlink()
    assert paths[0].stat().st_mode == (tmp_path / "plain").stat().st_mode
    refuse(other, paths[0], "group 0 is at 5 steps, expected 20")


PROGRAM = """
import os, torch
from test_changes import Run, apply_changes, position, save_changes

folder, kill_at = os.environ["FOLDER"], int(os.environ["KILL_AT"])
run = Run(seed=int(os.environ["SEED"]))
full = os.path.join(folder, "full.pt")
step, since = 0, None
if os.path.exists(full):
    run.load(torch.load(full, weights_only=True))
    step, since = 4, position(run.optimizer)
    while os.path.exists(os.path.join(folder, f"delta{step + 4}")):
        step += 4
        since = apply_changes(run.optimizer, os.path.join(folder, f"delta{step}"))
print("from", step)
if kill_at:  # while a file is half written
    replace = os.replace
    def killed(source, target):
        if target.endswith(f"delta{kill_at}"):
            with open(source, "r+b") as file:
                file.truncate(1000)
            os._exit(9)
        replace(source, target)
    os.replace = killed
while step < 20:
    run.train(range(step, step + 4))
    step += 4
    if since is None:
        torch.save(run.full(), full)
        since = position(run.optimizer)
    else:
        since = save_changes(run.optimizer, os.path.join(folder, f"delta{step}"), since)
torch.save(run.everything(), os.path.join(folder, f"end{os.environ['SEED']}"))
"""


def test_killed_and_restored_a_run_ends_the_same_bit_by_bit(run_python, tmp_path):
    (tmp_path / "killed").mkdir()
    (tmp_path / "whole").mkdir()
    killed = dict(FOLDER=str(tmp_path / "killed"))
    result = run_python(PROGRAM, check=False, KILL_AT="12", SEED="0", **killed)
    assert result.returncode == 9, result.stderr
    result = run_python(PROGRAM, check=False, KILL_AT="20", SEED="1", **killed)
    assert (result.returncode, result.stdout) == (9, "from 8\n"), result.stderr
    assert run_python(PROGRAM, KILL_AT="0", SEED="2", **killed).stdout == "from 16\n"
    run_python(PROGRAM, KILL_AT="0", SEED="0", FOLDER=str(tmp_path / "whole"))
    ends = [tmp_path / "killed" / "end2", tmp_path / "whole" / "end0"]
    assert same(*(torch.load(end, weights_only=True) for end in ends))
    left = [name for name in os.listdir(tmp_path / "killed") if name.endswith(".tmp")]
    assert len(left) == 2


def trained(steps, optimizer, p):
    for k in steps:
        p.grad = torch.sparse_coo_tensor([[k % 9]], torch.ones(1, 4), (9, 4))
        optimizer.step()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda opt: pickle.loads(pickle.dumps(opt))])
def test_a_delta_of_a_copy_does_not_follow_on(tmp_path, copied):
    p = Parameter(torch.randn(9, 4))
    optimizer = Tiger([p], lazy="decay", weight_decay=0.1)
    trained(range(5), optimizer, p)
    twin = copied(optimizer)
    (q,) = twin.param_groups[0]["params"]
    trained(range(5, 10), optimizer, p)
    full, weights, since = (
        copy.deepcopy(optimizer.state_dict()),
        p.detach().clone(),
        position(optimizer),
    )
    trained(range(7, 16), twin, q)
    with pytest.raises(ValueError, match="since"):
        save_changes(twin, tmp_path / "delta", since)
    # Its own positions are good.
    trained(range(16, 18), twin, q)
    own = position(twin)
    trained(range(18, 20), twin, q)
    save_changes(twin, tmp_path / "delta", own)
    other = Tiger([Parameter(weights)], lazy="decay", weight_decay=0.1)
    other.load_state_dict(full)
    with pytest.raises(CheckpointError):
        apply_changes(other, tmp_path / "delta")


def test_state_of_a_users_own_is_saved_whole_whatever_it_is_called(tmp_path):
    p = Parameter(torch.randn(9, 4))
    optimizer = Tiger([p], lazy="decay", weight_decay=0.1)
    trained(range(9), optimizer, p)
    optimizer.state[p]["exp_avg_ema"] = torch.zeros(9)
    optimizer.state[p]["exp_avg_note"] = "mine"
    full, q, since = (
        copy.deepcopy(optimizer.state_dict()),
        Parameter(p.detach().clone()),
        position(optimizer),
    )
    trained(range(2), optimizer, p)
    optimizer.state[p]["exp_avg_ema"].copy_(torch.arange(9.0))
    save_changes(optimizer, tmp_path / "delta", since)
    other = Tiger([q], lazy="decay", weight_decay=0.1)
    other.load_state_dict(full)
    apply_changes(other, tmp_path / "delta")
    assert torch.equal(other.state[q]["exp_avg_ema"], torch.arange(9.0))
    assert other.state[q]["exp_avg_note"] == "mine"
