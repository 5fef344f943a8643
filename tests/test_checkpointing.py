# SPDX-License-Identifier: Apache-2.0
"""State dicts of every lazy mode: names, dtypes, older ones, distributed checkpointing."""

import copy
import io
import pickle

import pytest
import torch
from cases import clock_of
from table_model import HYPER, MODES, Model, assert_alike, every_lazy, every_mode, train
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)

from tiger_ext import AdamW, Tiger


def trained(cls, lazy, steps=8, **options):
    model = Model()
    optimizer = cls(model.parameters(), lazy=lazy, **HYPER, **options)
    train(model, optimizer, range(steps))
    return model, optimizer


def assert_goes_on_alike(model, optimizer, other_model, other, steps=range(8, 13)):
    train(model, optimizer, steps)
    train(other_model, other, steps)
    assert_alike(optimizer, other)
    optimizer.flush()
    other.flush()
    assert_alike(optimizer, other)


@every_mode
@pytest.mark.parametrize("saved", ["named", "unnamed"])
@pytest.mark.parametrize("loaded", ["named", "unnamed"])
def test_names_neither_help_nor_hinder_loading(cls, lazy, saved, loaded):
    def make(model, named):
        params = model.named_parameters() if named == "named" else model.parameters()
        return cls(params, lazy=lazy, **HYPER)

    model, twin = Model(), Model()
    optimizer, other = make(model, saved), make(twin, loaded)
    train(model, optimizer, range(8))
    twin.load_state_dict(model.state_dict())
    other.load_state_dict(optimizer.state_dict())
    names = [name for name, _ in model.named_parameters()]
    expected = names if "named" in (saved, loaded) else None
    # As in torch's optimizers the dict's names win, and a dict without names changes none.
    assert other.param_groups[0].get("param_names") == expected
    sgd = torch.optim.SGD(make(Model(), loaded).param_groups[0]["params"], lr=0.1)
    sgd.load_state_dict(torch.optim.SGD(Model().named_parameters(), lr=0.1).state_dict())
    assert sgd.param_groups[0]["param_names"] == names
    assert_goes_on_alike(model, optimizer, twin, other)


@every_mode
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dtypes_of_the_state_survive(cls, lazy, dtype):
    model = Model().to(dtype)
    optimizer = cls(model.parameters(), lazy=lazy, momentum_dtype=torch.float32, **HYPER)
    train(model, optimizer, range(8))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    twin = copy.deepcopy(model)
    other = cls(twin.parameters())  # every option comes with the dict
    optimizer.track(model.table)
    other.track(twin.table)  # what is tracked before loading reads by the loaded history
    other.load_state_dict(torch.load(file, weights_only=True))
    for state in other.state.values():
        for name in ("exp_avg", "exp_avg_sq", "last_step", "step"):
            expected = {"last_step": torch.int32, "step": torch.int64}.get(name, torch.float32)
            if name == "exp_avg_sq":
                expected = torch.promote_types(torch.float32, dtype)
            assert name not in state or state[name].dtype == expected
        assert ("last_step" in state) == (lazy != "frozen")
    assert_goes_on_alike(model, optimizer, twin, other)


@pytest.mark.parametrize("cls,lazy", [m for m in MODES if m[1] == "frozen"])
def test_state_dicts_from_before_the_lazy_modes(cls, lazy):
    model, optimizer = trained(cls, lazy)
    old = copy.deepcopy(optimizer.state_dict())
    for group in old["param_groups"]:
        del group["lazy"]
        assert "history" not in group
    twin = copy.deepcopy(model)
    other = cls(twin.parameters())
    other.load_state_dict(old)
    assert other.param_groups[0]["lazy"] == "frozen"
    assert_goes_on_alike(model, optimizer, twin, other)
    # Made lazy after loading, the rows count as current.
    other.param_groups[0]["lazy"] = "decay"
    train(twin, other, range(13, 16))
    other.flush()
    assert all(int(state["last_step"].min()) >= 0 for state in other.state.values())
    assert clock_of(other).history.steps == 3


def test_histories_saved_as_tuples_load():
    model, optimizer = trained(Tiger, "exact")
    saved = optimizer.state_dict()
    assert type(saved["param_groups"][0]["history"]) is str
    saved["param_groups"][0]["history"] = clock_of(optimizer).history.saved()
    twin = copy.deepcopy(model)
    other = Tiger(twin.parameters())
    other.load_state_dict(saved)
    assert_goes_on_alike(model, optimizer, twin, other)


