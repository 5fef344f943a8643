# SPDX-License-Identifier: Apache-2.0
"""torch's own contract for optimizers, driven by its OptimizerInfo tables.

The loops follow what torch's suite asks of every optimizer; the tables describe ours.
"""

import copy
import inspect
import io
import pickle
import warnings

import pytest
import torch
from oracle import same_bits, unchanged, verified
from torch.nn import Parameter
from torch.optim.lr_scheduler import (
    CyclicLR,
    ExponentialLR,
    LinearLR,
    OneCycleLR,
    PolynomialLR,
    ReduceLROnPlateau,
    StepLR,
)
from torch.testing._internal import common_optimizers
from torch.testing._internal.common_optimizers import (
    ErrorOptimizerInput,
    OptimizerErrorEnum,
    OptimizerInfo,
    OptimizerInput,
)

from tiger_ext import AdamW, Lion, Tiger


def inputs(*own):
    """Return a table's function: what all three share, and an algorithm's own cases."""
    shared = [
        OptimizerInput(params=None, kwargs={}, desc="default"),
        OptimizerInput(params=None, kwargs={"lr": 0.01}, desc="non-default lr"),
        OptimizerInput(params=None, kwargs={"lr": torch.tensor(0.001)}, desc="Tensor lr"),
        OptimizerInput(params=None, kwargs={"weight_decay": 0.1}, desc="nonzero weight_decay"),
        OptimizerInput(
            params=None, kwargs={"weight_decay": 0.1, "maximize": True}, desc="maximize"
        ),
        OptimizerInput(params=None, kwargs={"capturable": True}, desc="capturable"),
        OptimizerInput(
            params=None,
            kwargs={"momentum_dtype": torch.bfloat16, "weight_decay": 0.1},
            desc="bfloat16 momentum",
        ),
    ]
    return lambda device, dtype=None: copy.deepcopy(shared + list(own))


def error_inputs(*own):
    """Return a table's function: torch's errors of all optimizers, ours of all, and its own."""

    def table(device, dtype):
        general = getattr(common_optimizers, "get_error_inputs_for_all_optims", None)
        errors = list(general(device, dtype)) if general else []
        for e in errors:
            if e.optimizer_error_input.desc == "Tensor lr must be 1-element":
                e.error_regex = r"lr=tensor.*0-dim"
            if e.error_type is UserWarning and "duplicate" in e.error_regex:
                # torch announces an error for the future; threads make it one here.
                e.error_type, e.error_regex = ValueError, "one tensor"
        bad = [
            ({"lr": -1e-3}, ValueError, r"lr=-0\.001.*>= 0"),
            ({"weight_decay": -1}, ValueError, r"weight_decay=-1.*>= 0"),
            ({"momentum_dtype": torch.int32}, ValueError, r"momentum_dtype=torch\.int32.*float16"),
            ({"fused": "yes"}, ValueError, r"fused='yes'.*None, True or False"),
            ({"foreach": True}, TypeError, "foreach"),
            *own,
        ]
        errors += [
            ErrorOptimizerInput(
                OptimizerInput(params=None, kwargs=kwargs, desc=f"{kwargs}"),
                error_type=kind,
                error_regex=regex,
            )
            for kwargs, kind, regex in bad
        ]
        return errors + step_errors()

    return table


def step_errors():
    table = Parameter(torch.ones(3, 2))
    table.grad = torch.sparse_coo_tensor([[3]], torch.ones(1, 2), (3, 2), check_invariants=False)
    expanded = torch.ones(1).expand(4).requires_grad_()
    expanded.grad = torch.ones(4)
    return [
        ErrorOptimizerInput(
            OptimizerInput(params=[("table", table)], kwargs={}, desc="row out of range"),
            error_on=OptimizerErrorEnum.STEP_ERROR,
            error_type=IndexError,
            error_regex=r"'table'.* 3\b.*3 rows",
        ),
        ErrorOptimizerInput(
            OptimizerInput(params=[expanded], kwargs={}, desc="expanded parameter"),
            error_on=OptimizerErrorEnum.STEP_ERROR,
            error_type=RuntimeError,
            error_regex="same memory",
        ),
    ]


