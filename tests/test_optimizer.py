# SPDX-License-Identifier: Apache-2.0
import copy
import io
import math
import pickle
import re
import threading
import warnings

import pytest
import torch
from cases import (
    FLOATS,
    RULES,
    SIGN_RULES,
    Rule,
    dense_grad,
    every_rule,
    parameter,
    set_grad,
    sparse_grad,
    unchecked_sparse,
)
from oracle import same_bits, unchanged, verified
from torch.nn import Parameter
from torch.optim import lr_scheduler

from tiger_ext import AdamW, Lion, Tiger

CLASSES = [Tiger, Lion, AdamW]
every_class = pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__name__)


def states_equal(a, b) -> bool:
    return set(a) == set(b) and all(same_bits(a[name], b[name]) for name in a)


# ------------------------------------------------------------------------------ constructor errors

BAD_VALUES = {
    "lr": [
        -1e-3,
        math.nan,
        math.inf,
        "0.1",
        None,
        True,
        torch.tensor(-1.0),
        torch.tensor(math.nan),
    ],
    "weight_decay": [-0.1, math.nan, math.inf, "0", None],
    "maximize": [1, None, "yes"],
    "capturable": [1, None],
    "fused": [1, "no"],
    "lazy": ["sometimes", None, True],
    "rows": ["all", True, 0],
    "nonfinite": ["ignore", None],
    "shrink_ratio": [-0.1, 1.5, math.nan, None],
    "momentum_dtype": [torch.int16, torch.complex64, "float32"],
    "stochastic_rounding": [2, None, "yes"],
}
BAD_SIGN_VALUES = {
    "scale": ["max", 1.0, True],
    "rms_floor": [-1.0, math.inf, None],
    "direction": ["up", None, True],
    "direction_scale": [0.0, -1.0, math.nan, math.inf, "1"],
}
BAD_OWN_VALUES = {
    Tiger: {
        "betas": [0.9, (), (0.9, 0.99), (1.0,), (-0.1,), (math.nan,), ("0.9",), None],
        "accumulation_steps": [0, -1, 1.5, None, True],
        **BAD_SIGN_VALUES,
    },
    Lion: {
        "betas": [(0.9,), (0.9, 1.0), (1.0, 0.9), (-0.1, 0.9), (0.9, 0.9, 0.9), 0.9, None],
        **BAD_SIGN_VALUES,
    },
    AdamW: {
        "betas": [(0.9,), (0.9, 1.0), (1.0, 0.9), (math.nan, 0.9), None],
        "eps": [-1e-8, math.inf, math.nan, None],
    },
}
BAD = [
    pytest.param(cls, name, value, id=f"{cls.__name__}-{name}={value}")
    for cls in CLASSES
    for name, values in {**BAD_VALUES, **BAD_OWN_VALUES[cls]}.items()
    for value in values
]


@pytest.mark.parametrize("cls,name,value", BAD)
@pytest.mark.parametrize("where", ["constructor", "group"])
def test_bad_values_are_refused(cls, name, value, where):
    # The message names the argument, the value and what is legal.
    match = rf"(?s){name}.*{re.escape(repr(value))}.*(expect|must|in \[|should)"
    p = parameter(3)
    with pytest.raises(ValueError, match=match):
        if where == "constructor":
            cls([p], **{name: value})
        else:
            cls([{"params": [p], name: value}])


def test_lr_with_more_than_one_element_is_refused():
    with pytest.raises(ValueError, match=r"lr.*(0-dim|1-element)"):
        Tiger([parameter(2)], lr=torch.tensor([1e-3, 1e-3]))


@every_class
@pytest.mark.parametrize(
    "name,legal",
    [
        ("lr", [0, 0.0, 1, 1e3, torch.tensor(0.1), torch.tensor(0.1, dtype=torch.float64)]),
        ("weight_decay", [0, 0.5, 3]),
        ("momentum_dtype", [None, torch.float32, torch.bfloat16, torch.float16]),
        ("shrink_ratio", [0.0, 1.0]),
        ("fused", [None, True, False]),
        ("capturable", [True, False]),
    ],
)
def test_legal_values_are_accepted_and_work(cls, name, legal):
    for value in legal:
        p = parameter(3)
        opt = cls([p], **{name: value})
        assert opt.param_groups[0][name] is value or opt.param_groups[0][name] == value
        p.grad = torch.ones(3)
        with verified(opt):
            opt.step()


def test_betas_may_be_zero_and_a_list():
    for cls, betas in ((Tiger, [0.0]), (Lion, [0.0, 0]), (AdamW, [0.0, 0.0])):
        p = parameter(3)
        opt = cls([p], betas=betas)
        p.grad = torch.randn(3)
        with verified(opt):
            opt.step()


@pytest.mark.parametrize(
    "cls,key",
    [
        (Tiger, "eps"),
        (Lion, "eps"),
        (Lion, "accumulation_steps"),
        (AdamW, "accumulation_steps"),
        (AdamW, "scale"),
        (AdamW, "rms_floor"),
        (AdamW, "direction"),
        (AdamW, "direction_scale"),
    ],
)
def test_hyperparameters_of_another_algorithm_are_refused_by_name(cls, key):
    value = {"eps": 1e-8, "accumulation_steps": 1, "rms_floor": 1e-3}.get(key)
    with pytest.raises(TypeError, match=rf"{key}"):
        cls([{"params": [parameter(3)], key: value}])
    other = next(c for c in CLASSES if c is not cls)
    with pytest.raises(TypeError, match=rf"{cls._algorithm}.*{key}"):
        other([{"params": [parameter(3)], "algorithm": cls._algorithm, key: value}])
    with pytest.raises(TypeError, match=key):
        cls([parameter(3)], **{key: value})


