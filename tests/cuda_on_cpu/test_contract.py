# SPDX-License-Identifier: Apache-2.0
"""What the optimizers promise on a GPU: values read there, counters, state dicts, ops, refusals."""

import contextlib
import copy
import functools
import pickle

import pytest
import torch
from both import (
    CPU,
    DEVICE,
    Group,
    Problem,
    Side,
    assert_agree,
    assert_same,
    assert_sides_agree,
    cpu_kernels,
    device_step,
    entries,
    problem,
    synchronize,
)
from cases import FLOATS, RULES, dense_grad, every_rule, parameter, sparse_grad
from oracle import unchanged
from torch.nn import Parameter

F32, F64, BF16, F16 = FLOATS.values()


def everything(rule, steps=3):
    """Make a problem with all kinds of parameters and gradients."""
    params = [
        parameter(1000),
        parameter(70, dtype=BF16),
        parameter(9, 30).T,  # copied on the way in and out
        parameter(33, dtype=F64),
        parameter(0),
        parameter(50, 20),
        parameter(40, 7, dtype=F16),
        parameter(30, 8).T,
        parameter(12, 3),
        parameter(5, 6, 2, dtype=F64),
    ]
    grads = []
    for _ in range(steps):
        hot = torch.cat([torch.randint(50, (200,)), torch.full((300,), 17)])
        grads.append([dense_grad(p) for p in params[:5]])
        grads[-1] += [
            entries(params[5], hot),
            sparse_grad(params[6], 60),
            sparse_grad(params[7], 5),
            sparse_grad(params[8], 0),
            sparse_grad(params[9], 20, sparse_dim=2, coalesced=True),
        ]
    return problem(rule, params, grads)


def scaled(task, factor):
    """Return the problem with all gradients multiplied."""
    steps = [[None if g is None else (g * factor).detach() for g in s] for s in task.steps]
    return Problem(task.groups, steps, task.states)


def amp_step(side, number, **tensors):
    side.step(number, functools.partial(device_step, **tensors))


def scalar(value, shape=(), dtype=F32):
    return torch.full(shape, value, dtype=dtype, device=DEVICE)


# -------------------------------------------------------------------------------------------- AMP


@every_rule
@pytest.mark.parametrize("shape", [(), (1,)], ids=["0-dim", "1-dim"])
@pytest.mark.parametrize("scale", [1024.0, 0.125])
@pytest.mark.parametrize("found_inf", [None, 0.0], ids=["scale-alone", "both"])
def test_grad_scale_is_divided_out(rule, shape, scale, found_inf):
    task = everything(rule)
    plain, amp = Side(task, DEVICE), Side(scaled(task, scale), DEVICE)
    tensors = {"grad_scale": scalar(scale, shape)}
    if found_inf is not None:
        tensors["found_inf"] = scalar(found_inf, shape)
    for number in range(3):
        plain.step(number)
        amp_step(amp, number, **tensors)
    assert_same(amp, plain)


@every_rule
@pytest.mark.parametrize("maximize", [False, True], ids=["descend", "ascend"])
def test_grad_scale_changed_in_place(rule, maximize):
    task = everything(rule)
    task.groups[0].options["maximize"] = maximize
    plain, scale = Side(task, DEVICE), scalar(1.0)
    amp = Side(Problem(task.groups, []), DEVICE)
    for number, factor in enumerate((64.0, 2.0, 4096.0)):
        amp.task.steps.append(scaled(task, factor).steps[number])
        scale.fill_(factor)
        plain.step(number)
        amp_step(amp, number, grad_scale=scale)
        assert_same(amp, plain)


