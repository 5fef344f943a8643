# SPDX-License-Identifier: Apache-2.0
"""State dicts that do not fit are refused whole: by name, before anything has changed."""

import copy
import io
import math
import subprocess
import sys

import pytest
import torch
from cases import clock_of
from oracle import same_bits
from torch import nn
from torch.nn import Parameter

from tiger_ext import AdamW, Lion, Tiger

ROWS, DIM = 5, 3


def trained(cls=Tiger, **options):
    """Return an optimizer after some steps, in an open window if there are any."""
    torch.manual_seed(0)
    table, bias = Parameter(torch.randn(ROWS, DIM)), Parameter(torch.randn(DIM))
    optimizer = cls([("table", table), ("bias", bias)], lr=0.01, weight_decay=0.1, **options)
    for step in range(4):
        table.grad = torch.sparse_coo_tensor(
            torch.tensor([[step, 1]]), torch.randn(2, DIM), table.shape
        )
        bias.grad = torch.randn(DIM)
        optimizer.step()
    return optimizer


def everything(optimizer):
    """Return all that a step would go on from."""
    saved = optimizer.state_dict()
    params = [p.detach().clone() for g in optimizer.param_groups for p in g["params"]]
    return copy.deepcopy((params, saved["state"], saved["param_groups"]))