@every_class
def test_keys_that_are_no_hyperparameters_are_legal(cls):
    keys = {"initial_lr": 0.1, "max_lr": 0.2, "min_lr": 0.0, "swa_lr": 0.1, "shrink_to": 1.0}
    keys |= {"max_momentum": 0.9, "base_momentum": 0.8}
    opt = cls([{"params": [parameter(3)], **keys}])
    assert all(opt.param_groups[0][k] == v for k, v in keys.items())


@pytest.mark.parametrize("name", ["sgd", "Tiger", None, 3])
def test_unknown_algorithm(name):
    with pytest.raises(ValueError, match=rf"algorithm={re.escape(repr(name))}.*tiger.*lion.*adamw"):
        Tiger([{"params": [parameter(3)], "algorithm": name}])


@every_class
def test_complex_parameters_are_refused(cls):
    p = Parameter(torch.randn(3, dtype=torch.complex64))
    for params in ([p], [("weight", p)], [{"params": [p]}], [{"params": p}], iter([p])):
        with pytest.raises(ValueError, match=r"complex"):
            cls(params)


@every_class
def test_a_refused_group_leaves_the_optimizer_usable(cls):
    p = parameter(3)
    opt = cls([p])
    no_leaf = torch.ones(2, requires_grad=True) * 1
    for bad in (dict(params=[parameter(2)], lr=-1), dict(params=[p]), dict(params=[no_leaf])):
        with pytest.raises(ValueError):
            opt.add_param_group(bad)
        assert len(opt.param_groups) == 1
    with pytest.raises(TypeError):
        opt.add_param_group([parameter(2)])
    p.grad = torch.ones(3)
    with verified(opt):
        opt.step()


@every_class
def test_the_callers_group_and_list_are_not_changed(cls):
    p, q = parameter(3), parameter(2)
    group, params = {"params": [p]}, [q]
    opt = cls([group])
    opt.add_param_group({"params": params})
    params.append(parameter(1))
    group["params"].append(parameter(1))
    assert [len(g["params"]) for g in opt.param_groups] == [1, 1]


# ----------------------------------------------------------------------------- defaults, algorithms

DEFAULTS = {
    "tiger": dict(lr=1e-3, betas=(0.965,), weight_decay=0.01, accumulation_steps=1),
    "lion": dict(lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0),
    "adamw": dict(lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, second_moment="element"),
}
COMMON = dict(
    lazy="frozen",
    rows=None,
    nonfinite="propagate",
    shrink_ratio=0.99,
    momentum_dtype=None,
    stochastic_rounding=False,
    maximize=False,
    capturable=False,
    fused=None,
)
SIGN = dict(scale=None, rms_floor=1e-3, direction="sign", direction_scale=None)


@every_class
@pytest.mark.parametrize("algorithm", DEFAULTS)
def test_defaults_of_every_algorithm_in_every_class(cls, algorithm):
    opt = cls([{"params": [parameter(3)], "algorithm": algorithm}])
    (group,) = opt.param_groups
    expected = {**DEFAULTS[algorithm], **COMMON, **({} if algorithm == "adamw" else SIGN)}
    assert {k: v for k, v in group.items() if k not in ("params", "algorithm")} == expected


@every_class
def test_the_class_gives_the_default_algorithm(cls):
    opt = cls([parameter(3)])
    assert opt.param_groups[0]["algorithm"] == cls.__name__.lower()


def test_omitted_options_take_the_constructors_or_the_other_algorithms_value():
    opt = Tiger(
        [
            {"params": [parameter(3)]},
            {"params": [parameter(3)], "lr": 0.5},
            {"params": [parameter(3)], "algorithm": "adamw"},
            {"params": [parameter(3)], "algorithm": "lion", "maximize": False},
            {"params": [parameter(3)], "algorithm": "tiger"},
        ],
        lr=0.25,
        betas=(0.5,),
        weight_decay=0.125,
        maximize=True,
    )
    assert [g["lr"] for g in opt.param_groups] == [0.25, 0.5, 1e-3, 1e-4, 0.25]
    assert [g["betas"] for g in opt.param_groups] == [
        (0.5,),
        (0.5,),
        (0.9, 0.999),
        (0.9, 0.99),
        (0.5,),
    ]
    assert [g["weight_decay"] for g in opt.param_groups] == [0.125, 0.125, 0.0, 0.0, 0.125]
    assert [g["maximize"] for g in opt.param_groups] == [True, True, False, False, True]


def mixed(named=False, cls=Tiger, **options):
    """Return an optimizer with all algorithms over dense and sparse parameters, and its params."""
    params = {
        "w1": parameter(17, 5),
        "w2": parameter(300),
        "table1": parameter(40, 7),
        "w3": parameter(9, dtype=torch.bfloat16),
        "table2": parameter(50, 3),
        "w4": parameter(4, 4),
        "table3": parameter(30, 6, dtype=torch.float16),
    }

    def pick(*names):
        return [(n, params[n]) for n in names] if named else [params[n] for n in names]

    groups = [
        {"params": pick("w1", "table1"), "weight_decay": 0.2},
        {"params": pick("w2", "w3"), "algorithm": "lion", "weight_decay": 0.3, "lr": 0.01},
        {"params": pick("w4", "table2"), "algorithm": "adamw", "weight_decay": 0.1},
        {"params": pick("table3"), "algorithm": "tiger", "lr": 0.02},
    ]
    return cls(groups, **options), params