@every_rule
@pytest.mark.parametrize("value", [1.0, 2.0])
@pytest.mark.parametrize("shape", [(), (1,)], ids=["0-dim", "1-dim"])
@pytest.mark.parametrize("scale", [None, 1024.0], ids=["alone", "with-scale"])
def test_found_inf_cancels_the_step(rule, value, shape, scale):
    side = Side(everything(rule), DEVICE)
    side.step(0)
    grad_scale = None if scale is None else scalar(scale)
    found_inf = scalar(value, shape)
    with unchanged(side.opt):
        amp_step(side, 1, grad_scale=grad_scale, found_inf=found_inf)
        synchronize()


@every_rule
def test_cancelled_steps_leave_no_trace(rule):
    """Not even the first one: steps 0 and 2 are cancelled."""
    task = everything(rule, steps=4)
    amp, found_inf = Side(task, DEVICE), scalar(0.0)
    for number, value in enumerate((1.0, 0.0, 1.0, 0.0)):
        found_inf.fill_(value)
        amp_step(amp, number, found_inf=found_inf)
    plain = Side(task, DEVICE)
    plain.step(1)
    plain.step(3)
    assert_same(amp, plain)


@every_rule
def test_a_cancelled_first_step_leaves_only_zeros(rule):
    task = everything(rule)
    side = Side(task, DEVICE)
    amp_step(side, 0, found_inf=scalar(1.0))
    for p, start in zip(side.params, task.params):
        assert_agree(p, start, "parameter")
        assert not any(bool(t.any()) for t in side.opt.state[p].values())


@every_rule
def test_a_cancelled_step_writes_nothing_for_bad_indices_either(rule):
    p = Parameter(torch.randn(30, 4).to(DEVICE))
    opt = rule([p])
    p.grad = entries(torch.randn(30, 4), [4, 7]).to(DEVICE)
    opt.step()
    bad = entries(torch.randn(30, 4), [4, 30, -1])
    p.grad = torch.sparse_coo_tensor(
        bad._indices().to(DEVICE), bad._values().to(DEVICE), bad.shape, check_invariants=False
    )
    with unchanged(opt):
        device_step(opt, found_inf=scalar(1.0))
        synchronize()


# ------------------------------------------------------------------------------- learning rates


@every_rule
@pytest.mark.parametrize("dtype", [F32, F64], ids=["float32", "float64"])
def test_lr_tensor_changed_in_place(rule, dtype):
    task = everything(rule)
    by_tensor, by_float = Side(task, DEVICE), Side(task, DEVICE)
    lr = scalar(0.5, dtype=dtype)
    by_tensor.opt.param_groups[0]["lr"] = lr
    for number, value in enumerate((0.02, 0.3, 1e-3)):
        lr.fill_(value)
        by_float.opt.param_groups[0]["lr"] = float(lr)
        by_float.step(number)
        by_tensor.step(number, device_step)
        assert_same(by_tensor, by_float)


