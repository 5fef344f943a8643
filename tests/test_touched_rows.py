# SPDX-License-Identifier: Apache-2.0
import copy
import io
import re

import psutil
import pytest
import torch
import torch.nn.functional as F
from cases import VIEWS, every_rule, parameter, set_grad, views
from oracle import same_bits, unchanged
from published import (
    DIMS,
    PRECISIONS,
    backends,
    momentum_of,
    precisions,
    verified_window,
)
from torch import nn
from torch.nn import Parameter

from tiger_ext import AdamW, Lion, Tiger

HYPER = dict(lr=0.05, betas=(0.9,), weight_decay=0.3)


def rows_grad(p, rows, dtype=None):
    """Make a strided gradient that is zero outside ``rows``."""
    grad = torch.zeros(p.shape, dtype=dtype or p.dtype)
    rows = torch.as_tensor(rows, dtype=torch.int64)
    grad[rows] = torch.randn(len(rows), *p.shape[1:], dtype=torch.float64).to(grad.dtype)
    return grad


def as_sparse(grad, rows):
    rows = torch.as_tensor(rows, dtype=torch.int64)
    return torch.sparse_coo_tensor(rows[None], grad[rows], grad.shape)


def changed_rows(p, before):
    return [r for r in range(len(p)) if not same_bits(p.detach()[r], before[r])]


# ---------------------------------------------------------------------------------- rows="nonzero"


@backends
@pytest.mark.parametrize("dim", DIMS)
@precisions
def test_values(dim, dtype, fused):
    p = parameter(23, dim, dtype=dtype)
    opt = Tiger([p], **HYPER, rows="nonzero", fused=fused)
    for rows in ([5], [0, 22], range(23), [], [1, 5, 6, 7]):
        (o,) = verified_window(opt, [p], [rows_grad(p, list(rows))])
        assert o.moved.nonzero()[:, 0].tolist() == list(rows)


@backends
@pytest.mark.parametrize("rows", [1, 2, 513, 5000])
@pytest.mark.parametrize("share", [0.01, 0.5, 1.0])
def test_numbers_of_rows(rows, share, fused):
    p = parameter(rows, 5)
    opt = Lion([p], lr=0.1, weight_decay=0.3, rows="nonzero", fused=fused)
    for _ in range(2):
        touched = (torch.rand(rows) < share).nonzero()[:, 0]
        verified_window(opt, [p], [rows_grad(p, touched)])