def give_gradients(params, skip=()):
    for name, p in params.items():
        if name not in skip:
            p.grad = sparse_grad(p, 25) if name.startswith("table") else dense_grad(p)


@every_class
def test_mixed_algorithms_dense_and_sparse_side_by_side(cls):
    opt, params = mixed(cls=cls)
    for step in range(4):
        give_gradients(params)
        if step == 2:
            params["w2"].grad = None
            params["table1"].grad = dense_grad(params["table1"])
            params["w1"].grad = sparse_grad(params["w1"], 8)
        with verified(opt):
            opt.step()


def test_mixed_native_and_reference_groups():
    params = [parameter(5, 3) for _ in range(4)]
    opt = Tiger([{"params": params[:2]}, {"params": params[2:], "fused": False}])
    for _ in range(2):
        for p in params:
            p.grad = sparse_grad(p, 4) if p is params[1] or p is params[3] else dense_grad(p)
        with verified(opt):
            opt.step()


# --------------------------------------------------------------------------------- all or nothing


def bad_gradient(p, index, at=3):
    rows = torch.randint(p.shape[0], (9,))
    rows[at] = index
    return unchecked_sparse(rows[None], torch.randn(9, *p.shape[1:]).to(p.dtype), p.shape)


@pytest.mark.indices_checked_at_once
@pytest.mark.parametrize("first_step", [True, False], ids=["first-step", "later-step"])
@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("index", [-1, "rows", 10**12, -(2**63), 2**63 - 1])
def test_a_bad_row_index_changes_nothing(first_step, named, index):
    opt, params = mixed(named)
    if not first_step:
        give_gradients(params)
        opt.step()
    give_gradients(params)
    last = params["table3"]
    index = last.shape[0] if index == "rows" else index
    last.grad = bad_gradient(last, index)
    where = "'table3'" if named else "group 3.*position 0"
    for _ in range(2):
        with unchanged(opt), pytest.raises(IndexError, match=rf"{where}.*{index}\b.*\b30 rows"):
            opt.step()
    last.grad = sparse_grad(last, 9)
    with verified(opt):
        opt.step()