@every_mode
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_of_model_and_optimizer_go_on_alike(cls, lazy, how):
    model, optimizer = trained(cls, lazy, momentum_dtype=torch.bfloat16)
    handle = optimizer.track(model.table)
    train(model, optimizer, range(8, 10))
    if how == "deepcopy":
        twin, other = copy.deepcopy((model, optimizer))
    elif how == "pickle":
        twin, other = pickle.loads(pickle.dumps((model, optimizer)))
    else:
        file = io.BytesIO()
        torch.save((model, optimizer), file)
        file.seek(0)
        twin, other = torch.load(file, weights_only=False)
    assert other.param_groups[0]["params"][0] is twin.table.weight
    assert_alike(optimizer, other)
    other.track(twin.table)
    assert_goes_on_alike(model, optimizer, twin, other, range(10, 16))
    handle.remove()


# -------------------------------------------------------------------- torch.distributed.checkpoint

OPTIONS = {
    "plain": StateDictOptions(),
    "flattened": StateDictOptions(flatten_optimizer_state_dict=True),
    "full": StateDictOptions(full_state_dict=True),
}


@every_mode
@pytest.mark.parametrize("flush", [False, True], ids=["stale", "flushed"])
@pytest.mark.parametrize("form", OPTIONS)
def test_optimizer_state_dict_of_distributed_checkpointing(cls, lazy, form, flush):
    model, optimizer = trained(cls, lazy)
    if flush:
        optimizer.flush()
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=OPTIONS[form]))
    key = "state.table.weight.exp_avg"
    assert key in saved if form == "flattened" else "exp_avg" in saved["state"]["table.weight"]
    twin = Model()
    twin.load_state_dict(model.state_dict())
    other = cls(twin.parameters(), lazy=lazy, **HYPER)
    set_optimizer_state_dict(twin, other, saved, options=OPTIONS[form])
    assert_alike(optimizer, other)
    assert_goes_on_alike(model, optimizer, twin, other)


@every_lazy
@pytest.mark.parametrize("form", ["plain", "flattened"])
def test_saved_and_loaded_by_distributed_checkpointing(lazy, form, tmp_path):
    model, optimizer = trained(Tiger, lazy)
    states = get_state_dict(model, optimizer, options=OPTIONS[form])
    saved = dict(zip(("model", "optimizer"), states))
    dcp.save(saved, checkpoint_id=tmp_path, no_dist=True)
    twin = Model(seed=1)
    other = Tiger(twin.parameters(), lazy=lazy, **HYPER)
    states = get_state_dict(twin, other, options=OPTIONS[form])
    loaded = dict(zip(("model", "optimizer"), states))
    dcp.load(loaded, checkpoint_id=tmp_path, no_dist=True)
    set_state_dict(
        twin,
        other,
        model_state_dict=loaded["model"],
        optim_state_dict=loaded["optimizer"],
        options=OPTIONS[form],
    )
    assert_goes_on_alike(model, optimizer, twin, other)


@every_lazy
@pytest.mark.parametrize("micro_steps", [2, 7, 8, 9])
@pytest.mark.parametrize("form", OPTIONS)
def test_open_windows_survive_distributed_checkpointing(lazy, form, micro_steps):
    model, optimizer = trained(Tiger, lazy, micro_steps, accumulation_steps=3)
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=OPTIONS[form]))
    twin = Model()
    twin.load_state_dict(model.state_dict())
    other = Tiger(twin.parameters(), lazy=lazy, accumulation_steps=3, **HYPER)
    set_optimizer_state_dict(twin, other, saved, options=OPTIONS[form])
    going_on = range(micro_steps, 3 * (micro_steps // 3 + 3))
    assert_goes_on_alike(model, optimizer, twin, other, going_on)


@every_mode
def test_the_first_state_dict_of_distributed_checkpointing_moves_nothing(cls, lazy):
    # To have a state to save, torch takes a step with lr=0 and gradients of zero.
    model, untouched = Model(), Model()
    optimizer = cls(model.parameters(), lazy=lazy, **HYPER)
    get_optimizer_state_dict(model, optimizer)
    optimizer.flush()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), untouched.parameters()))
    if cls is AdamW:
        return  # its bias correction counts that step, as torch's own does
    other = cls(untouched.parameters(), lazy=lazy, **HYPER)
    train(model, optimizer, range(6))
    train(untouched, other, range(6))
    optimizer.flush()
    other.flush()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), untouched.parameters()))


def test_a_parameter_without_a_state_is_reported_by_torch():
    model = nn.ModuleDict({"used": nn.Linear(2, 2), "unused": nn.Linear(2, 2)})
    optimizer = Tiger(model.parameters(), lazy="exact", **HYPER)
    model["used"](torch.ones(2)).sum().backward()
    optimizer.step()
    saved = get_optimizer_state_dict(model, optimizer)
    with pytest.raises(RuntimeError, match="Missing optimizer state for parameter 'unused"):
        set_optimizer_state_dict(model, Tiger(model.parameters(), lazy="exact"), saved)
    optimizer.flush()  # gives every parameter its clock
    saved = get_optimizer_state_dict(model, optimizer)
    set_optimizer_state_dict(model, Tiger(model.parameters(), lazy="exact"), saved)
