# SPDX-License-Identifier: Apache-2.0
"""Options as trainers, configuration files and numpy write them; keys that are no options."""

import copy
import io
import pickle
from collections.abc import Sequence
from difflib import SequenceMatcher
from fractions import Fraction
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch
from cases import every_rule, parameter, sparse_grad
from oracle import same_bits
from torch.nn import Parameter
from torch.optim import lr_scheduler, swa_utils

from tiger_ext import AdamW, Lion, Tiger

every_class = pytest.mark.parametrize("cls", [Tiger, Lion, AdamW], ids=lambda c: c.__name__)
backends = pytest.mark.parametrize("fused", [None, False], ids=["native", "reference"])
BETAS = {Tiger: [0.75], Lion: [0.75, 0.5], AdamW: [0.75, 0.5]}


def reloaded(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# ------------------------------------------------------------------------------- keys of a group

KEPT = {
    "name": "decoder",
    "lr_scale": 0.5,
    "lr_mult": 0.1,
    "wd_mult": 0.0,
    "layer_id": 3,
    "group_name": "layer_3_decay",
    "learning_rate": 1.0,
    "momentum": 0.9,
    "foreach": None,
    "amsgrad": False,
    "differentiable": False,
    "decoupled_weight_decay": True,
    "_private": [1, 2],
    "weight_decay_mult": 0.5,
    "_weight_decay_of": 0.5,
    "lr_x": 1,
}


@every_class
def test_unknown_keys_of_a_group_are_kept(cls):
    p = parameter(3)
    opt = cls([{"params": [p], **KEPT}])
    opt.add_param_group({"params": [parameter(2)], **KEPT})
    for group in opt.param_groups:
        assert {k: group[k] for k in KEPT} == KEPT
    p.grad = torch.ones(3)
    opt.step()
    copied = copy.deepcopy(opt)
    assert {k: copied.param_groups[0][k] for k in KEPT} == KEPT
    saved = reloaded(opt.state_dict())
    fresh = cls([{"params": [parameter(3)]}, {"params": [parameter(2)]}])
    fresh.load_state_dict(saved)
    assert {k: fresh.param_groups[1][k] for k in KEPT} == KEPT


@every_class
def test_groups_of_torchs_own_adamw_are_taken(cls):
    group = torch.optim.AdamW([parameter(3)], lr=0.25).param_groups[0]
    del group["betas"], group["eps"]
    opt = cls([group])
    assert opt.param_groups[0]["lr"] == 0.25 and opt.param_groups[0]["amsgrad"] is False


NEAR = {
    "weight_decy": "weight_decay",
    "weight_deacy": "weight_decay",
    "weightdecay": "weight_decay",
    "beta": "betas",
    "row": "rows",
    "nonfinte": "nonfinite",
    "maximise": "maximize",
    "momentum_dtyp": "momentum_dtype",
    "shrinkto": "shrink_to",
    "param": "params",
    "algoritm": "algorithm",
    "epss": "eps",
    "direction_scal": "direction_scale",
    "betas_": "betas",
    "lr_": "lr",
    "_rows": "rows",
    "weight_decay_": "weight_decay",
    "weight__decay": "weight_decay",
}


@every_class
@pytest.mark.parametrize("key", NEAR)
def test_near_misses_are_refused_with_what_was_meant(cls, key):
    assert SequenceMatcher(None, NEAR[key], key).ratio() >= 0.8
    opt = cls([parameter(3)])
    for make in (lambda group: cls([group]), opt.add_param_group):
        with pytest.raises(TypeError, match=rf"'{key}'.*{cls._algorithm}.*'{NEAR[key]}'"):
            make({"params": [parameter(2)], key: 1})
    assert len(opt.param_groups) == 1


@every_class
def test_unknown_arguments_of_the_constructor_are_refused(cls):
    for key in ("name", "lr_scale", "foreach", "weight_decy", "amsgrad"):
        with pytest.raises(TypeError, match=key):
            cls([parameter(3)], **{key: None})


@every_class
def test_schedulers_and_averages_write_their_keys(cls):
    groups = [{"params": [parameter(3)], "name": "a"}, {"params": [parameter(2)], "name": "b"}]
    opt = cls(groups, lr=0.1)
    swa_utils.SWALR(opt, swa_lr=0.05)
    lr_scheduler.OneCycleLR(opt, max_lr=0.2, total_steps=10)
    keys = {"swa_lr", "initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum"}
    assert keys <= set(opt.param_groups[0])
    other = cls([{**group, "params": [parameter(1)]} for group in opt.param_groups])
    assert [group["name"] for group in other.param_groups] == ["a", "b"]


# --------------------------------------------------------------------------- learning rate: tensor


@every_rule
@backends
@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 3)])
@pytest.mark.parametrize("capturable", [False, True])
def test_a_tensor_lr_of_one_element_may_have_a_dimension(rule, fused, shape, capturable):
    start = torch.randn(shape)
    results = []
    for lr in (0.25, torch.tensor(0.25), torch.tensor([0.25])):
        p = Parameter(start.clone())
        opt = rule([p], lr=lr, fused=fused, capturable=capturable)
        for k in range(3):
            p.grad = torch.full(shape, 0.5 - k)
            opt.step()
            if isinstance(lr, torch.Tensor):
                lr.mul_(0.5)
            else:
                opt.param_groups[0]["lr"] *= 0.5
        assert p.shape == shape and not torch.equal(p, start)
        results.append(p.detach())
    assert same_bits(results[0], results[1]) and same_bits(results[0], results[2])