def assert_equal(a, b):
    if isinstance(a, torch.Tensor):
        assert same_bits(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_equal(x, y)
    else:
        assert a == b


def group(key, value):
    return lambda saved: saved["param_groups"][0].update({key: value})


def foreign(key, value):
    def change(saved):
        del saved["param_groups"][0]["algorithm"]
        saved["param_groups"][0][key] = value

    return change


def state(key, value):
    return lambda saved: saved["state"][0].update({key: value})


HISTORY = "4 0 1 0.01 0.1 0.9 0.9"
LAZY = {"lazy": "exact"}
WINDOW = {"lazy": "decay", "accumulation_steps": 3}
# name: options, what is changed, what the message says
MISFITS = {
    "another algorithm": (
        {},
        group("algorithm", "lion"),
        r"group 0: algorithm: got 'lion', .*'tiger'",
    ),
    "two betas": ({}, group("betas", (0.9, 0.99)), r"group 0: betas=\(0.9, 0.99\): tiger expects"),
    "a beta of 1": ({}, group("betas", (1.0,)), "group 0: betas"),
    "an option of others": ({}, group("eps", 1e-8), "group 0: eps: got 1e-08, .* no such option"),
    "amsgrad": ({}, foreign("amsgrad", True), "group 0: amsgrad: got True, expected False"),
    "nesterov": ({}, foreign("nesterov", True), "group 0: nesterov"),
    "coupled decay": (
        {},
        foreign("decoupled_weight_decay", False),
        "group 0: decoupled_weight_decay",
    ),
    "a rate of NaN": ({}, group("lr", math.nan), "group 0: lr=nan"),
    "a decay that is text": ({}, group("weight_decay", "0.1"), "group 0: weight_decay='0.1'"),
    "an unknown lazy": ({}, group("lazy", "often"), "group 0: lazy='often'"),
    "lr * decay of 1": (LAZY, group("weight_decay", 100.0), r"group 0: .* lr \* weight_decay < 1"),
    "scale in a lazy mode": (LAZY, group("scale", "rms"), "group 0: lazy='exact' needs scale=None"),
    "history of numbers cut": (LAZY, group("history", "4 0 1"), "group 0: history: got '4 0 1'"),
    "history of NaN": (LAZY, group("history", "nan 0"), "group 0: history: got 'nan 0'"),
    "history with an Inf": (LAZY, group("history", HISTORY.replace("0.01", "inf")), "history"),
    "history of words": (LAZY, group("history", "once upon a time"), "history: .* numbers"),
    "history that is a number": (LAZY, group("history", 7), "history: got 7"),
    "history with rate 1": (LAZY, group("history", HISTORY.replace("0.01", "10")), "history"),
    "history with beta 1": (LAZY, group("history", "4 0 1 0.01 0.1 0.9 1"), "history"),
    "history going back": (LAZY, group("history", "4 5"), "history: .* begin <= steps"),
    "history of halves": (LAZY, group("history", "4.5 0"), "history: .* whole numbers"),
    "history too long": (LAZY, group("history", "4294967296 0"), "history: .* 2147483647"),
    "settings out of order": (
        LAZY,
        group("history", "4 0 2 0.01 0.1 0.9 0.9 1 0.01 0.1 0.9 0.9"),
        "history: .* rise",
    ),
    "no history": (LAZY, group("history", ""), r"'table' .* last_step: got .* clocks from -1 to 0"),
    "windows below 0": (WINDOW, group("windows", -1), "group 0: windows: got -1"),
    "windows beyond": (WINDOW, group("windows", 2**31), "group 0: windows: got 2147483648"),
    "micro-steps below 0": (WINDOW, group("micro_steps", -3), "group 0: micro_steps: got -3"),
    "half a window": (WINDOW, group("windows", 0.5), "group 0: windows: got 0.5"),
    "a clock in the future": (
        LAZY,
        state("last_step", torch.tensor([1, 2, 3, 4, 5])),
        r"parameter 'table' \(group 0, position 0\): last_step: got \[1, 5\], .* from -5 to 4",
    ),
    "a clock before the start": (
        LAZY,
        state("last_step", torch.tensor([1, 2, 3, 4, -6])),
        r"last_step: got \[-6, 4\]",
    ),
    "clocks of other rows": (
        LAZY,
        state("last_step", torch.zeros(4).int()),
        r"got \[4\], .* \[5, 3\]",
    ),
    "clocks that are floats": (
        LAZY,
        state("last_step", torch.zeros(5)),
        "last_step: got torch.float32",
    ),
    "a sparse clock": (
        LAZY,
        state("last_step", torch.zeros(5).int().to_sparse()),
        "torch.sparse_coo",
    ),
    "a clock that is a number": (LAZY, state("last_step", 3), "last_step: got 'int', .* a tensor"),
    "a clock beyond 32 bits": (LAZY, state("last_step", torch.full((5,), 2**40)), "32 bits"),
    "one clock beside windows of rows": (
        WINDOW,
        state("last_step", torch.zeros((), dtype=torch.int32)),
        r"last_step: got \[\], expected the first dimensions of \[5, 3\]",
    ),
    "rows of a window that are none": (
        WINDOW,
        state("window_rows", torch.tensor([[0, 5]])),
        r"window_rows: got \[0, 5\], expected rows from 0 to 4",
    ),
    "rows of a window below 0": (WINDOW, state("window_rows", torch.tensor([[-1]])), "window_rows"),
    "rows of a window of another width": (
        WINDOW,
        state("window_rows", torch.tensor([[1], [1]])),
        r"window_rows: got \[2, 1\], expected \[1, entries\]",
    ),
    "a window's rows as text": (WINDOW, state("window_rows", "1"), "window_rows: got 'str'"),
    "a window in the future": (WINDOW, state("window", torch.full((5,), 7)), "from 0 to 2"),
    "a window below 0": (WINDOW, state("window", torch.full((5,), -1)), "window: got"),
    "a momentum of another shape": (
        {},
        state("exp_avg", torch.ones(3, 5)),
        r"got \[3, 5\], .*\[5, 3\]",
    ),
    "a momentum of integers": ({}, state("exp_avg", torch.ones(5, 3).long()), "got torch.int64"),
    "a sparse momentum": ({}, state("exp_avg", torch.ones(5, 3).to_sparse()), "exp_avg: got"),
    "a momentum without data": ({}, state("exp_avg", torch.ones(5, 3, device="meta")), "meta"),
    "a momentum that is a number": (
        {},
        state("exp_avg", 3.0),
        "exp_avg: got 3.0, expected a tensor",
    ),
    "a momentum that is a list": (
        {},
        state("exp_avg", [[1.0]]),
        "exp_avg: got .*, expected a tensor",
    ),
    "one clock for a table": (
        LAZY,
        state("last_step", torch.zeros((), dtype=torch.int32)),
        r"last_step: got \[\], expected the first dimensions of \[5, 3\]",
    ),
    "another rule's moment": (
        {},
        state("exp_avg_sq", torch.ones(5, 3)),
        "a state of tiger: exp_avg",
    ),
    "a momentum of SGD": ({}, state("momentum_buffer", torch.ones(5, 3)), "momentum_buffer: got"),
    "a state that is a number": ({}, lambda saved: saved["state"].update({0: 5}), "state: got 5"),
    "frozen in the future": (LAZY, state("frozen_at", 9), "frozen_at: got 9, .* from 0 to 4"),
    "begun before the start": (LAZY, state("begins_at", -1), "begins_at: got -1"),
    "frozen before it began": (
        LAZY,
        lambda saved: saved["state"][0].update(begins_at=3, frozen_at=2),
        "frozen_at: got 2, expected begins_at or later, 3",
    ),
    "names that are no strings": ({}, group("param_names", [1, 2]), "param_names: got"),
    "a string for names": ({}, group("param_names", "ab"), "param_names: got 'ab'"),
    "a name too few": ({}, group("param_names", ["a"]), "expected a list of 2 strings"),
    "names that are a number": ({}, group("param_names", 5), "param_names: got 5"),
    "an open window without its momentum": (
        WINDOW,
        lambda saved: saved["state"][0].pop("exp_avg"),
        "exp_avg: got None, expected a tensor: an accumulation window is open",
    ),
    "groups that are no list": (
        {},
        lambda saved: saved.update(param_groups=3),
        "a list 'param_groups'",
    ),
    "a group that is no dict": (
        {},
        lambda saved: saved.update(param_groups=[3]),
        "group 0: params",
    ),
    "the same parameter twice": ({}, group("params", [0, 0]), "params: got 0, expected an id"),
}


@pytest.mark.parametrize("name", MISFITS)
@pytest.mark.parametrize("fused", [None, False], ids=["native", "reference"])
def test_what_does_not_fit_is_refused_by_name(name, fused):
    options, change, says = MISFITS[name]
    saved = copy.deepcopy(trained(**options).state_dict())
    change(saved)
    optimizer = trained(fused=fused, **options)
    before = everything(optimizer)
    with pytest.raises(ValueError, match=says):
        optimizer.load_state_dict(saved)
    assert_equal(everything(optimizer), before)
    optimizer.step()
    optimizer.flush()
    assert all(bool(torch.isfinite(p).all()) for p in optimizer.param_groups[0]["params"])


@pytest.mark.parametrize(
    "steps",
    [-1, 1.5, math.nan, math.inf, "3", None, True, torch.ones(2), torch.tensor(-4)],
    ids=str,
)
def test_counters_of_adamw_are_whole_numbers(steps):
    optimizer = trained(AdamW)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][1]["step"] = steps
    before = everything(optimizer)
    with pytest.raises(ValueError, match=r"parameter 'bias' \(group 0, position 1\): step: got"):
        optimizer.load_state_dict(saved)
    assert_equal(everything(optimizer), before)