@pytest.mark.indices_checked_at_once
@every_rule
@pytest.mark.parametrize("fused", [None, False], ids=["native", "reference"])
@pytest.mark.parametrize("nnz", [1, 5000, 30_000])
def test_a_bad_row_index_among_many(rule, fused, nnz):
    p, q = parameter(1000, 3), parameter(8)
    opt = rule([("table", p), ("bias", q)], fused=fused)
    for index in (1000, -1, -1000):
        rows = torch.randint(1000, (1, nnz))
        rows[0, nnz * 2 // 3] = index
        p.grad = unchecked_sparse(rows, torch.randn(nnz, 3), p.shape)
        q.grad = torch.ones(8)
        with unchanged(opt), pytest.raises(IndexError, match=rf"'table'.* {index}\b.*1000"):
            opt.step()


@pytest.mark.indices_checked_at_once
@every_rule
def test_a_bad_index_in_any_sparse_dimension(rule):
    p = parameter(4, 5, 6)
    opt = rule([p])
    # The linear index of (1, 7, 0) is legal; the entry is not.
    for indices in ([[1], [7], [0]], [[1], [-1], [0]], [[3], [4], [6]], [[-1], [5], [0]]):
        p.grad = unchecked_sparse(indices, torch.ones(1), p.shape)
        with unchanged(opt), pytest.raises(IndexError):
            opt.step()


@pytest.mark.indices_checked_at_once
@every_rule
@pytest.mark.parametrize("fused", [None, False], ids=["native", "reference"])
@pytest.mark.parametrize("shape,index", [((0, 5), 0), ((0, 5), 3), ((5, 0), 5), ((5, 0), -1)])
def test_a_bad_index_into_an_empty_table(rule, fused, shape, index):
    p = parameter(*shape)
    opt = rule([("table", p)], fused=fused)
    p.grad = unchecked_sparse([[index]], torch.ones(1, shape[1]), shape)
    with unchanged(opt), pytest.raises(IndexError, match=rf"'table'.*{index}\b.*{shape[0]} rows"):
        opt.step()


@pytest.mark.parametrize("kind", ["shape", "dtype"])
@pytest.mark.parametrize("fused", [None, False], ids=["native", "reference"])
def test_gradients_that_do_not_fit_change_nothing(kind, fused):
    opt, params = mixed(named=True, fused=fused)
    give_gradients(params)
    last = params["w4"]
    if kind == "shape":
        last.grad = None
        last.data = last.data[:3]
        last.grad = torch.ones(3, 4)
        last.data = torch.ones(4, 4)
        match = r"'w4'.*\[3, 4\].*\[4, 4\]"
    else:
        set_grad(last, torch.ones(4, 4, dtype=torch.int32))
        match = r"'w4'.*int.*float32"
    with unchanged(opt), pytest.raises(RuntimeError, match=f"(?i){match}"):
        opt.step()
    last.grad = None
    last.grad = torch.ones(4, 4)
    with verified(opt):
        opt.step()


@every_class
@pytest.mark.parametrize("layout", ["sparse_csr", "sparse_coo", "_mkldnn"])
@pytest.mark.parametrize("fused", [None, False], ids=["native", "reference"])
@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_unsupported_layouts_change_nothing(cls, layout, fused):
    # torch accepts such gradients only where the parameter has their layout too.
    convert = {
        "sparse_csr": torch.Tensor.to_sparse_csr,
        "sparse_coo": torch.Tensor.to_sparse,
        "_mkldnn": torch.Tensor.to_mkldnn,
    }[layout]
    p, q = Parameter(convert(torch.eye(4))), parameter(3)
    opt = cls([("good", q), ("strange", parameter(4, 4))], fused=fused)
    opt.param_groups[0]["params"][1] = p  # the constructor refuses most of them
    p.grad, q.grad = convert(torch.ones(4, 4)), torch.ones(3)
    before = q.detach().clone()
    with pytest.raises(RuntimeError, match=rf"(?i)'strange'.*{layout}.*strided"):
        opt.step()
    assert same_bits(q, before) and len(opt.state) == 0


def test_sparse_gradient_of_another_shape_changes_nothing():
    p = parameter(6, 3)
    opt = Tiger([("table", p)])
    p.data = torch.randn(9, 3)
    p.grad = sparse_grad(p, 4)
    p.data = torch.randn(6, 3)
    with unchanged(opt), pytest.raises(RuntimeError, match=r"'table'.*\[9, 3\].*\[6, 3\]"):
        opt.step()


@pytest.mark.parametrize("fused", [None, False], ids=["native", "reference"])
def test_state_of_another_shape_changes_nothing(fused):
    p, q = parameter(6, 3), parameter(5)
    opt = AdamW([("q", q), ("table", p)], fused=fused)
    p.grad, q.grad = torch.ones(6, 3), torch.ones(5)
    opt.step()
    opt.state[p]["exp_avg"] = torch.zeros(6, 4)
    with unchanged(opt), pytest.raises(RuntimeError, match=r"'table'.*exp_avg.*\[6, 4\].*\[6, 3\]"):
        opt.step()


def test_a_closure_that_raises_changes_nothing():
    opt, params = mixed()
    give_gradients(params)

    def closure():
        raise KeyError("no")

    with unchanged(opt), pytest.raises(KeyError):
        opt.step(closure)


@pytest.mark.indices_checked_at_once
def test_a_failing_step_leaves_partial_state_as_it_was():
    # A group that starts to store a first moment, in the step that fails.
    p, q = parameter(6, 3), parameter(5)
    opt = AdamW([p, q], betas=(0.0, 0.9))
    p.grad, q.grad = sparse_grad(p, 3), torch.ones(5)
    opt.step()
    opt.param_groups[0]["betas"] = (0.9, 0.9)
    p.grad = bad_gradient(p, 6)
    with unchanged(opt), pytest.raises(IndexError):
        opt.step()
    p.grad = sparse_grad(p, 3)
    with verified(opt):
        opt.step()


# ------------------------------------------------------------------------ parameters come and go


@every_rule
def test_none_gradients_are_skipped(rule):
    p, q = parameter(4), parameter(5)
    opt = rule([p, q])
    with verified(opt):
        opt.step()
    assert len(opt.state) == 0
    p.grad = torch.ones(4)
    with verified(opt):
        opt.step()
    assert q not in opt.state


@every_rule
def test_frozen_parameters_keep_still(rule):
    p, q = parameter(4), parameter(5)
    p.requires_grad_(False)
    opt = rule([p, q])
    q.grad = torch.ones(5)
    with verified(opt):
        opt.step()
    q.requires_grad_(False)
    p.requires_grad_(True)
    q.grad = None
    p.grad = torch.ones(4)
    with verified(opt):
        opt.step()


@every_rule
def test_groups_added_between_steps(rule):
    p, q = parameter(4), parameter(5, 2)
    opt = rule([p])
    p.grad = torch.ones(4)
    opt.step()
    opt.add_param_group({"params": [q], "weight_decay": 0.7})
    q.grad = sparse_grad(q, 3)
    with verified(opt):
        opt.step()


@every_rule
def test_replaced_memory(rule):
    p = parameter(40, 6)
    opt = rule([p], momentum_dtype=torch.float32)
    for change in (
        lambda p: p.data.clone(),
        lambda p: p.data.T.contiguous().T,
        lambda p: p.data.to(torch.bfloat16),
        lambda p: p.data.to(torch.float64),
        lambda p: torch.randn(40, 12)[:, ::2],
    ):
        p.grad = dense_grad(p)
        with verified(opt):
            opt.step()
        p.grad = None
        old = p.data
        p.data = change(p)
        keep = old.clone()
        p.grad = sparse_grad(p, 11)
        with verified(opt):
            opt.step()
        assert same_bits(old, keep)  # nothing was written to the old memory


@every_rule
def test_module_to_another_dtype(rule):
    model = torch.nn.Sequential(torch.nn.Embedding(20, 4, sparse=True), torch.nn.Linear(4, 2))
    opt = rule(model.parameters())
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        model.to(dtype)
        opt.zero_grad()
        model(torch.randint(20, (6,))).square().sum().backward()
        with verified(opt):
            opt.step()


@every_rule
def test_swapped_tensors(rule):
    p = parameter(20, 3)
    opt = rule([p])
    p.grad = dense_grad(p)
    opt.step()
    p.grad = None
    torch.utils.swap_tensors(p, parameter(20, 3))
    p.grad = sparse_grad(p, 5)
    with verified(opt):
        opt.step()


@every_rule
@pytest.mark.parametrize("layout", ["dense", "sparse"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_replaced_state(rule, layout, dtype):
    p = parameter(20, 3)
    opt = rule([p])
    p.grad = dense_grad(p)
    opt.step()
    for name, value in opt.state[p].items():
        if name != "step":
            opt.state[p][name] = value.clone().T.contiguous().T.to(dtype)
    p.grad = sparse_grad(p, 30) if layout == "sparse" else dense_grad(p)
    with verified(opt):
        opt.step()


@every_rule
def test_meta_parameters(rule):
    p = Parameter(torch.empty(4, 3, device="meta"))
    opt = rule([p])
    p.grad = torch.empty(4, 3, device="meta")
    opt.step()
    for name, value in opt.state[p].items():
        assert name == "step" or (value.shape == p.shape and value.device.type == "meta")


def test_cpu_parameter_beside_a_meta_one():
    p, q = parameter(4), Parameter(torch.empty(3, device="meta"))
    opt = AdamW([q, p])
    q.grad, p.grad = torch.empty(3, device="meta"), torch.ones(4)
    before = p.detach().clone()
    opt.step()
    assert not same_bits(p, before)


# --------------------------------------------------------------------------- lr, schedulers, hooks


@every_rule
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tensor_lr_changed_in_place(rule, dtype):
    lr = torch.tensor(0.01, dtype=dtype)
    p = parameter(30, 4)
    opt = rule([p], lr=lr)
    for value in (0.01, 0.3, 0.0, 0.05):
        lr.fill_(value)
        p.grad = sparse_grad(p, 9)
        with verified(opt):
            opt.step()
    assert opt.param_groups[0]["lr"] is lr


SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda e: 0.9**e),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=20),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.001, 0.1, step_size_up=3),
    "Sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o), lr_scheduler.ExponentialLR(o, 0.9)], [3]
    ),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, swa_lr=0.05),
}