@backends
@pytest.mark.parametrize("lazy", ["frozen", "decay", "exact"])
def test_a_lazy_table_with_an_lr_of_one_dimension(fused, lazy):
    start = torch.randn(6, 3)
    results = []
    for lr in (0.25, torch.tensor([0.25])):
        p = Parameter(start.clone())
        opt = Tiger([p], lr=lr, lazy=lazy, fused=fused)
        for k in range(4):
            torch.manual_seed(k)
            p.grad = sparse_grad(p, 3)
            opt.step()
        opt.flush()
        results.append(p.detach())
    assert same_bits(*results)


@pytest.mark.parametrize("scale", ["rms", "rms_rows"])
@backends
def test_a_relative_lr_of_one_dimension(fused, scale):
    results = []
    for lr in (0.25, torch.tensor([0.25])):
        p = Parameter(torch.full((2, 3), 4.0))
        p.grad = torch.ones(2, 3)
        Tiger([p], lr=lr, scale=scale, fused=fused).step()
        results.append(p.detach())
    assert same_bits(*results) and results[0].shape == (2, 3)


def test_an_lr_on_another_device_keeps_the_shape_of_the_parameter():
    p = Parameter(torch.ones((), device="meta"))
    p.grad = torch.ones((), device="meta")
    for cls in (Tiger, Lion, AdamW):
        cls([p], lr=torch.tensor([0.25], device="meta"), fused=False).step()
        assert p.shape == ()


@every_class
@pytest.mark.parametrize(
    "lr", [torch.ones(2), torch.ones(1, 1), torch.ones(0), torch.tensor([-1.0])]
)
def test_other_tensors_are_no_learning_rate(cls, lr):
    with pytest.raises(ValueError, match=r"(?s)lr=tensor.*0-dim"):
        cls([parameter(3)], lr=lr)


@every_class
def test_schedulers_change_an_lr_of_one_dimension_in_place(cls):
    lr = torch.tensor([0.5])
    p = parameter(3)
    opt = cls([p], lr=lr)
    scheduler = lr_scheduler.ExponentialLR(opt, 0.5)
    p.grad = torch.ones(3)
    opt.step()
    scheduler.step()
    assert opt.param_groups[0]["lr"] is lr and lr.tolist() == [0.25]
    assert reloaded(opt.state_dict())["param_groups"][0]["lr"].tolist() == [0.25]


# ------------------------------------------------------------------------- numbers and sequences


class ListConfig(Sequence):
    """A sequence that is neither a list nor a tuple, as omegaconf's."""

    def __init__(self, items):
        self._items = items

    def __len__(self):
        return len(self._items)

    def __getitem__(self, index):
        return self._items[index]