SCHEDULERS = (
    [lambda opt: StepLR(opt, gamma=0.9, step_size=10)],
    [lambda opt: ReduceLROnPlateau(opt)],
    [lambda opt: LinearLR(opt, start_factor=0.4, total_iters=4)],
    [
        lambda opt: StepLR(opt, gamma=0.99, step_size=10),
        lambda opt: ExponentialLR(opt, gamma=0.99),
        lambda opt: ReduceLROnPlateau(opt),
    ],
    [lambda opt: PolynomialLR(opt, power=0.9, total_iters=100)],
    [lambda opt: OneCycleLR(opt, max_lr=0.02, total_steps=100)],
    [lambda opt: CyclicLR(opt, 1e-3, 1e-2, step_size_up=5)],
)


def info(cls, inputs_func, error_func):
    arguments = dict(
        optim_inputs_func=inputs_func,
        optim_error_inputs_func=error_func,
        scheduler_inputs=SCHEDULERS,
        supported_impls=("fused",),
        supports_fused_on=("cpu",),
        supports_sparse=True,
        has_capturable_arg=True,
        supports_complex=False,
        metadata_for_sparse=({"lr": 0.01}, [lambda opt: StepLR(opt, gamma=0.99999, step_size=300)]),
    )
    known = inspect.signature(OptimizerInfo.__init__).parameters
    return OptimizerInfo(cls, **{k: v for k, v in arguments.items() if k in known})


INFOS = [
    info(
        Tiger,
        inputs(OptimizerInput(params=None, kwargs={"betas": (0.5,)}, desc="non-default betas")),
        error_inputs(
            ({"betas": (1.0,)}, ValueError, r"betas=\(1\.0,\).*\[0, 1\)"),
            ({"betas": (0.9, 0.99)}, ValueError, r"betas=\(0\.9, 0\.99\).*1 number"),
        ),
    ),
    info(
        Lion,
        inputs(OptimizerInput(params=None, kwargs={"betas": (0.5, 0.6)}, desc="betas")),
        error_inputs(
            ({"betas": (0.9, 1.0)}, ValueError, r"betas=\(0\.9, 1\.0\).*\[0, 1\)"),
            ({"accumulation_steps": 2}, TypeError, "accumulation_steps"),
        ),
    ),
    info(
        AdamW,
        inputs(
            OptimizerInput(params=None, kwargs={"betas": (0.0, 0.9)}, desc="no first moment"),
            OptimizerInput(params=None, kwargs={"eps": 1e-3}, desc="non-default eps"),
        ),
        error_inputs(
            ({"betas": (0.0, 1.0)}, ValueError, r"betas=\(0\.0, 1\.0\).*\[0, 1\)"),
            ({"eps": -1e-8}, ValueError, r"eps=-1e-08.*>= 0"),
            ({"scale": None}, TypeError, "scale"),
        ),
    ),
]
CASES = [
    pytest.param(i, case, id=f"{i.name}-{case.desc}")
    for i in INFOS
    for case in i.optim_inputs_func("cpu")
]
every_info = pytest.mark.parametrize("info", INFOS, ids=lambda i: i.name)
every_case = pytest.mark.parametrize("info,case", CASES)


def make(info, case, params, **options):
    return info.optim_cls(params, **{**copy.deepcopy(case.kwargs), **options})


def torchs_inputs(info):
    """Every input, with fused False and True, as torch's own suite would enumerate them."""
    helper = getattr(common_optimizers, "_get_optim_inputs_including_global_cliquey_kwargs", None)
    if helper is None:
        return [
            OptimizerInput(None, {**case.kwargs, "fused": fused}, f"{case.desc} {fused}")
            for case in info.optim_inputs_func("cpu")
            for fused in (False, True)
        ]
    return helper("cpu", torch.float32, info)