@every_rule
@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("tensor_lr", [False, True], ids=["float", "tensor"])
def test_schedulers(rule, name, tensor_lr):
    p = parameter(30, 4)
    opt = rule([p], lr=torch.tensor(0.02) if tensor_lr else 0.02)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        scheduler = SCHEDULERS[name](opt)
    seen = set()
    for _ in range(6):
        p.grad = sparse_grad(p, 9)
        with verified(opt):
            opt.step()
        seen.add((float(opt.param_groups[0]["lr"]), opt.param_groups[0]["betas"]))
        scheduler.step()
    assert len(seen) > 1
    if name in ("OneCycleLR", "CyclicLR"):
        assert len({betas[0] for _, betas in seen}) > 1
        assert {betas[1:] for _, betas in seen} == {tuple(rule.options["betas"][1:])}
    # What the scheduler wrote into the groups does not stand in the way of a reload.
    other = rule([Parameter(p.detach().clone())])
    other.load_state_dict(opt.state_dict())


def test_first_moment_appears_when_a_scheduler_raises_beta1():
    p = parameter(30, 4)
    opt = AdamW([p], betas=(0.0, 0.99), weight_decay=0.1)
    for beta1 in (0.0, 0.5, 0.9):
        opt.param_groups[0]["betas"] = (beta1, 0.99)
        p.grad = sparse_grad(p, 9)
        with verified(opt):
            opt.step()


@every_rule
def test_closure(rule):
    p = parameter(5)
    opt = rule([p])
    calls = []

    def closure():
        assert torch.is_grad_enabled()
        opt.zero_grad()
        loss = (p * p).sum()
        loss.backward()
        calls.append(loss)
        return loss

    before = p.detach().clone()
    assert opt.step(closure) is calls[0]
    assert len(calls) == 1
    assert not same_bits(p, before)
    assert opt.step() is None
    with torch.no_grad():
        opt.step(closure)


@every_rule
def test_hooks(rule):
    p = parameter(5)
    opt = rule([p])
    p.grad = torch.ones(5)
    seen = []
    opt.register_step_pre_hook(lambda o, args, kwargs: seen.append(("before", p.detach().clone())))
    opt.register_step_post_hook(lambda o, args, kwargs: seen.append(("after", p.detach().clone())))
    opt.register_state_dict_pre_hook(lambda o: seen.append(("saving", None)))
    opt.register_state_dict_post_hook(lambda o, d: {**d, "extra": 1})
    opt.register_load_state_dict_pre_hook(lambda o, d: {k: v for k, v in d.items() if k != "extra"})
    opt.register_load_state_dict_post_hook(lambda o: seen.append(("loaded", o.state[p])))
    opt.step()
    assert [name for name, _ in seen] == ["before", "after"]
    assert not same_bits(seen[0][1], seen[1][1])
    saved = opt.state_dict()
    assert saved["extra"] == 1
    opt.load_state_dict(saved)
    assert [name for name, _ in seen[2:]] == ["saving", "loaded"]
    assert "exp_avg" in seen[-1][1] or "exp_avg_sq" in seen[-1][1]


def test_a_pre_hook_of_loading_may_replace_the_dict():
    p = parameter(5)
    opt = Tiger([p], momentum_dtype=torch.float32)
    p.grad = torch.ones(5)
    opt.step()
    other = copy.deepcopy(opt.state_dict())
    other["state"][0]["exp_avg"].fill_(3.0)
    opt.register_load_state_dict_pre_hook(lambda o, d: other)
    opt.load_state_dict(opt.state_dict())
    assert opt.state[p]["exp_avg"].tolist() == [3.0] * 5