@every_class
@pytest.mark.parametrize(
    "make",
    [
        tuple,
        list,
        ListConfig,
        np.array,
        lambda b: np.array(b, dtype=np.float32),
        torch.tensor,
        lambda b: [np.float64(x) for x in b],
        lambda b: [torch.tensor(x) for x in b],
        lambda b: [torch.tensor([x]) for x in b],
    ],
)
def test_betas_may_be_any_sequence_and_are_kept_as_floats(cls, make):
    betas = BETAS[cls]
    for opt in (
        cls([parameter(3)], betas=make(betas)),
        cls([{"params": [parameter(3)], "betas": make(betas)}]),
    ):
        kept = opt.param_groups[0]["betas"]
        assert kept == tuple(betas)
        assert type(kept) is tuple and all(type(b) is float for b in kept)
        assert reloaded(opt.state_dict())["param_groups"][0]["betas"] == kept
    opt.add_param_group({"params": [parameter(2)]})


@every_class
def test_what_is_no_sequence_of_betas_is_refused(cls):
    good = BETAS[cls]
    meta = torch.tensor(good, device="meta")
    matrix = torch.tensor([good])
    for bad in (
        set(good),
        dict.fromkeys(good),
        "0.9",
        b"0.9",
        np.array(good[0]),
        meta,
        matrix,
        good * 2,
    ):
        with pytest.raises(ValueError, match=r"betas=.*expects a tuple of"):
            cls([parameter(3)], betas=bad)


@pytest.mark.parametrize(
    "scalar", [np.float64, np.float32, np.float16, np.longdouble, np.int64, np.array]
)
def test_numpy_scalars_become_numbers(scalar):
    numbers = dict(
        lr=scalar(1),
        weight_decay=scalar(0),
        rms_floor=scalar(1),
        shrink_ratio=scalar(1),
        direction_scale=scalar(2),
        accumulation_steps=np.int64(2),
    )
    p = parameter(3)
    opt = Tiger([{"params": [p], "shrink_to": scalar(1), **numbers}], **numbers)
    group = opt.param_groups[0]
    for values in (group, opt.defaults):
        for name in numbers:
            assert type(values[name]) in (int, float) and values[name] == numbers[name], name
    assert type(group["shrink_to"]) in (int, float)
    scheduler = lr_scheduler.ExponentialLR(opt, 0.5)
    for _ in range(2):
        p.grad = torch.ones(3)
        opt.step()
    scheduler.step()
    assert reloaded(opt.state_dict())["param_groups"][0]["lr"] == 0.5
    eps = AdamW([parameter(2)], eps=scalar(1)).param_groups[0]["eps"]
    assert type(eps) in (int, float)


@pytest.mark.parametrize(
    "value", [np.float64("nan"), np.float32(-1), np.float64("inf"), np.ones(1), np.bool_(True)]
)
def test_bad_numpy_values_are_refused(value):
    with pytest.raises(ValueError, match="lr="):
        Tiger([parameter(3)], lr=value)


def test_numpy_flags_become_flags():
    flags = dict(maximize=np.bool_(True), capturable=np.bool_(False), fused=np.array(False))
    group = Tiger([parameter(3)], **flags).param_groups[0]
    assert [group[name] for name in flags] == [True, False, False]
    assert all(type(group[name]) is bool for name in flags)
    group = Tiger([parameter(3)], stochastic_rounding=np.bool_(False)).param_groups[0]
    assert group["stochastic_rounding"] is False
    group = Tiger([parameter(3)], stochastic_rounding=np.bool_(True)).param_groups[0]
    assert group["stochastic_rounding"] is True


def test_strings_of_other_types_become_strings():
    opt = Tiger(
        [parameter(3)], lazy=np.str_("decay"), rows=np.str_("nonzero"), nonfinite=np.str_("skip")
    )
    group = opt.param_groups[0]
    assert all(type(group[name]) is str for name in ("lazy", "rows", "nonfinite"))
    assert reloaded(opt.state_dict())["param_groups"][0]["lazy"] == "decay"
    assert pickle.loads(pickle.dumps(opt)).param_groups[0]["rows"] == "nonzero"


# ------------------------------------------------------------------------- what no float holds