@backends
@pytest.mark.parametrize("dim", DIMS)
def test_one_nonzero_element_anywhere_keeps_the_row(dim, fused):
    columns = sorted({*range(min(dim, 40)), *range(0, dim, 61), dim // 2, dim - 1})
    p = parameter(2 * len(columns), dim)
    grad = torch.zeros(p.shape)
    for k, c in enumerate(columns):
        grad[2 * k, c] = 1e-3 * (-1) ** k
    before = p.detach().clone()
    p.grad = grad
    Tiger([p], **HYPER, rows="nonzero", fused=fused).step()
    assert changed_rows(p, before) == list(range(0, 2 * len(columns), 2))


@backends
@pytest.mark.parametrize("grad_dtype", PRECISIONS.values(), ids=PRECISIONS)
def test_sums_and_norms_do_not_decide(grad_dtype, fused):
    least = {torch.float32: 1e-45, torch.float64: 5e-324, torch.bfloat16: 9.2e-41}[grad_dtype]
    p = parameter(9, 2)
    values = [[0, 0], [1, -1], [0, 0], [least, 0], [0, -least], [-0.0, 0], [-0.0, -0.0]]
    values += [[least, -least], [0, 0]]
    grad = torch.tensor(values, dtype=torch.float64).to(grad_dtype)
    opt = Tiger([p], **HYPER, rows="nonzero", fused=fused)
    opt.state[p]["exp_avg"] = torch.randn(9, 2)
    before, m = p.detach().clone(), opt.state[p]["exp_avg"].clone()
    set_grad(p, grad)
    opt.step()
    assert changed_rows(p, before) == [1, 3, 4, 7]
    assert changed_rows(opt.state[p]["exp_avg"], m) == [1, 3, 4, 7]


@backends
def test_nan_and_infinity_are_no_zeros(fused):
    p = parameter(4, 3)
    before = p.detach().clone()
    p.grad = torch.zeros(4, 3)
    p.grad[1, 2], p.grad[3, 0] = torch.nan, torch.inf
    Tiger([p], **HYPER, rows="nonzero", fused=fused).step()
    assert changed_rows(p, before) == [1, 3]
    assert p[1].isnan().tolist() == [False, False, True]


@backends
@every_rule
@pytest.mark.parametrize("dim", [1, 7, 64, 300])
def test_equals_the_sparse_gradient_of_the_same_rows(rule, dim, fused):
    a = parameter(50, dim)
    b = Parameter(a.detach().clone())
    first, second = rule([a], rows="nonzero", fused=fused), rule([b], fused=fused)
    for rows in ([3, 4, 40], [], [0, 4, 49], range(50)):
        grad = rows_grad(a, list(rows))
        a.grad, b.grad = grad, as_sparse(grad, list(rows))
        first.step()
        second.step()
        assert same_bits(a, b)
        assert set(first.state[a]) >= set(second.state[b])
        for name, s in second.state[b].items():
            assert same_bits(first.state[a][name], s), name


@backends
@views("param", 2)
def test_memory_layouts_of_parameter_and_gradient(param, fused):
    p = Parameter(param.make(torch.randn(19, 11)))
    opt = Tiger([p], **HYPER, rows="nonzero", fused=fused)
    for view in [v for v in VIEWS if v.dims <= 2]:
        verified_window(opt, [p], [view.make(rows_grad(p, [0, 3, 7, 18]))])


@backends
def test_expanded_gradients(fused):
    p = parameter(9, 4)
    opt = Tiger([p], **HYPER, rows="nonzero", fused=fused)
    column = rows_grad(torch.zeros(9, 1), [2, 5])
    for grad in (column.expand(9, 4), torch.zeros(1, 1).expand(9, 4), torch.randn(4).expand(9, 4)):
        verified_window(opt, [p], [grad])


@backends
@pytest.mark.parametrize("shape", [(5, 2, 3), (4, 1), (0, 4), (4, 0), (2, 3, 1, 4)])
def test_shapes(shape, fused):
    p = parameter(*shape)
    opt = Tiger([p], **HYPER, rows="nonzero", fused=fused)
    verified_window(opt, [p], [rows_grad(p, [k for k in range(len(p)) if k % 2])])


@backends
@pytest.mark.parametrize("rows", ["nonzero", "tracked"])
def test_vectors_are_updated_whole(rows, fused):
    params = [parameter(6), parameter()]
    opt = Tiger(params, **HYPER, rows=rows, fused=fused)
    for p in params:
        p.grad = torch.zeros(p.shape)
    before = [p.detach().clone() for p in params]
    opt.step()
    for p, b in zip(params, before):
        torch.testing.assert_close(p.detach(), b * (1 - 0.05 * 0.3))


@backends
@every_rule
def test_a_zero_gradient_touches_nothing(rule, fused):
    p = parameter(6, 3)
    opt = rule([p], rows="nonzero", fused=fused)
    p.grad = rows_grad(p, [1, 2])
    opt.step()
    before = p.detach().clone()
    state = {k: v.clone() for k, v in opt.state[p].items() if k != "step"}
    for zero in (0.0, -0.0):
        p.grad = torch.full((6, 3), zero)
        opt.step()
        assert same_bits(p, before)
        assert all(same_bits(opt.state[p][k], v) for k, v in state.items())


@backends
@pytest.mark.parametrize("rows", ["nonzero", "tracked"])
def test_sparse_gradients_say_their_rows_themselves(rows, fused):
    module = nn.Embedding(9, 4)
    p = module.weight
    opt = Tiger([p], **HYPER, rows=rows, fused=fused)
    opt.track(module)
    before = p.detach().clone()
    p.grad = torch.sparse_coo_tensor([[2, 7]], torch.zeros(2, 4), p.shape)
    opt.step()
    assert changed_rows(p, before) == [2, 7]


@backends
def test_alternating_layouts(fused):
    p = parameter(20, 6)
    opt = Tiger([p], **HYPER, rows="nonzero", fused=fused)
    for k in range(6):
        grad = rows_grad(p, [k, 2 * k, 19])
        verified_window(opt, [p], [as_sparse(grad, [k, 2 * k + 1]) if k % 2 else grad])


# A strided gradient's rows are those of the first dimension, whatever the sparse gradients' were.


def after_two_sparse_dimensions(rows, fused, **options):
    """Return a table whose state is for rows of two dimensions, one more step behind it."""
    p = Parameter(torch.randn(5, 3, 4))
    opt = Tiger([p], **HYPER, rows=rows, fused=fused, **options)
    for _ in range(options.get("accumulation_steps", 1)):
        p.grad = torch.sparse_coo_tensor([[0, 0, 1, 4], [0, 1, 2, 2]], torch.randn(4, 4), p.shape)
        opt.step()
    return p, opt


@backends
@pytest.mark.parametrize("lazy", ["frozen", "decay", "exact"])
def test_rows_are_of_the_first_dimension_after_two_sparse_dimensions(lazy, fused):
    p, opt = after_two_sparse_dimensions("nonzero", fused, lazy=lazy)
    opt.flush()
    for row, vector in ((1, 0), (4, 2)):
        grad = torch.zeros(p.shape)
        grad[row, vector, 1] = 1.0
        verified_window(opt, [p], [grad])
        if lazy != "frozen":
            assert opt.state[p]["last_step"].shape == (5,)
            opt.flush()


@backends
@pytest.mark.parametrize("nonfinite", ["propagate", "skip", "shrink"])
@pytest.mark.parametrize(
    "rows,scale",
    [("nonzero", None), ("nonzero", "rms"), ("nonzero", "rms_rows"), (None, "rms_rows")],
)
def test_windows_of_first_rows_after_two_sparse_dimensions(scale, nonfinite, rows, fused):
    options = dict(accumulation_steps=2, scale=scale, nonfinite=nonfinite)
    p, opt = after_two_sparse_dimensions(rows, fused, **options)
    grads = [torch.zeros(p.shape) for _ in range(2)]
    grads[0][0, 1] = torch.randn(4)
    grads[0][4, 0] = torch.randn(4)
    grads[1][0, 2] = torch.randn(4)
    if nonfinite != "propagate":
        grads[1][4, 2, 0] = torch.nan
        grads[1][1, 0, 0] = torch.inf
    verified_window(opt, [p], *([g] for g in grads))
    assert opt.state[p]["window"].shape == (5,)


@backends
def test_other_rows_within_one_window_are_refused(fused):
    p, opt = after_two_sparse_dimensions("nonzero", fused, accumulation_steps=2)
    p.grad = torch.sparse_coo_tensor([[0], [1]], torch.randn(1, 4), p.shape)
    opt.step()
    p.grad = torch.ones(p.shape)
    with unchanged(opt), pytest.raises(RuntimeError, match="sparse_dim was 2 before"):
        opt.step()
    p.grad = torch.sparse_coo_tensor([[0], [1]], torch.randn(1, 4), p.shape)
    opt.step()


@backends
def test_a_tracked_table_of_one_row_after_two_sparse_dimensions(fused):
    p = Parameter(torch.ones(1, 4096))

    class Lookup(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = p

        def forward(self, ids):
            return p[ids]

    module = Lookup()
    opt = Tiger([p], lr=0.1, weight_decay=0.0, rows="tracked", lazy="decay", fused=fused)
    opt.track(module)
    p.grad = torch.sparse_coo_tensor([[0], [0]], torch.ones(1), p.shape)
    opt.step()
    before = p.detach().clone()
    module(torch.tensor([0]))
    p.grad = torch.ones(1, 4096)
    opt.step()
    assert bool((p != before).all())


@backends
def test_many_parameters_and_tensor_lr(fused):
    dtypes = (torch.float32, torch.float64, torch.bfloat16)
    params = [parameter(k % 13 + 1, k % 7 + 1, dtype=dtypes[k % 3]) for k in range(150)]
    params += [parameter(3000, 20), parameter(5)]
    opt = Tiger(params, rows="nonzero", weight_decay=0.3, lr=torch.tensor(0.07), fused=fused)
    for _ in range(2):
        grads = []
        for p in params:
            touched = (torch.rand(len(p)) < 0.4).nonzero()[:, 0]
            grads.append(rows_grad(p, touched))
        grads[5] = None
        verified_window(opt, params, grads)


@backends
def test_maximize(fused):
    a = parameter(20, 6)
    b = Parameter(a.detach().clone())
    first = Tiger([a], rows="nonzero", fused=fused)
    second = Tiger([b], rows="nonzero", maximize=True, fused=fused)
    for rows in ([1, 5], [5, 19]):
        a.grad = rows_grad(a, rows)
        b.grad = -a.grad
        first.step()
        second.step()
        assert same_bits(a, b)


@backends
def test_amp_scale(fused):
    a = parameter(20, 6)
    b = Parameter(a.detach().clone())
    first, second = (Tiger([p], rows="nonzero", fused=fused) for p in (a, b))
    a.grad = rows_grad(a, [1, 5])
    a.grad[7, 2] = 1e-44  # the scale must not make a zero of it before the rows are found
    b.grad = a.grad.clone()
    first.step()
    second.grad_scale, second.found_inf = torch.tensor(2.0**10), torch.tensor(0.0)
    second.step()
    assert changed_rows(a, b.detach()) == []


def test_the_number_of_threads_changes_nothing():
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        torch.manual_seed(3)
        p, q = parameter(5000, 33), parameter(40_000, 2)
        opt = Tiger([p, q], rows="nonzero", scale="rms", direction="power")
        for _ in range(3):
            for t in (p, q):
                t.grad = rows_grad(t, (torch.rand(len(t)) < 0.2).nonzero()[:, 0])
            opt.step()
        results.append((p.detach(), q.detach()))
    assert all(same_bits(a, b) for a, b in zip(*results))


@every_rule
@precisions
def test_native_kernels_exist(rule, dtype):
    p = parameter(50, 9, dtype=dtype)
    before = p.detach().clone()
    p.grad = rows_grad(p, [3, 4, 40])
    rule([p], rows="nonzero", fused=True).step()
    assert changed_rows(p, before) == [3, 4, 40]


@every_rule
@precisions
def test_native_kernels_agree_with_the_reference(rule, dtype):
    a = parameter(50, 9, dtype=dtype)
    b = Parameter(a.detach().clone())
    first, second = rule([a], rows="nonzero"), rule([b], rows="nonzero", fused=False)
    for rows in ([3, 4, 40], [], [0, 4, 49], range(50)):
        a.grad = b.grad = rows_grad(a, list(rows))
        first.step()
        second.step()
        tolerance = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 0.01}[dtype]
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# ---------------------------------------------------------------------------------- rows="tracked"


class Lookup(nn.Module):
    """A table under another name, which takes ids of any dtype."""

    def __init__(self, table):
        super().__init__()
        self.table = table

    def forward(self, ids, factor=1.0):
        return F.embedding(ids.long(), self.table) * factor


def tracked(module, *more, rule=None, **options):
    options = {"rows": "tracked", **options}
    params = [module.weight, *more]
    opt = Tiger(params, **HYPER, **options) if rule is None else rule(params, **options)
    return opt, opt.track(module)


def backward(output):
    (output * torch.randn(output.shape, dtype=output.dtype)).sum().backward()


@backends
@every_rule
def test_tracked_rows_are_the_ids_of_the_forward_pass(rule, fused):
    table = nn.Embedding(30, 6)
    opt, _ = tracked(table, rule=rule, fused=fused)
    copy_ = Parameter(table.weight.detach().clone())
    sparse = rule([copy_], fused=fused)
    for ids in ([[3, 7], [7, 29]], [[0]], [[3, 3, 3]]):
        opt.zero_grad()
        ids = torch.tensor(ids)
        backward(table(ids))
        before = table.weight.detach().clone()
        opt.step()
        assert changed_rows(table.weight, before) == ids.unique().tolist()
        copy_.grad = as_sparse(table.weight.grad, ids.unique())
        sparse.step()
        assert same_bits(table.weight, copy_)


@backends
@precisions
def test_tracked_values(dtype, fused):
    table = nn.Embedding(30, 7, dtype=dtype)
    opt, _ = tracked(table, scale="rms", direction="power", fused=fused)
    for _ in range(3):
        ids = torch.randint(30, (4, 5))
        table(ids)
        verified_window(opt, [table.weight], [rows_grad(table.weight, ids[0])], tracked=[ids])


@backends
def test_a_used_row_with_a_zero_gradient_is_touched(fused):
    table = nn.Embedding(10, 4)
    opt, _ = tracked(table, fused=fused)
    start = table.weight.detach().clone()
    (table(torch.tensor([2, 5])) * 0.0).sum().backward()
    opt.step()
    assert changed_rows(table.weight, start) == [2, 5]
    torch.testing.assert_close(table.weight[2].detach(), start[2] * (1 - 0.05 * 0.3))
    backward(table(torch.tensor([1])))
    opt.step()
    before = table.weight.detach().clone()
    opt.zero_grad()
    (table(torch.tensor([1])) * 0.0).sum().backward()
    opt.step()  # by its momentum
    assert changed_rows(table.weight, before) == [1]


@backends
def test_rows_that_no_module_used_stay(fused):
    table = nn.Embedding(10, 4)
    opt, _ = tracked(table, fused=fused)
    before = table.weight.detach().clone()
    table(torch.tensor([2]))
    table.weight.grad = torch.randn(10, 4)
    opt.step()
    assert changed_rows(table.weight, before) == [2]
    table.weight.grad = torch.randn(10, 4)
    before = table.weight.detach().clone()
    opt.step()  # the ids of the last step are forgotten
    assert changed_rows(table.weight, before) == []


@backends
def test_several_forward_passes_in_a_step(fused):
    table = nn.Embedding(10, 4)
    opt, _ = tracked(table, fused=fused)
    before = table.weight.detach().clone()
    for ids in ([1, 2], [2, 9], []):
        backward(table(torch.tensor(ids, dtype=torch.int64)))
    opt.step()
    assert changed_rows(table.weight, before) == [1, 2, 9]


@backends
def test_several_modules_of_one_parameter(fused):
    first, second, third = (nn.Embedding(10, 4) for _ in range(3))
    second.weight = third.weight = first.weight
    opt, handle = tracked(first, fused=fused)
    other = opt.track(second)

    def step():
        opt.zero_grad()
        before = first.weight.detach().clone()
        for module, row in ((first, 1), (second, 4), (third, 8)):
            backward(module(torch.tensor([row])))
        opt.step()
        return changed_rows(first.weight, before)

    assert step() == [1, 4]  # the third is not tracked
    handle.remove()
    assert step() == [4]
    other.remove()
    with pytest.raises(RuntimeError):
        step()


@backends
def test_several_parameters(fused):
    a, b, plain = nn.Embedding(10, 4), nn.Embedding(8, 3), nn.Linear(4, 2)
    groups = [
        {"params": [a.weight, b.weight], "rows": "tracked"},
        {"params": list(plain.parameters())},
    ]
    opt = Tiger(groups, **HYPER, fused=fused)
    opt.track(a)
    opt.track(b)
    before = [p.detach().clone() for p in (a.weight, b.weight)]
    backward(plain(a(torch.tensor([1, 3]))))
    backward(b(torch.tensor([7, 0])))
    opt.step()
    assert changed_rows(a.weight, before[0]) == [1, 3]
    assert changed_rows(b.weight, before[1]) == [0, 7]


@backends
def test_evaluation_and_no_grad_are_not_recorded(fused):
    table = nn.Embedding(10, 4)
    opt, _ = tracked(table, fused=fused)
    before = table.weight.detach().clone()
    table.eval()
    table(torch.tensor([1]))
    table.train()
    with torch.no_grad():
        table(torch.tensor([2]))
    with torch.inference_mode():
        table(torch.tensor([3]))
    backward(table(torch.tensor([4])))
    opt.step()
    assert changed_rows(table.weight, before) == [4]


@backends
def test_untracked_parameters_are_refused_by_name(fused):
    table, other = nn.Embedding(10, 4), nn.Embedding(10, 4)
    opt = Tiger(
        [("other", other.weight), ("words.weight", table.weight)],
        rows="tracked",
        fused=fused,
    )
    opt.track(other)
    backward(other(torch.tensor([1])))
    backward(table(torch.tensor([1])))
    with unchanged(opt), pytest.raises(RuntimeError, match=r"words\.weight.*track"):
        opt.step()
    opt.track(table)
    opt.zero_grad()
    before = table.weight.detach().clone()
    backward(table(torch.tensor([6])))
    opt.step()
    assert changed_rows(table.weight, before) == [6]


@backends
def test_a_removed_handle_does_not_count(fused):
    table = nn.Embedding(10, 4)
    opt, handle = tracked(table, fused=fused)
    backward(table(torch.tensor([1])))
    opt.step()
    handle.remove()
    opt.zero_grad()
    backward(table(torch.tensor([1])))
    with unchanged(opt), pytest.raises(RuntimeError, match="track"):
        opt.step()
    handle.remove()  # once more does nothing
    opt.track(table)
    opt.zero_grad()
    before = table.weight.detach().clone()
    backward(table(torch.tensor([5])))
    opt.step()
    assert changed_rows(table.weight, before) == [5]


@backends
def test_a_failed_step_keeps_the_ids(fused):
    table, other = nn.Embedding(10, 4), parameter(3)
    opt, _ = tracked(table, other, nonfinite="raise", fused=fused)
    (table(torch.tensor([1, 8])) * 0.0).sum().backward()
    other.grad = torch.tensor([1.0, torch.nan, 0.0])
    before = table.weight.detach().clone()
    with unchanged(opt), pytest.raises(FloatingPointError):
        opt.step()
    other.grad = torch.zeros(3)
    opt.step()
    assert changed_rows(table.weight, before) == [1, 8]


@backends
def test_a_missing_gradient_touches_nothing(fused):
    table = nn.Embedding(10, 4)
    opt, _ = tracked(table, fused=fused)
    table(torch.tensor([1]))
    with unchanged(opt):
        opt.step()
    before = table.weight.detach().clone()
    backward(table(torch.tensor([2])))
    opt.step()
    assert changed_rows(table.weight, before) == [2]


@backends
def test_padding(fused):
    table = nn.Embedding(10, 4, padding_idx=3)
    opt, _ = tracked(table, fused=fused)
    before = table.weight.detach().clone()
    for ids in ([3, 1, 3, 5], [3, 3], [7]):
        backward(table(torch.tensor(ids)))
    opt.step()
    assert changed_rows(table.weight, before) == [1, 5, 7]  # the padding is zero and stays so
    assert not bool(table.weight[3].any())


@backends
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_embedding_bag(mode, dtype, fused):
    bag = nn.EmbeddingBag(30, 6, mode=mode)
    opt, _ = tracked(bag, fused=fused)
    ids = torch.tensor([4, 9, 9, 22, 0, 11], dtype=dtype)
    offsets = torch.tensor([0, 2, 2, 5], dtype=dtype)
    before = bag.weight.detach().clone()
    backward(bag(ids, offsets))
    opt.step()
    assert changed_rows(bag.weight, before) == [0, 4, 9, 11, 22]
    opt.zero_grad()
    before = bag.weight.detach().clone()
    backward(bag(torch.tensor([[1, 2], [2, 3]], dtype=dtype)))
    opt.step()
    assert changed_rows(bag.weight, before) == [1, 2, 3]


@backends
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("shape", [(3,), (3, 1), (1, 3, 1)])
def test_ids_of_any_integer_type(dtype, shape, fused):
    module = Lookup(Parameter(torch.randn(120, 4)))
    opt = Tiger([module.table], **HYPER, rows="tracked", fused=fused)
    opt.track(module, module.table)
    before = module.table.detach().clone()
    backward(module(torch.tensor([100, 7, 100], dtype=dtype).view(shape), factor=2.0))
    opt.step()
    assert changed_rows(module.table, before) == [7, 100]


@backends
def test_ids_that_are_views_or_change_later(fused):
    table = nn.Embedding(50, 4)
    opt, _ = tracked(table, fused=fused)
    before = table.weight.detach().clone()
    ids = torch.arange(0, 40).view(5, 8)
    table(ids.T[::3, 1])
    ids.fill_(49)  # the recorded ids are those of the forward pass
    table.weight.grad = torch.ones(50, 4)
    opt.step()
    assert changed_rows(table.weight, before) == [8, 11, 14]


@backends
def test_scalar_and_empty_ids(fused):
    table = nn.Embedding(10, 4)
    opt, _ = tracked(table, fused=fused)
    before = table.weight.detach().clone()
    backward(table(torch.tensor(6)))
    backward(table(torch.empty(0, 3, dtype=torch.int64)))
    opt.step()
    assert changed_rows(table.weight, before) == [6]
    opt.zero_grad()
    before = table.weight.detach().clone()
    backward(table(torch.empty(0, dtype=torch.int64)))
    opt.step()
    assert changed_rows(table.weight, before) == []


@backends
def test_ids_that_the_table_refused(fused):
    table = nn.Embedding(10, 4)
    opt, _ = tracked(table, fused=fused)
    with pytest.raises(IndexError):
        table(torch.tensor([3, 10]))
    before = table.weight.detach().clone()
    table.weight.grad = torch.randn(10, 4)
    try:
        opt.step()
    except IndexError as error:
        assert re.search(r"10\b.*10 rows|10 rows.*\b10\b", str(error))
        assert changed_rows(table.weight, before) == []
    assert bool(table.weight.isfinite().all())


@backends
@pytest.mark.parametrize("bad", [-1, 10, 2**40])
def test_bad_ids_of_a_module_are_index_errors(bad, fused):
    class Forgiving(Lookup):
        def forward(self, ids):
            return F.embedding(ids.clamp(0, 9), self.table)

    module = Forgiving(Parameter(torch.randn(10, 4)))
    opt = Tiger([("words", module.table)], **HYPER, rows="tracked", fused=fused)
    opt.track(module, module.table)
    with unchanged(opt), pytest.raises(IndexError, match=rf"(?s)words.*{bad}\b.*\b10\b"):
        backward(module(torch.tensor([3, bad])))
        opt.step()


@backends
def test_a_copied_model_is_not_tracked(fused):
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 3))
    opt = Tiger([{"params": [model[0].weight], "rows": "tracked"}], **HYPER, fused=fused)
    opt.track(model[0])
    twin = copy.deepcopy(model)
    twin_opt = Tiger([{"params": [twin[0].weight], "rows": "tracked"}], **HYPER, fused=fused)
    before = model[0].weight.detach().clone()
    backward(twin(torch.tensor([7])))  # records nothing in the first optimizer
    backward(model(torch.tensor([1])))
    opt.step()
    assert changed_rows(model[0].weight, before) == [1]
    with unchanged(twin_opt), pytest.raises(RuntimeError, match="track"):
        twin_opt.step()
    twin_opt.track(twin[0])
    twin_opt.zero_grad()
    before = twin[0].weight.detach().clone()
    backward(twin(torch.tensor([5])))
    twin_opt.step()
    assert changed_rows(twin[0].weight, before) == [5]