@every_rule
def test_lr_tensors_and_floats_in_the_groups_of_one_step(rule):
    def groups(rates):
        parts = [everything(rule, 2) for _ in rates]
        task = Problem([Group(rule, t.params, {}) for t in parts], [])
        task.steps = [[g for t in parts for g in t.steps[k]] for k in range(2)]
        return task

    rates = [0.02, 0.3, 1e-3, 0.07]
    task = groups(rates)
    by_tensor, by_float = Side(task, DEVICE), Side(task, DEVICE)
    for k, rate in enumerate(rates):
        lr = scalar(rate, dtype=[F32, F64][k // 2]) if k != 1 else rate
        by_tensor.opt.param_groups[k]["lr"] = lr
        by_float.opt.param_groups[k]["lr"] = float(lr)
    for number in range(2):
        by_float.step(number)
        by_tensor.step(number, device_step)
    assert_same(by_tensor, by_float)


@every_rule
def test_lr_tensor_and_amp_together(rule):
    task = everything(rule)
    amp, plain = Side(scaled(task, 256.0), DEVICE), Side(task, DEVICE)
    amp.opt.param_groups[0]["lr"] = lr = scalar(0.04, dtype=F64)
    plain.opt.param_groups[0]["lr"] = 0.04
    found_inf = scalar(0.0)
    for number, value in enumerate((0.0, 1.0, 0.0)):
        found_inf.fill_(value)
        scale = scalar(256.0)
        amp_step(amp, number, grad_scale=scale, found_inf=found_inf)
        if value == 0.0:
            plain.step(number)
    assert_same(amp, plain)
    assert float(lr) == 0.04


# -------------------------------------------------------------------------------- state and dicts


@pytest.mark.parametrize("rule", RULES[2:], ids=lambda r: r.name)
def test_every_parameter_counts_its_own_steps(rule):
    task = everything(rule, steps=4)
    missing = [(0, 1), (2, 1), (3, 1), (0, 4), (1, 5), (1, 8), (2, 8)]
    for number, k in missing:
        task.steps[number][k] = None
    side = Side(task, DEVICE)
    for number in range(4):
        side.step(number)
    for k, p in enumerate(side.params):
        step = side.opt.state[p]["step"]
        assert (step.dtype, step.shape, step.device) == (torch.int64, (), p.device)
        assert int(step) == 4 - sum(j == k for _, j in missing)


@every_rule
def test_a_state_dict_travels_from_the_cpu_and_back(rule):
    task = everything(rule, steps=6)
    with cpu_kernels():
        expected = Side(task, CPU)
        for number in range(6):
            expected.step(number)
        traveller = Side(task, CPU)
        for number in range(2):
            traveller.step(number)
    legs = ((DEVICE, contextlib.nullcontext(), (2, 3)), (CPU, cpu_kernels(), (4, 5)))
    for device, kernels, steps in legs:
        there = Side(task, device)
        for p, old in zip(there.params, traveller.params):
            p.data.copy_(old)
        there.opt.load_state_dict(traveller.opt.state_dict())
        with kernels:
            for number in steps:
                there.step(number)
        traveller = there
    assert_sides_agree(traveller, expected.snapshot(), "after the journey", 6)


@every_rule
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_go_on_alike(rule, how):
    task = everything(rule)
    side = Side(task, DEVICE)
    side.step(0)
    twin = Side(task, DEVICE)
    opt = copy.deepcopy(side.opt) if how == "deepcopy" else pickle.loads(pickle.dumps(side.opt))
    twin.opt, twin.params = opt, opt.param_groups[0]["params"]
    for number in (1, 2):
        side.step(number)
        twin.step(number)
    assert_same(twin, side)


# -------------------------------------------------------------------------------------- refusals


def _expanded(p, opt):
    p.data = torch.ones(1, device=DEVICE).expand(p.shape)


def _short_state(p, opt):
    opt.state[p]["exp_avg"] = torch.zeros(3, device=DEVICE)


def _integer_state(p, opt):
    opt.state[p]["exp_avg"] = torch.zeros(p.shape, dtype=torch.int32, device=DEVICE)


def _expanded_state(p, opt):
    opt.state[p]["exp_avg"] = torch.zeros(1, device=DEVICE).expand(p.shape)


@pytest.mark.parametrize("rule", RULES[:3], ids=lambda r: r.name)
@pytest.mark.parametrize("spoil", [_expanded, _short_state, _integer_state, _expanded_state])
@pytest.mark.parametrize("layout", ["dense", "rows"])
def test_what_is_refused_changes_nothing(rule, spoil, layout):
    good, bad = (Parameter(torch.ones(6, 4, device=DEVICE)) for _ in range(2))
    opt = rule([("good", good), ("bad", bad)], fused=True)
    for p in (good, bad):
        p.grad = torch.ones(6, 4, device=DEVICE)
    opt.step()
    if layout == "rows":
        bad.grad = torch.ones(6, 4, device=DEVICE).to_sparse(1)
    spoil(bad, opt)
    with unchanged(opt), pytest.raises(RuntimeError, match=r"'bad'"):
        opt.step()