def torch_state(cls, **options):
    p = Parameter(torch.ones(4, 2))
    optimizer = cls([p], **options)
    p.grad = torch.ones(4, 2)
    optimizer.step()
    return optimizer.state_dict()


def test_state_of_torchs_adamw_goes_on_in_ours():
    twins = [Parameter(torch.ones(4, 2)) for _ in range(2)]
    theirs = torch.optim.AdamW([twins[0]], lr=0.01, betas=(0.8, 0.9), weight_decay=0.1)
    ours = AdamW([twins[1]], lr=1.0)
    twins[0].grad = torch.randn(4, 2)
    theirs.step()
    with torch.no_grad():
        twins[1].copy_(twins[0])
    ours.load_state_dict(theirs.state_dict())
    for _ in range(3):
        twins[0].grad = torch.randn(4, 2)
        twins[1].grad = twins[0].grad.clone()
        theirs.step()
        ours.step()
    torch.testing.assert_close(twins[0], twins[1])


@pytest.mark.parametrize(
    "cls,theirs,options,says",
    [
        (Tiger, torch.optim.AdamW, {}, "eps: got"),
        (Lion, torch.optim.AdamW, {}, "eps: got"),
        (Tiger, torch.optim.SGD, {"momentum": 0.9}, "momentum: got 0.9"),
        (Tiger, torch.optim.Adagrad, {}, "eps: got"),
        (AdamW, torch.optim.AdamW, {"amsgrad": True}, "amsgrad: got True"),
        (AdamW, torch.optim.Adam, {"weight_decay": 0.1}, "decoupled_weight_decay: got False"),
        (AdamW, torch.optim.RMSprop, {}, "square_avg: got"),
        (AdamW, torch.optim.Adamax, {}, "exp_inf: got"),
        (AdamW, torch.optim.NAdam, {}, "momentum_decay: got 0.004"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_state_of_another_rule_is_refused(cls, theirs, options, says):
    saved = torch_state(theirs, **options)
    optimizer = cls([Parameter(torch.ones(4, 2))])
    with pytest.raises(ValueError, match=says):
        optimizer.load_state_dict(saved)


def test_a_dict_as_other_packages_write_it_loads_if_the_rule_is_the_same():
    # lr, betas, weight_decay and exp_avg: what implementations of Lion have.
    saved = {
        "state": {0: {"exp_avg": torch.full((4, 2), 0.5)}},
        "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.99), "weight_decay": 0.1, "params": [0]}],
    }
    optimizer = Lion([Parameter(torch.ones(4, 2))])
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 1e-3
    with pytest.raises(ValueError, match=r"group 0: betas=\(0.9, 0.99\): tiger expects"):
        Tiger([Parameter(torch.ones(4, 2))]).load_state_dict(saved)


@pytest.mark.parametrize("lazy", ["decay", "exact"])
def test_a_lazy_optimizer_stays_lazy(lazy):
    saved = trained().state_dict()
    optimizer = trained(lazy=lazy)
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lazy"] == lazy
    assert clock_of(optimizer).history is None or clock_of(optimizer).history.steps == 0
    optimizer.step()
    # And a lazy dict makes a frozen one lazy, as rows of it may be behind.
    other = trained()
    other.load_state_dict(trained(lazy=lazy).state_dict())
    assert other.param_groups[0]["lazy"] == lazy


@pytest.mark.parametrize("saved", [None, 5, [], "text"], ids=repr)
def test_what_is_no_dict_is_refused(saved):
    with pytest.raises(ValueError, match=f"expects a dict, got {type(saved).__name__}"):
        trained().load_state_dict(saved)


def test_loading_copies_state_once():
    code = """
import resource, torch
from tiger_ext import Tiger
p = torch.nn.Parameter(torch.zeros(1 << 26))
p.data.fill_(1)
saved = {"state": {0: {"exp_avg": torch.ones(1 << 26, dtype=torch.bfloat16)}},
         "param_groups": Tiger([p]).state_dict()["param_groups"]}
optimizer = Tiger([p])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
optimizer.load_state_dict(saved)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1.2 * (128 << 10)  # KiB of a bfloat16 momentum


def test_a_dict_that_was_saved_to_a_file_loads():
    for options in ({}, LAZY, WINDOW):
        optimizer = trained(**options)
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        other = trained(**options)
        other.state.clear()
        other.load_state_dict(torch.load(file, weights_only=True))
        assert_equal(everything(other)[1:], everything(optimizer)[1:])


def test_a_models_own_state_beside_the_parameters_stays():
    optimizer = trained()
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"]["mine"] = {"x": 1}
    saved["state"][0]["mine"] = torch.ones(7)
    optimizer.load_state_dict(saved)
    assert optimizer.state["mine"] == {"x": 1}
    assert optimizer.state[optimizer.param_groups[0]["params"][0]]["mine"].shape == (7,)


def test_a_wrong_number_of_groups_or_parameters_is_torchs_error():
    optimizer, layer = trained(), nn.Linear(2, 2)
    with pytest.raises(ValueError, match="number of parameter groups"):
        Tiger([{"params": [p]} for p in layer.parameters()]).load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match="doesn't match the size"):
        Tiger([layer.weight]).load_state_dict(optimizer.state_dict())


every_road = pytest.mark.parametrize("fused", [None, False], ids=["native", "reference"])


@every_road
@pytest.mark.parametrize("steps", [2, 3], ids=["closed", "open"])
def test_rows_that_changed_after_accumulation_ended_load(steps, fused):
    p = Parameter(torch.ones(4, 2))
    optimizer = Tiger([p], lr=0.01, lazy="exact", accumulation_steps=2, fused=fused)
    for _ in range(steps):
        p.grad = torch.ones(4, 2).to_sparse(1)
        optimizer.step()
    optimizer.param_groups[0]["accumulation_steps"] = 1
    p.grad = torch.ones(4, 2).to_sparse(2)
    optimizer.step()
    twin = Parameter(p.detach().clone())
    other = Tiger([twin], lazy="exact", fused=fused)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    if steps == 2:  # the other one refuses to go on with its open window by other rows
        for each in (optimizer, other):
            each.param_groups[0]["accumulation_steps"] = 2
    for _ in range(3):
        for own, each in ((p, optimizer), (twin, other)):
            own.grad = torch.ones(4, 2).to_sparse(2)
            each.step()
        assert same_bits(p, twin)


@every_road
def test_a_momentum_missing_from_a_closed_window_begins_anew(fused):
    optimizer = trained(accumulation_steps=2, fused=fused)
    saved = copy.deepcopy(optimizer.state_dict())
    del saved["state"][0]["exp_avg"]
    optimizer.load_state_dict(saved)
    table, bias = optimizer.param_groups[0]["params"]
    before = table.detach().clone()
    table.grad, bias.grad = None, torch.ones(DIM)
    for _ in range(2):
        optimizer.step()
    assert same_bits(table, before)
    for _ in range(2):
        table.grad = torch.ones(ROWS, DIM)
        optimizer.step()
    torch.testing.assert_close(table, before * (1 - 0.01 * 0.1) - 0.01)


@every_road
def test_windows_count_as_far_as_their_numbers_go(fused):
    optimizer = trained(accumulation_steps=2, fused=fused)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["windows"] = 2**31 - 2
    optimizer.load_state_dict(saved)
    table = optimizer.param_groups[0]["params"][0]
    for _ in range(2):
        optimizer.step()
    before = everything(optimizer)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert_equal(everything(optimizer), before)
    assert int(optimizer.state[table]["window"].max()) == 2**31 - 1
    with pytest.raises(OverflowError, match="windows count at most 2147483647"):
        optimizer.step()
    assert_equal(everything(optimizer), before)