@backends
def test_model_and_optimizer_copied_together(fused):
    table = nn.Embedding(10, 4)
    opt, _ = tracked(table, fused=fused)
    backward(table(torch.tensor([1])))
    opt.step()
    opt.zero_grad()
    twin, twin_opt = copy.deepcopy((table, opt))
    assert twin_opt.param_groups[0]["params"][0] is twin.weight
    backward(twin(torch.tensor([2])))
    with unchanged(twin_opt), pytest.raises(RuntimeError, match="track"):
        twin_opt.step()
    twin_opt.track(twin)
    before = twin.weight.detach().clone()
    twin_opt.zero_grad()
    backward(twin(torch.tensor([3])))
    twin_opt.step()
    assert changed_rows(twin.weight, before) == [3]
    before = table.weight.detach().clone()
    backward(table(torch.tensor([4])))
    opt.step()
    assert changed_rows(table.weight, before) == [4]


def test_a_tracked_model_can_be_saved_whole():
    table = nn.Embedding(10, 4)
    opt, _ = tracked(table)
    file = io.BytesIO()
    torch.save(table, file)
    file.seek(0)
    twin = torch.load(file, weights_only=False)
    assert torch.equal(twin(torch.tensor([1])), table(torch.tensor([1])))
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    opt.load_state_dict(torch.load(file, weights_only=True))
    before = table.weight.detach().clone()
    backward(table(torch.tensor([5])))
    opt.step()
    assert 5 in changed_rows(table.weight, before)