# -------------------------------------------------------------------------------------- errors


@pytest.mark.indices_checked_at_once
@every_info
def test_errors(info):
    cases = info.optim_error_inputs_func("cpu", torch.float32)
    assert len(cases) >= 8
    for e in cases:
        case = e.optimizer_error_input
        params = [Parameter(torch.randn(1))] if case.params is None else case.params
        if e.error_on == OptimizerErrorEnum.STEP_ERROR:
            opt = info.optim_cls(params, **case.kwargs)
            with unchanged(opt), pytest.raises(e.error_type, match=e.error_regex):
                opt.step()
        elif issubclass(e.error_type, Warning):
            with pytest.warns(e.error_type, match=e.error_regex):
                info.optim_cls(params, **case.kwargs)
        else:
            with pytest.raises(e.error_type, match=e.error_regex):
                info.optim_cls(params, **case.kwargs)


@every_info
def test_tables_do_not_name_what_torch_adds(info):
    for case in info.optim_inputs_func("cpu"):
        assert not set(case.kwargs) & {"foreach", "fused", "differentiable"}
    assert {c.kwargs["fused"] for c in torchs_inputs(info)} == {False, True}


# ------------------------------------------------------------------------------ right direction


@every_info
@pytest.mark.parametrize("contiguous", [True, False], ids=["contiguous", "strided"])
@pytest.mark.parametrize("schedulers", [(), *SCHEDULERS], ids=lambda s: f"{len(s)}-schedulers")
def test_forloop_goes_right_direction(info, contiguous, schedulers):
    for case in torchs_inputs(info):
        if schedulers and isinstance(case.kwargs.get("lr"), torch.Tensor):
            continue
        torch.manual_seed(1)
        if contiguous:
            weight, bias = Parameter(torch.randn(10, 5)), Parameter(torch.randn(10))
        else:
            weight = Parameter(torch.randn(10, 5, 2)[..., 0])
            bias = Parameter(torch.randn(10, 2)[..., 0])
        x = torch.randn(5)
        opt = info.optim_cls([weight, bias], **copy.deepcopy(case.kwargs))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            running = [make_scheduler(opt) for make_scheduler in schedulers]

        def closure(opt=opt, weight=weight, bias=bias, x=x):
            opt.zero_grad()
            loss = (weight.mv(x) + bias).pow(2).sum()
            loss.backward()
            return loss

        first = closure().item()
        for _ in range(30):
            if running:
                closure()
                opt.step()
                for s in running:
                    s.step(closure()) if isinstance(s, ReduceLROnPlateau) else s.step()
            else:
                opt.step(closure)
        last = closure().item()
        assert (last > first) == bool(case.kwargs.get("maximize")), case.desc
        assert last != first


@every_info
def test_param_groups_with_their_own_lr_and_decay(info):
    for case in torchs_inputs(info):
        kwargs = {k: v for k, v in case.kwargs.items() if k not in ("lr", "weight_decay")}
        moved, still, shrunk = (Parameter(torch.ones(5)) for _ in range(3))
        opt = info.optim_cls(
            [
                {"params": [moved]},
                {"params": [still], "lr": 0.0},
                {"params": [shrunk], "weight_decay": 0.5},
            ],
            lr=0.1,
            weight_decay=0.0,
            **kwargs,
        )
        moved.grad, still.grad, shrunk.grad = torch.ones(5), torch.ones(5), torch.zeros(5)
        opt.step()
        assert torch.equal(still, torch.ones(5))
        assert bool((moved > 1).all() if kwargs.get("maximize") else (moved < 1).all())
        torch.testing.assert_close(shrunk, torch.full((5,), 0.95))