@every_rule
def test_optimizer_step_profile_name(rule):
    p = parameter(5)
    opt = rule([p])
    p.grad = torch.ones(5)
    with torch.profiler.profile() as profile:
        opt.step()
    assert any(f"Optimizer.step#{rule.cls.__name__}.step" in e.key for e in profile.key_averages())


# ------------------------------------------------------------------------------ saving and loading


def trained(rule, dtype=torch.float32, **options):
    table, matrix = parameter(30, 4, dtype=dtype), parameter(6, 5, dtype=dtype)
    opt = rule([("table", table), ("matrix", matrix)], **options)
    for _ in range(3):
        table.grad, matrix.grad = sparse_grad(table, 20), dense_grad(matrix)
        opt.step()
    return opt, [table, matrix]


def twin(rule, params, **options):
    copies = [Parameter(p.detach().clone()) for p in params]
    return rule(list(zip(("table", "matrix"), copies)), **options), copies


def same_next_steps(opt, params, other, copies):
    for _ in range(2):
        params[0].grad, params[1].grad = sparse_grad(params[0], 20), dense_grad(params[1])
        for p, q in zip(params, copies):
            q.grad = p.grad.clone()
        opt.step()
        other.step()
    for p, q in zip(params, copies):
        assert same_bits(p, q)
        assert states_equal(opt.state[p], other.state[q])


MOMENTA = [None, torch.float32, torch.float16]


@every_rule
@pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS)
@pytest.mark.parametrize("momentum", MOMENTA, ids=["as-param", "float32", "float16"])
def test_state_dict_round_trip(rule, dtype, momentum):
    opt, params = trained(rule, dtype, momentum_dtype=momentum)
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    other, copies = twin(rule, params)  # momentum_dtype, like all options, comes with the dict
    other.load_state_dict(torch.load(file, weights_only=True))
    for p, q in zip(params, copies):
        assert states_equal(opt.state[p], other.state[q])
    for a, b in zip(opt.param_groups, other.param_groups):
        assert {k: v for k, v in a.items() if k != "params"} == {
            k: v for k, v in b.items() if k != "params"
        }
    same_next_steps(opt, params, other, copies)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_large_step_counters_survive(dtype):
    opt, params = trained(RULES[2], dtype)
    for p in params:
        opt.state[p]["step"].fill_(2**24 + 1)
    other, copies = twin(RULES[2], params)
    other.load_state_dict(opt.state_dict())
    for q in copies:
        step = other.state[q]["step"]
        assert step.dtype == torch.int64 and int(step) == 2**24 + 1
    same_next_steps(opt, params, other, copies)
    assert int(other.state[copies[0]]["step"]) == 2**24 + 3


@every_rule
def test_loaded_state_is_not_aliased(rule):
    opt, params = trained(rule)
    other, copies = twin(rule, params)
    saved = opt.state_dict()
    other.load_state_dict(saved)
    kept = copy.deepcopy(saved)
    copies[0].grad, copies[1].grad = sparse_grad(copies[0], 20), dense_grad(copies[1])
    other.step()
    for k, p in enumerate(params):
        assert states_equal(opt.state[p], kept["state"][k])
    loaded = [t.data_ptr() for q in copies for t in other.state[q].values()]
    assert not set(loaded) & {t.data_ptr() for p in params for t in opt.state[p].values()}


@every_rule
def test_loading_a_state_dict_does_not_change_it(rule):
    opt, params = trained(rule, torch.bfloat16, momentum_dtype=torch.float32)
    other, _ = twin(rule, params)
    saved = opt.state_dict()
    kept = copy.deepcopy(saved)
    other.load_state_dict(saved)
    assert set(saved) == set(kept) and saved["param_groups"] == kept["param_groups"]
    for k in kept["state"]:
        assert states_equal(saved["state"][k], kept["state"][k])


@every_rule
def test_loading_into_parameters_of_another_dtype(rule):
    opt, params = trained(rule)
    copies = [Parameter(p.detach().to(torch.bfloat16)) for p in params]
    other = rule(list(zip(("table", "matrix"), copies)))
    other.load_state_dict(opt.state_dict())
    for p, q in zip(params, copies):
        assert states_equal(opt.state[p], other.state[q])  # float32, as saved
        q.grad = dense_grad(q)
    with verified(other):
        other.step()


def test_state_dicts_of_mixed_algorithms():
    opt, params = mixed()
    for _ in range(2):
        give_gradients(params)
        opt.step()
    torch.manual_seed(0)
    other, copies = mixed()
    for name, p in params.items():
        copies[name].data.copy_(p.data)
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    give_gradients(params)
    for name, p in params.items():
        copies[name].grad = p.grad.clone()
    opt.step()
    other.step()
    for name, p in params.items():
        assert same_bits(p, copies[name])
        assert states_equal(opt.state[p], other.state[copies[name]])


def test_a_state_dict_that_does_not_fit_changes_nothing():
    opt, params = trained(RULES[2])
    other = RULES[2]([parameter(30, 4)])
    with unchanged(opt), pytest.raises(ValueError, match="size"):
        opt.load_state_dict(other.state_dict())
    same = copy.deepcopy(opt)
    copies = same.param_groups[0]["params"]
    same_next_steps(opt, params, same, copies)