BEYOND = {
    "10^400": 10**400,
    "-10^400": -(10**400),
    "10^5000": 10**5000,
    "ratio": Fraction(10**400, 3),
    "numpy": np.longdouble("1e4000"),
}


@pytest.mark.parametrize("value", BEYOND.values(), ids=BEYOND)
@pytest.mark.parametrize(
    "name", ["lr", "weight_decay", "rms_floor", "direction_scale", "shrink_ratio", "shrink_to"]
)
def test_numbers_that_no_float_holds_are_refused(name, value):
    opt = Tiger([parameter(3)])
    makers = [lambda group: Tiger([group]), opt.add_param_group]
    if name != "shrink_to":
        makers.append(lambda group: Tiger(group["params"], **{name: value}))
    for make in makers:
        with pytest.raises(
            ValueError, match=rf"^{name}=.*: expected .*(number|\[0, 1\])"
        ) as refused:
            make({"params": [parameter(3)], name: value})
        assert len(str(refused.value)) < 300
    assert len(opt.param_groups) == 1
    with pytest.raises(ValueError, match=r"^eps=.*finite number >= 0"):
        AdamW([parameter(3)], eps=value)


@every_class
@pytest.mark.parametrize("which", [*BEYOND, "nearly 1"])
def test_betas_that_no_float_holds_are_refused(cls, which):
    value = BEYOND.get(which, Fraction(10**400 - 1, 10**400))
    with pytest.raises(ValueError, match=r"^betas=.*expects a tuple of") as refused:
        cls([parameter(3)], betas=[value] * len(BETAS[cls]))
    assert len(str(refused.value)) < 300


def test_a_scale_that_a_float_rounds_to_zero_is_none():
    with pytest.raises(
        ValueError, match=r"^direction_scale=Fraction\(1, 1000*\.\.\.0*\): expected"
    ):
        Tiger([parameter(3)], direction_scale=Fraction(1, 10**400))


@pytest.mark.parametrize("value", [2**31, 2**63, 10**5000], ids=["32", "64", "more"])
def test_micro_steps_that_no_counter_holds_are_refused(value):
    with pytest.raises(ValueError, match=r"^accumulation_steps=.*integer >= 1 and <= 2147483647"):
        Tiger([parameter(3)], accumulation_steps=value)
    p = parameter(3)
    p.grad = torch.ones(3)
    Tiger([p], accumulation_steps=2**31 - 1).step()


def test_an_lr_that_no_float_holds_is_refused_by_the_step_of_a_lazy_group():
    p = parameter(3)
    p.grad = torch.ones(3)
    opt = Tiger([p], lazy="decay")
    for name in ("lr", "weight_decay"):
        opt.param_groups[0].update({"lr": 1e-3, "weight_decay": 1e-3, name: 10**400})
        with pytest.raises(ValueError, match=r"lr \* weight_decay < 1, got inf"):
            opt.step()


@every_class
@pytest.mark.parametrize(
    "value",
    [
        np.array,
        np.array([1, 2]),
        np.dtype("float32"),
        np.float32,
        torch.ones(2),
        "float32",
        10**5000,
    ],
    ids=lambda v: type(v).__name__,
)
def test_what_is_no_dtype_is_refused_by_name(cls, value):
    with pytest.raises(ValueError, match=r"^momentum_dtype=.*expected None, torch\.float32"):
        cls([parameter(3)], momentum_dtype=value)


# ------------------------------------------------------------------------------------- types


@every_class
def test_the_types_of_the_signature_are_the_legal_strings(cls):
    hints = get_type_hints(cls.__init__)
    names = {"lazy", "rows", "nonfinite"} | (
        {"second_moment"} if cls is AdamW else {"scale", "direction"}
    )
    assert names <= set(hints)
    for name in names:
        parts = get_args(hints[name])  # of a Literal, or of a Literal or None
        values = [v for part in parts for v in (get_args(part) or [part]) if isinstance(v, str)]
        assert len(values) >= 2
        for value in values:
            cls([parameter(3)], **{name: value})
        with pytest.raises(ValueError) as refused:
            cls([parameter(3)], **{name: "else"})
        assert all(repr(value) in str(refused.value) for value in values)