@every_info
def test_tensor_lr_equals_float_lr(info):
    for case in info.optim_inputs_func("cpu"):
        params = [Parameter(torch.linspace(-1, 1, 20)) for _ in range(3)]
        lrs = (0.01, torch.tensor(0.01, dtype=torch.float64), torch.tensor(0.01))
        opts = [make(info, case, [p], lr=lr) for p, lr in zip(params, lrs)]
        for _ in range(5):
            grad = torch.randn(20)
            for p, opt in zip(params, opts):
                p.grad = grad.clone()
                opt.step()
        assert same_bits(params[0], params[1]), case.desc
        torch.testing.assert_close(params[0], params[2])


# ----------------------------------------------------------------------------------- no-ops


@every_case
def test_step_is_noop_without_gradients(info, case):
    params = [Parameter(torch.ones(3)), Parameter(torch.ones(2), requires_grad=False)]
    opt = make(info, case, params)
    with unchanged(opt):
        opt.step()


@every_case
@pytest.mark.parametrize("layout", ["dense", "sparse"])
def test_step_is_noop_for_zero_gradients(info, case, layout):
    p = Parameter(torch.randn(5, 1))
    opt = make(info, case, [p], weight_decay=0.0)
    for _ in range(3):
        zero = torch.zeros(5, 1)
        p.grad = zero if layout == "dense" else torch.sparse_coo_tensor([[1, 1]], zero[:2], (5, 1))
        before = p.detach().clone()
        opt.step()
        assert same_bits(p, before)


@every_case
def test_empty_gradient(info, case):
    p = Parameter(torch.ones(10, 0))
    q = Parameter(torch.ones(3))
    opt = make(info, case, [p, q])
    for _ in range(2):
        p.grad, q.grad = torch.ones(10, 0), torch.randn(3)
        with verified(opt):
            opt.step()


@every_case
def test_grads_are_never_written(info, case):
    dense, table = Parameter(torch.randn(6, 4)), Parameter(torch.randn(6, 4))
    opt = make(info, case, [dense, table])
    dense.grad = torch.randn(6, 4)
    table.grad = torch.sparse_coo_tensor([[5, 1, 5]], torch.randn(3, 4), (6, 4))
    kept = dense.grad.clone(), table.grad._values().clone()
    objects = dense.grad, table.grad
    for _ in range(3):
        opt.step()
    assert dense.grad is objects[0] and table.grad is objects[1]
    assert same_bits(dense.grad, kept[0]) and same_bits(table.grad._values(), kept[1])
    assert dense.grad._version == 0 and not table.grad.is_coalesced()


# ----------------------------------------------------------------------------------- sparse


@every_info
@pytest.mark.parametrize("scheduled", [False, True])
@pytest.mark.parametrize("maximize", [False, True])
def test_rosenbrock_sparse(info, scheduled, maximize):
    assert info.supports_sparse
    kwargs, schedulers = info.metadata_for_sparse
    p, twin = (Parameter(torch.tensor([1.5, 1.5])) for _ in range(2))
    opt = info.optim_cls([p], maximize=maximize, **kwargs)
    other = info.optim_cls([twin], maximize=maximize, fused=False, **kwargs)
    running = [s(o) for s in schedulers for o in (opt, other)] if scheduled else []

    def value(x):
        a, b = x.tolist()
        return 100 * (b - a * a) ** 2 + (1 - a) ** 2

    def gradient(x, which):
        a, b = x.tolist()
        grad = torch.tensor([-400 * a * (b - a * a) + 2 * (a - 1), 200 * (b - a * a)])
        # As two halves of the same entry, which only their sum puts together again.
        half = grad[which] / 2 * (-1 if maximize else 1)
        return torch.sparse_coo_tensor([[which, which]], torch.stack([half, half]), (2,))

    start = value(p)
    for k in range(400):
        p.grad = gradient(p, k % 2)
        twin.grad = gradient(p, k % 2)
        opt.step()
        other.step()
        for s in running:
            s.step()
    torch.testing.assert_close(p, twin)
    assert value(p) < start / 20