@every_rule
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_of_the_optimizer_go_on_alike(rule, how):
    opt, params = trained(rule, momentum_dtype=torch.bfloat16)
    if how == "deepcopy":
        other = copy.deepcopy(opt)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(opt))
    else:
        file = io.BytesIO()
        torch.save(opt, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert type(other) is type(opt)
    assert {k: other.defaults[k] for k in opt.defaults} == opt.defaults
    copies = other.param_groups[0]["params"]
    assert copies[0] is not params[0]
    same_next_steps(opt, params, other, copies)
    other.add_param_group({"params": [("extra", parameter(2))]})


def test_loads_a_state_dict_of_torchs_own_adamw():
    # Same names, but a float32 step.
    p = parameter(7, dtype=torch.float64)
    theirs = torch.optim.AdamW([p], lr=0.01, weight_decay=0.2)
    for _ in range(3):
        p.grad = dense_grad(p)
        theirs.step()
    q = Parameter(p.detach().clone())
    ours = AdamW([q], lr=0.01, weight_decay=0.2)
    saved = theirs.state_dict()
    saved["param_groups"] = ours.state_dict()["param_groups"]
    ours.load_state_dict(saved)
    assert ours.state[q]["step"].dtype == torch.int64 and int(ours.state[q]["step"]) == 3
    p.grad = dense_grad(p)
    q.grad = p.grad.clone()
    theirs.step()
    ours.step()
    torch.testing.assert_close(q, p, rtol=1e-12, atol=1e-12)


def test_nothing_but_groups_and_state_matters():
    opt, params = trained(RULES[2])
    other = copy.deepcopy(opt)
    for name in set(vars(other)) - {"param_groups", "state", "defaults"}:
        if not name.startswith("_"):
            delattr(other, name)
    same_next_steps(opt, params, other, other.param_groups[0]["params"])


def test_distributed_checkpointing_fills_an_empty_state_without_moving_anything():
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    model = torch.nn.Linear(4, 3)
    opt = AdamW(model.parameters(), weight_decay=0.1)
    before = [p.detach().clone() for p in model.parameters()]
    state = get_optimizer_state_dict(model, opt)
    assert all(same_bits(p, b) for p, b in zip(model.parameters(), before))
    assert set(state["state"]) == {"weight", "bias"}


# -------------------------------------------------------------------------------------- GradScaler


@every_rule
@pytest.mark.parametrize("unscale", [False, True], ids=["step-unscales", "unscaled-before"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_grad_scaler(rule, unscale, dtype):
    if unscale and dtype == torch.float16:
        dtype = torch.float64  # torch refuses to unscale half-precision gradients beforehand
    table, matrix = parameter(30, 4, dtype=dtype), parameter(6, 5, dtype=dtype)
    opt = rule([table, matrix])
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=10**6)
    for step in range(4):
        assert float(scaler.scale(torch.tensor(1.0))) == 256.0 / (2.0 if step > 2 else 1.0)
        scale = 256.0 / (2.0 if step > 2 else 1.0)
        # torch itself coalesces half-precision gradients; the others stay as they are.
        table.grad = sparse_grad(table, 20, coalesced=dtype == torch.float16)
        table.grad._values().mul_(scale)
        matrix.grad = dense_grad(matrix) * scale
        if step == 2:
            table.grad._values()[3] = torch.inf
        if unscale:
            scaler.unscale_(opt)
        if step == 2:
            with unchanged(opt):
                scaler.step(opt)
        else:
            with verified(opt, scale=1.0 if unscale else scale):
                scaler.step(opt)
        scaler.update()
    assert not hasattr(opt, "grad_scale") and not hasattr(opt, "found_inf")


@every_rule
def test_an_infinite_first_step_creates_no_state(rule):
    p = parameter(6, 5)
    opt = rule([p])
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    scaler.scale(torch.tensor(1.0))
    p.grad = torch.full((6, 5), torch.inf)
    with unchanged(opt):
        scaler.step(opt)
    if p in opt.state:
        assert int(opt.state[p].get("step", 0)) == 0


@every_rule
@pytest.mark.parametrize("fused", [None, False], ids=["native", "reference"])
def test_scale_and_inf_flag_as_attributes(rule, fused):
    p = parameter(6, 5)
    opt = rule([p], fused=fused, maximize=True)
    opt.grad_scale, opt.found_inf = torch.tensor(8.0), torch.tensor(0.0)
    for _ in range(2):
        p.grad = torch.randn(6, 5) * 8
        with verified(opt, scale=8.0):
            opt.step()
    opt.found_inf.fill_(1.0)
    with unchanged(opt):
        opt.step()


# ---------------------------------------------------------------------------------- torch.compile


@every_rule
def test_compiled_step_equals_eager(rule):
    torch._dynamo.reset()
    params = [parameter(20, 3), parameter(7)]
    copies = [Parameter(p.detach().clone()) for p in params]
    eager, compiled = rule(params, lr=torch.tensor(0.02)), rule(copies, lr=torch.tensor(0.02))

    @torch.compile(backend="eager")
    def step():
        compiled.step()

    for k in range(3):
        params[0].grad = sparse_grad(params[0], 9) if k == 1 else dense_grad(params[0])
        params[1].grad = dense_grad(params[1])
        for p, q in zip(params, copies):
            q.grad = p.grad.clone()
        eager.param_groups[0]["lr"].fill_(0.02 * (k + 1))
        compiled.param_groups[0]["lr"].fill_(0.02 * (k + 1))
        eager.step()
        step()
        for p, q in zip(params, copies):
            assert same_bits(p, q)
            assert states_equal(eager.state[p], compiled.state[q])


@every_rule
def test_compiled_training_loop(rule):
    torch._dynamo.reset()
    models = [torch.nn.Linear(4, 3) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    opts = [rule(m.parameters()) for m in models]

    def train(model, opt, x):
        opt.zero_grad()
        loss = model(x).square().sum()
        loss.backward()
        opt.step()
        return loss

    fast = torch.compile(train, backend="aot_eager")
    for _ in range(3):
        x = torch.randn(8, 4)
        train(models[0], opts[0], x)
        fast(models[1], opts[1], x)
    for p, q in zip(models[0].parameters(), models[1].parameters()):
        torch.testing.assert_close(p, q)
        assert not same_bits(
            opts[1].state[q]["exp_avg_sq" if "adamw" in rule.name else "exp_avg"],
            torch.zeros_like(q),
        )


# ------------------------------------------------------------------------------ against torch.optim


def test_adamw_equals_sparse_adam():
    start = torch.randn(30, 5, dtype=torch.float64)
    ours, theirs = Parameter(start.clone()), Parameter(start.clone())
    options = dict(lr=0.03, betas=(0.8, 0.97), eps=1e-30)
    opt, ref = AdamW([ours], **options), torch.optim.SparseAdam([theirs], **options)
    for step in range(10):
        ours.grad = sparse_grad(ours, 0 if step == 4 else 25, rows=20)
        theirs.grad = ours.grad.clone()
        opt.step()
        ref.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(opt.state[ours]["exp_avg"], ref.state[theirs]["exp_avg"])
    torch.testing.assert_close(opt.state[ours]["exp_avg_sq"], ref.state[theirs]["exp_avg_sq"])
    assert int(opt.state[ours]["step"]) == int(ref.state[theirs]["step"]) == 10
    assert same_bits(ours[20:], start[20:])


def test_an_empty_gradient_advances_the_step_of_adamw():
    p = parameter(5, 2)
    opt = AdamW([p])
    for k in range(3):
        p.grad = sparse_grad(p, 0)
        with verified(opt):
            opt.step()
        assert int(opt.state[p]["step"]) == k + 1


@every_rule
def test_capturable_has_no_effect_on_the_cpu(rule):
    a = parameter(20, 3)
    b = Parameter(a.detach().clone())
    first, second = rule([a], capturable=True), rule([b])
    for _ in range(2):
        a.grad = sparse_grad(a, 9)
        b.grad = a.grad.clone()
        first.step()
        second.step()
    assert same_bits(a, b) and states_equal(first.state[a], second.state[b])


# ------------------------------------------------------------------------------- fused, subclasses


@every_class
def test_fused_true_says_why_it_cannot(cls):
    p = Parameter(torch.empty(3, device="meta"))
    opt = cls([("weight", p)], fused=True)
    p.grad = torch.empty(3, device="meta")
    with pytest.raises(RuntimeError, match=r"'weight'.*fused=True.*meta"):
        opt.step()
    assert len(opt.state) == 0


@every_rule
def test_fused_false_equals_native_in_band(rule):
    opt, params = mixed(fused=False)
    for group in opt.param_groups:
        group["fused"] = False
    for _ in range(3):
        give_gradients(params)
        with verified(opt):
            opt.step()


# ---------------------------------------------------------------------------------------- threads


def test_two_python_threads_with_an_optimizer_each():
    def problem(seed):
        generator = torch.Generator().manual_seed(seed)
        table = Parameter(torch.randn(3000, 16, generator=generator))
        dense = Parameter(torch.randn(50_000, generator=generator))
        opt = AdamW([table, dense]) if seed % 2 else Tiger([table, dense])
        grads = [
            (
                torch.randint(3000, (1, 4000), generator=generator),
                torch.randn(4000, 16, generator=generator),
                torch.randn(50_000, generator=generator),
            )
            for _ in range(5)
        ]

        def run():
            for k in range(40):
                rows, values, g = grads[k % 5]
                table.grad = torch.sparse_coo_tensor(rows, values, table.shape)
                dense.grad = g
                opt.step()

        return run, (table, dense)

    expected = []
    for seed in (1, 2):
        run, params = problem(seed)
        run()
        expected.append(params)
    runs = [problem(seed) for seed in (1, 2)]
    errors = []

    def guarded(run):
        try:
            run()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(run,)) for run, _ in runs]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not errors
    for (_, params), reference in zip(runs, expected):
        assert all(same_bits(a, b) for a, b in zip(params, reference))


def test_steps_inside_inference_mode():
    p = parameter(5)
    opt = Rule("tiger", Tiger)([p])
    p.grad = torch.ones(5)
    with torch.inference_mode(), verified(opt):
        opt.step()


@pytest.mark.parametrize("rule", SIGN_RULES, ids=lambda r: r.name)
def test_state_is_one_tensor_in_the_parameters_memory_format(rule):
    p = Parameter(torch.randn(4, 3, 5, 7).to(memory_format=torch.channels_last))
    opt = rule([p])
    p.grad = torch.randn(4, 3, 5, 7)
    opt.step()
    assert list(opt.state[p]) == ["exp_avg"]
    assert opt.state[p]["exp_avg"].stride() == p.stride()