@backends
def test_tracking_without_the_rows_option_changes_nothing(fused):
    table = nn.Embedding(10, 4)
    opt, handle = tracked(table, rows=None, fused=fused)
    before = table.weight.detach().clone()
    backward(table(torch.tensor([5])))
    opt.step()
    assert changed_rows(table.weight, before) == list(range(10))
    handle.remove()


@backends
def test_tracked_rows_in_an_accumulation_window(fused):
    table = nn.Embedding(12, 4)
    opt, _ = tracked(table, accumulation_steps=3, fused=fused)
    for _ in range(2):
        ids = [torch.randint(12, (n,)) for n in (3, 1, 2)]
        theta, m = table.weight.detach().clone(), momentum_of(opt, table.weight)
        used = torch.cat(ids).unique().tolist()
        for k in range(3):
            opt.zero_grad()
            output = table(ids[k])
            (output * float(k > 0)).sum().backward()  # the first one gives zero gradients
            opt.step()
        assert changed_rows(table.weight, theta) == used
        assert set(changed_rows(momentum_of(opt, table.weight), m)) <= set(used)


@backends
@pytest.mark.parametrize("early", [False, True], ids=["without a gradient", "early"])
def test_windows_beside_tracked_tables_close(early, fused):
    # A parameter of no tracked module goes as a whole, in the closing pass as well.
    table, linear, norm = nn.Embedding(12, 4), nn.Linear(4, 3), nn.LayerNorm(3)
    model = nn.Sequential(table, linear, norm)
    twin = copy.deepcopy(model)
    opt, other = (
        Tiger(m.parameters(), lr=0.1, weight_decay=0.1, rows=r, accumulation_steps=2, fused=fused)
        for m, r in ((model, "tracked"), (twin, None))
    )
    opt.track(table)
    weights = torch.randn(12, 3)
    for _ in range(2):
        for m in (model, twin):
            m.zero_grad()
            (m(torch.arange(12)) * weights).sum().backward()
        for each in (opt, other):
            each.step()
            each.zero_grad()
            if early:
                each.close_window()
            else:
                each.step()
        assert all(same_bits(p, q) for p, q in zip(model.parameters(), twin.parameters()))
    assert int(opt.state[linear.weight]["window"]) == 2


def test_tracked_forward_passes_cost_no_memory_in_the_long_run():
    table = nn.Embedding(10, 4)
    opt, _ = tracked(table)
    ids = torch.randint(10, (100_000,))

    def step():
        with torch.no_grad():
            table(ids)
        table(ids)
        table.weight.grad = torch.ones(10, 4)
        opt.step()

    for _ in range(5):
        step()
    before = psutil.Process().memory_info().rss
    for _ in range(40):
        step()
    assert psutil.Process().memory_info().rss - before < 16 * 2**20  # 40 lists of ids are 32 MB


# ----------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("cls", [Tiger, Lion, AdamW])
@pytest.mark.parametrize("value", ["zero", "Nonzero", "", 1, True, ["nonzero"]])
@pytest.mark.parametrize("where", ["constructor", "group"])
def test_unknown_values_are_refused(cls, value, where):
    match = rf"(?s)rows={re.escape(repr(value))}.*None.*nonzero.*tracked"
    with pytest.raises(ValueError, match=match):
        if where == "constructor":
            cls([parameter(3)], rows=value)
        else:
            cls([{"params": [parameter(3)], "rows": value}])