@every_case
def test_sparse_equals_dense_when_all_rows_are_touched(info, case):
    a = Parameter(torch.randn(7, 3))
    b = Parameter(a.detach().clone())
    first, second = make(info, case, [a]), make(info, case, [b])
    for _ in range(3):
        b.grad = torch.randn(7, 3)
        a.grad = b.grad.to_sparse(1)
        first.step()
        second.step()
    assert same_bits(a, b)


# ----------------------------------------------------------------------------- saving and copying


def trained(info, case, **options):
    p, table = Parameter(torch.randn(4, 3)), Parameter(torch.randn(6, 2))
    opt = make(info, case, [p, table], **options)
    train(opt, [p, table], 3)
    return opt, [p, table]


def train(opt, params, steps, seed=7):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        params[0].grad = torch.randn(4, 3, generator=generator)
        rows = torch.randint(6, (1, 5), generator=generator)
        params[1].grad = torch.sparse_coo_tensor(
            rows, torch.randn(5, 2, generator=generator), (6, 2)
        )
        opt.step()


def assert_goes_on_alike(opt, params, other, copies):
    train(opt, params, 2, seed=9)
    train(other, copies, 2, seed=9)
    for p, q in zip(params, copies):
        assert same_bits(p, q)
        for name, value in opt.state[p].items():
            assert same_bits(value, other.state[q][name])


@every_case
@pytest.mark.parametrize("weights_only", [True, False])
def test_save_and_load_state_dict(info, case, weights_only):
    opt, params = trained(info, case)
    assert len(opt.state) == 2 and all(opt.state.values())
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    copies = [Parameter(p.detach().clone()) for p in params]
    other = info.optim_cls(copies)
    other.load_state_dict(torch.load(file, weights_only=weights_only))
    assert_goes_on_alike(opt, params, other, copies)


@every_case
def test_deepcopy_and_pickle(info, case):
    for duplicate in (copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))):
        opt, params = trained(info, case)
        other = duplicate(opt)
        assert not other.state.keys() & opt.state.keys()
        assert_goes_on_alike(opt, params, other, other.param_groups[0]["params"])


@every_info
def test_deepcopy_keeps_public_attributes(info):
    opt = info.optim_cls([Parameter(torch.ones(2))])
    public = {k for k in vars(opt) if not k.startswith("_")}
    assert public == {k for k in vars(copy.deepcopy(opt)) if not k.startswith("_")}


@every_case
def test_loads_older_state_dicts(info, case):
    # One written before the options that came later.
    opt, params = trained(info, case, fused=None)
    old = copy.deepcopy(opt.state_dict())
    kept = {"params", "lr", "betas", "eps", "weight_decay", "maximize", "momentum_dtype"}
    for group in old["param_groups"]:
        for key in set(group) - kept:
            del group[key]
    copies = [Parameter(p.detach().clone()) for p in params]
    other = info.optim_cls(copies)
    other.load_state_dict(old)
    assert set(other.param_groups[0]) == set(opt.param_groups[0])
    assert_goes_on_alike(opt, params, other, copies)


@every_case
def test_is_printed_with_its_options(info, case):
    text = repr(make(info, case, [Parameter(torch.ones(2))]))
    assert text.startswith(info.name)
    for option in ("lr:", "betas:", "weight_decay:", f"algorithm: {info.name.lower()}"):
        assert option in text


@every_info
def test_zero_grad(info):
    p = Parameter(torch.ones(2))
    opt = info.optim_cls([p])
    p.grad = torch.ones(2)
    opt.zero_grad(set_to_none=False)
    assert p.grad.tolist() == [0.0, 0.0]
    opt.zero_grad()
    assert p.grad is None


@every_info
def test_is_an_optimizer_of_torch(info):
    assert issubclass(info.optim_cls, torch.optim.Optimizer)
    signature = inspect.signature(info.optim_cls.__init__).parameters
    for name in list(signature)[1:]:
        keyword = signature[name].kind is inspect.Parameter.KEYWORD_ONLY
        positional = name in ("params", "lr", "betas", "eps", "weight_decay")
        assert keyword != positional
