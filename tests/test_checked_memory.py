# SPDX-License-Identifier: Apache-2.0
"""The native side checks what it indexes by: state, masks and numbers may come from anywhere."""

import pytest
import torch
from cases import clock_of, parameter, sparse_grad
from oracle import same_bits, unchanged
from torch.nn import Parameter

from tiger_ext import AdamW, Tiger, _native
from tiger_ext.group_step import GroupStep

pytestmark = pytest.mark.skipif(_native.C is None, reason="needs the compiled module")


def in_a_window(**options):
    """Return a table in an open accumulation window whose next step has no gradient."""
    p = parameter(6, 4, 3)
    opt = Tiger([p], accumulation_steps=2, **options)
    p.grad = sparse_grad(p, 5)
    opt.step()
    p.grad = None
    return p, opt


def refused(opt, match):
    with unchanged(opt), pytest.raises(RuntimeError, match=match):
        opt.step()


@pytest.mark.parametrize("shape", [(), (6, 4)])
def test_a_clock_that_is_not_one_number_a_row_of_the_window(shape):
    p, opt = in_a_window(lazy="decay")
    opt.state[p]["last_step"] = torch.zeros(shape, dtype=torch.int32)
    refused(opt, "last_step has shape")
    del opt.state[p]["window_rows"]  # then all rows are looked at
    refused(opt, "last_step has shape")


def test_a_list_of_rows_of_another_number_of_dimensions():
    p, opt = in_a_window()
    opt.state[p]["window_rows"] = torch.zeros((2, 3), dtype=torch.int64)
    refused(opt, "window has shape")


@pytest.mark.parametrize("windows", [-1, -7])
def test_a_window_without_a_number(windows):
    p, opt = in_a_window()
    clock_of(opt).windows = windows
    refused(opt, "accumulation window has number")
    p.grad = sparse_grad(p, 3)
    refused(opt, "accumulation window has number")
    dense = Parameter(torch.ones(5))
    opt = Tiger([dense], accumulation_steps=2)
    dense.grad = torch.ones(5)
    opt.step()
    clock_of(opt).windows = windows
    refused(opt, "accumulation window has number")


@pytest.mark.parametrize("name", ["last_step", "window", "exp_avg"])
def test_state_whose_memory_is_elsewhere(name):
    p, opt = in_a_window(lazy="decay")
    p.grad = torch.ones_like(p)
    opt.state[p][name] = opt.state[p][name].to("meta")
    before = p.detach().clone()
    with pytest.raises(RuntimeError, match=name):
        opt.step()
    assert same_bits(p, before)


def test_a_clock_of_a_whole_tensor_elsewhere():
    p = parameter(300, 40)
    opt = Tiger([p], lazy="decay")
    for _ in range(2):
        p.grad = torch.ones_like(p)
        opt.step()
    opt.state[p]["last_step"] = opt.state[p]["last_step"].to("meta")
    with pytest.raises(RuntimeError, match="last_step must be"):
        opt.step()


@pytest.mark.parametrize("what", ["param", "exp_avg", "values", "last_step"])
def test_memory_that_was_given_back(what):
    p = parameter(6, 4)
    opt = Tiger([p], lazy="decay")
    p.grad = sparse_grad(p, 5)
    opt.step()
    tensors = {"param": p, "values": p.grad._values(), **opt.state[p]}
    storage = tensors[what].untyped_storage()
    kept = storage.clone()
    storage.resize_(0)
    with pytest.raises(RuntimeError, match=r"bytes of memory|last_step must be"):
        opt.step()
    storage.resize_(kept.nbytes())
    storage.copy_(kept)
    opt.step()


@pytest.mark.parametrize("state", ["exp_avg", "exp_avg_sq"])
def test_state_that_autograd_keeps_symbolic(state):
    p = parameter(6, 4)
    opt = AdamW([p])
    p.grad = torch.ones_like(p)
    opt.step()
    real = opt.state[p][state]
    opt.state[p][state] = torch._efficientzerotensor(p.shape)
    with pytest.raises(RuntimeError, match=f"{state} is a view or subclass"):
        opt.step()
    opt.state[p][state] = torch._neg_view(real)
    with pytest.raises(RuntimeError, match=f"{state} is a view or subclass"):
        opt.step()


def test_symbolic_values_of_a_sparse_gradient_count_as_what_they_are():
    p, values = Parameter(torch.zeros(3, 2)), torch.tensor([[1.0, -2.0], [3.0, 4.0]])
    opt = Tiger([p], lr=0.5, weight_decay=0.0)
    ids = torch.tensor([[0, 2]])
    p.grad = torch.sparse_coo_tensor(ids, torch._neg_view(values), p.shape)
    opt.step()
    assert p.tolist() == [[0.5, -0.5], [0.0, 0.0], [0.5, 0.5]]
    p.grad = torch.sparse_coo_tensor(ids, torch._efficientzerotensor(2, 2), p.shape)
    opt.step()
    assert p.tolist() == [[1.0, -1.0], [0.0, 0.0], [1.0, 1.0]]


@pytest.mark.parametrize("name", ["found_inf", "grad_scale"])
@pytest.mark.parametrize("numel", [0, 2])
def test_numbers_of_amp_that_are_not_one(name, numel):
    p = parameter(3)
    opt = Tiger([p])
    p.grad = torch.ones(3)
    setattr(opt, name, torch.ones(numel))
    with pytest.raises((RuntimeError, ValueError), match=r"one element|elements"):
        opt.step()


@pytest.mark.parametrize("begin,end", [(-1, 3), (0, 7), (5, 4)])
def test_rows_to_catch_up_that_do_not_exist(begin, end):
    p = parameter(6, 4)
    opt = Tiger([p], lazy="decay")
    for _ in range(2):
        p.grad = sparse_grad(p, 1)
        opt.step()
    group = GroupStep(0, opt.param_groups[0], clock_of(opt))
    group.history.place(p.device, many=False)
    state = opt.state[p]
    arguments = (p, [state["exp_avg"]], state["last_step"], group.rule(True))
    with unchanged(opt), pytest.raises(_native.C.UpdateError, match="out of range for 6 rows"):
        _native.C.catch_up(*arguments, group.history.native(), 0, None, begin, end, None, None)


def test_long_runs_of_tables_of_several_types():
    # Under UBSan: the sums of the second table's pieces are aligned like its type. The first one
    # has an odd number of pieces, of 256 entries each.
    params = [Parameter(torch.zeros(3, 1)), Parameter(torch.zeros(3, 1, dtype=torch.float64))]
    ids = torch.zeros(1, 40_000, dtype=torch.int64)
    for threads in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        opt = Tiger([Parameter(p.detach().clone()) for p in params], lr=0.5, weight_decay=0.0)
        for p in opt.param_groups[0]["params"]:
            values = torch.ones(40_000, 1, dtype=p.dtype)
            values[:2500] = 2
            p.grad = torch.sparse_coo_tensor(ids[:, :-400], values[:-400], p.shape)
        opt.step()
        torch.set_num_threads(before)
        for p in opt.param_groups[0]["params"]:
            assert p.tolist() == [[-0.5], [0.0], [0.0]]
            expected = (1 - 0.965) * (39_600 + 2500)
            torch.testing.assert_close(
                float(opt.state[p]["exp_avg"][0]), expected, rtol=1e-5, atol=0
            )
    assert not same_bits(params[0], opt.param_groups[0]["params"][0])
