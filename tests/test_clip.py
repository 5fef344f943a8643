# SPDX-License-Identifier: Apache-2.0
import math
import types
import warnings

import numpy as np
import pytest
import torch
from cases import VIEWS, floats, parameter, sparse_grad, unchecked_sparse
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from oracle import arithmetic, same_bits, summed_gradient
from torch.nn import Parameter

from tiger_ext import _native, clip
from tiger_ext.clip import clip_grad_norm_, clip_grad_value_

NORMS = [2.0, 1.0, math.inf, -math.inf, 0.0, 0.5, 3.0, -1.5]
every_norm = pytest.mark.parametrize("p", NORMS, ids=lambda p: f"p={p:g}")
BACKENDS = ["native", "torch"]


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    """Run a test on the native kernel, and on torch's operations that stand in for it."""
    if request.param == "torch":
        monkeypatch.setattr(_native, "C", None)
    return request.param


def with_grads(*grads):
    params = [Parameter(torch.zeros(g.shape, dtype=g.dtype)) for g in grads]
    for p, g in zip(params, grads):
        p.grad = g
    return params


def copies(params):
    """Make parameters with the same gradients, in memory of their own."""
    return with_grads(*(p.grad.clone() for p in params))


def dense_copies(params):
    """Make parameters with the same gradients made dense; duplicates summed as by ours."""
    return with_grads(
        *(
            dense_sum(p.grad) if p.grad.layout == torch.sparse_coo else p.grad.clone()
            for p in params
        )
    )


def dense_sum(grad):
    wide = arithmetic(grad.dtype)
    dense = torch.zeros(
        math.prod(grad.shape[: grad.sparse_dim()]), *grad._values().shape[1:], dtype=wide
    )
    rows, sums = summed_gradient(grad, wide)
    dense[rows] = sums.reshape(len(rows), *dense.shape[1:])
    return dense.reshape(grad.shape).to(grad.dtype)


def tolerance(dtype):
    # Of bfloat16 and float16, the dense gradient holds rounded sums.
    return {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3}.get(dtype, 3e-2)


def assert_same_total(ours, theirs, params):
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    rtol = max(tolerance(p.grad.dtype) for p in params)
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=1e-6, equal_nan=True)


def assert_clips_as_dense(params, max_norm, p=2.0):
    dense = dense_copies(params)
    total = clip_grad_norm_(params, max_norm, p)
    assert_same_total(total, torch.nn.utils.clip_grad_norm_(dense, max_norm, p), params)
    for ours, theirs in zip(params, dense):
        value = dense_sum(ours.grad) if ours.grad.layout == torch.sparse_coo else ours.grad
        rtol = 2 * max(tolerance(p.grad.dtype) for p in params)
        torch.testing.assert_close(value, theirs.grad, rtol=rtol, atol=rtol)


# ---------------------------------------------------------------------------------- strided only


@every_norm
@pytest.mark.parametrize("max_norm", [0.5, 1e6])
@floats("dtype")
def test_strided_gradients_are_clipped_by_torch(dtype, max_norm, p):
    ours = with_grads(*(torch.randn(s).to(dtype) for s in [(4, 3), (7,), ()]))
    ours.append(Parameter(torch.zeros(2)))  # without a gradient
    theirs = copies(ours[:-1])
    total = clip_grad_norm_((p for p in ours), max_norm, p)
    assert same_bits(total, torch.nn.utils.clip_grad_norm_(theirs, max_norm, p))
    for a, b in zip(ours, theirs):
        assert same_bits(a.grad, b.grad)


def test_one_tensor_or_any_iterable():
    totals = []
    for form in (lambda p: p, lambda p: [p], lambda p: iter([p]), lambda p: {"w": p}.values()):
        (p,) = with_grads(torch.sparse_coo_tensor([[1, 1]], torch.tensor([3.0, 1.0]), (5,)))
        totals.append(clip_grad_norm_(form(p), 2.0).item())
        assert p.grad._values().tolist() == pytest.approx([1.5, 0.5])
    assert totals == [4.0] * 4


def test_nothing_to_clip():
    for nothing in ([], [Parameter(torch.ones(3))]):
        total = clip_grad_norm_(nothing, 1.0)
        assert same_bits(total, torch.tensor(0.0))
    with pytest.warns(UserWarning, match="empty generator"):
        clip_grad_norm_((p for p in []), 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clip_grad_norm_(iter([]), 1.0)


# ------------------------------------------------------------------------------------------ norm


def test_norm_is_that_of_the_sum(backend):
    (p,) = with_grads(torch.sparse_coo_tensor([[2, 2, 4]], torch.tensor([5.0, -5.0, 3.0]), (6,)))
    assert clip_grad_norm_([p], 1.0) == 3.0


@every_norm
@floats("dtype")
@pytest.mark.parametrize("sparse_dim", [1, 2, 3])
def test_dtypes_norms_and_dimensions(backend, dtype, p, sparse_dim):
    table = Parameter(torch.zeros(6, 5, 4, dtype=dtype))
    grads = [sparse_grad(table, nnz, sparse_dim=sparse_dim) for nnz in (0, 40, 400)]
    other = torch.randn(3, 3).to(dtype)
    assert_clips_as_dense(with_grads(*grads, other), 2.0, p)


@every_norm
def test_every_row_touched_and_not(backend, p):
    # Norms with p <= 0 depend on whether there is a row without entries.
    for rows in (4, 5):
        values = torch.tensor([[1.0, 2], [3, -4], [5, 6], [7, 8], [-2, 1]])
        grad = torch.sparse_coo_tensor([[0, 1, 2, 3, 3]], values, (rows, 2))
        params = with_grads(grad)
        assert_clips_as_dense(params, 1.0, p)


@settings(max_examples=150, phases=[Phase.explicit, Phase.generate])
@given(data=st.data())
def test_like_torch_on_dense_gradients(data):
    torch.manual_seed(data.draw(st.integers(0, 2**20)))
    grads = []
    for _ in range(data.draw(st.integers(1, 4))):
        dtype = data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
        table = Parameter(torch.zeros(data.draw(st.integers(1, 30)), 2, 3, dtype=dtype))
        if data.draw(st.booleans()):
            nnz = data.draw(st.sampled_from([0, 1, 5, 60, 700]))
            dims = data.draw(st.integers(1, 3))
            grads.append(sparse_grad(table, nnz, sparse_dim=dims))
            if data.draw(st.booleans()):
                grads[-1] = grads[-1].coalesce()
        else:
            grads.append(torch.randn(table.shape).to(dtype))
    p = data.draw(st.sampled_from(NORMS))
    params = with_grads(*grads)
    other = copies(params)
    max_norm = data.draw(st.sampled_from([0.1, 1.0, 1e6]))
    assert_clips_as_dense(params, max_norm, p)
    native, _native.C = _native.C, None
    try:
        assert_clips_as_dense(other, max_norm, p)
    finally:
        _native.C = native


@pytest.mark.parametrize("view", VIEWS, ids=lambda v: v.name)
def test_values_in_any_memory_order(backend, view):
    values = view.make(torch.randn(50, 3, 4, 2))
    grad = torch.sparse_coo_tensor(torch.randint(20, (1, 50)), values, (20, 3, 4, 2))
    params = with_grads(grad)
    assert_clips_as_dense(params, 1.0)
    assert params[0].grad._values().data_ptr() == values.data_ptr()


def test_int32_indices_and_transposed_ones_and_several_tables(backend):
    first = torch.sparse_coo_tensor(
        torch.randint(9, (1, 30), dtype=torch.int32), torch.randn(30, 5), (9, 5)
    )
    second = torch.sparse_coo_tensor(torch.randint(9, (3, 40)).mT.contiguous().mT, torch.randn(40),
                                     (9, 9, 9))  # fmt: skip
    assert_clips_as_dense(with_grads(first, second, first.clone()), 1.0)


@pytest.mark.parametrize("shape,nnz", [((5, 0), 2), ((5, 0), 0), ((0, 4), 0)])
def test_gradients_without_elements(backend, shape, nnz):
    indices = torch.arange(nnz)[None]
    empty = torch.sparse_coo_tensor(indices, torch.zeros(nnz, shape[1]), shape)
    params = with_grads(empty, torch.ones(4))
    assert clip_grad_norm_(params, 1.0) == 2.0
    with pytest.raises(RuntimeError, match=r"inf.* norm on an empty"):
        torch.nn.utils.clip_grad_norm_(dense_copies(params), 1.0, math.inf)
    with pytest.raises(RuntimeError, match=r"inf.* norm on an empty"):
        clip_grad_norm_(params, 1.0, math.inf)


def test_the_zero_norm_counts_gradients_that_are_not_zero(backend):
    zero = torch.sparse_coo_tensor([[1, 1]], torch.tensor([2.0, -2.0]), (5,))
    params = with_grads(torch.ones(4), torch.ones(3), torch.zeros(2), zero, zero.coalesce() + zero)
    params += with_grads(torch.sparse_coo_tensor([[1]], torch.tensor([2.0]), (5,)))
    assert clip_grad_norm_(params, 100.0, 0.0) == 3.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_duplicates_are_summed_in_float32(backend, dtype):
    # In bfloat16 256 + 1 is 256, in float16 2048 + 1 is 2048.
    values = torch.ones(4096, dtype=dtype)
    (p,) = with_grads(torch.sparse_coo_tensor(torch.full((1, 4096), 2), values, (5,)))
    assert clip_grad_norm_([p], 1.0) == 4096.0


def test_gradients_of_two_backward_passes(backend):
    module = torch.nn.Embedding(50, 8, sparse=True)
    head = torch.nn.Linear(8, 1)
    for _ in range(2):
        head(module(torch.randint(50, (40,)))).pow(2).sum().backward()
    assert module.weight.grad._nnz() > 50  # torch left duplicates
    assert_clips_as_dense([module.weight, *head.parameters()], 1.0)


def test_many_entries_of_few_rows_in_the_specified_order():
    # The oracle's float32 sums, left to right in pieces of 256: any other order rounds otherwise.
    rows = torch.cat(
        [torch.full((9000,), 3), torch.full((700,), 1), torch.arange(8), torch.tensor([3])]
    )
    rows = rows[torch.randperm(len(rows))]
    grad = torch.sparse_coo_tensor(rows[None], torch.randn(len(rows), 300), (8, 300))
    _, sums = summed_gradient(grad, torch.float32)
    exact = math.sqrt(math.fsum((sums.numpy().astype(np.float64) ** 2).ravel()))
    for threads in (1, 2):
        torch.set_num_threads(threads)
        assert _native.C.row_norms([grad], 2.0).item() == pytest.approx(exact, rel=1e-14)


@every_norm
def test_same_bits_for_any_number_of_threads(p):
    grads = [
        torch.sparse_coo_tensor(
            torch.randint(rows, (1, n)), torch.randn(n, dim).to(dtype), (rows, dim)
        )
        for rows, n, dim, dtype in [
            (50_000, 20_000, 33, torch.float32),
            (3, 20_000, 16, torch.bfloat16),
            (4000, 9000, 1, torch.float64),
            (90, 100, 700, torch.float16),
        ]
    ]
    results = []
    for threads in (1, 2, 3, 4):
        torch.set_num_threads(threads)
        results.append(_native.C.row_norms(grads, p))
    assert all(same_bits(r, results[0]) for r in results)
    assert p == -math.inf or p < 0 or len(set(results[0].tolist())) == len(grads)


def test_a_table_that_could_not_be_made_dense(backend):
    p = Parameter(torch.zeros(1, 1).expand(2**32, 10**4))
    p.grad = torch.sparse_coo_tensor([[7, 10**9, 7]], torch.ones(3, 10**4), p.shape)
    assert clip_grad_norm_([p], 1.0).item() == pytest.approx(math.sqrt(5e4))
    assert p.grad._nnz() == 3


# ----------------------------------------------------------------------------------------- scale


def test_gradients_keep_their_indices_and_their_memory(backend):
    (p,) = params = with_grads(sparse_grad(parameter(20, 3), 50))
    grad, indices, values = p.grad, p.grad._indices(), p.grad._values()
    before = indices.clone(), values.clone()
    clip_grad_norm_(params, 1.0)
    assert p.grad is grad and not grad.is_coalesced()
    assert p.grad._indices().data_ptr() == indices.data_ptr()
    assert p.grad._values().data_ptr() == values.data_ptr()
    assert same_bits(p.grad._indices(), before[0])
    assert not torch.equal(p.grad._values(), before[1])


def test_below_the_limit_nothing_changes(backend):
    params = with_grads(sparse_grad(parameter(20, 3), 50), torch.randn(4))
    before = copies(params)
    clip_grad_norm_(params, 1e5)
    for p, b in zip(params, before):
        assert (
            same_bits(p.grad, b.grad)
            if p.grad.layout == torch.strided
            else same_bits(p.grad._values(), b.grad._values())
        )


def test_values_that_share_memory(backend):
    values = torch.full((1, 1), 3.0).expand(4, 2)
    (p,) = with_grads(torch.sparse_coo_tensor([[1, 1, 2, 0]], values, (5, 2)))
    grad, indices = p.grad, p.grad._indices().data_ptr()
    assert_clips_as_dense([p], 1.0)
    assert p.grad is grad and p.grad._indices().data_ptr() == indices
    assert not grad.is_coalesced()
    assert values[0, 0] == 3.0


def test_autograd_sees_nothing(backend):
    values, strided = torch.ones(3, 2, requires_grad=True), torch.ones(4, requires_grad=True)
    params = with_grads(torch.sparse_coo_tensor([[1, 1, 3]], values, (5, 2)), strided)
    total = clip_grad_norm_(params, 0.5)
    assert not total.requires_grad
    assert strided.detach().norm() < 0.5


# --------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", ["sparse", "dense"])
def test_nonfinite_norms(backend, bad, place):
    def make():
        params = with_grads(torch.ones(2), sparse_grad(parameter(9, 3), 20))
        values = params[0].grad if place == "dense" else params[1].grad._values()
        values.view(-1)[0] = bad
        return params

    torch.manual_seed(1)
    params = make()
    before = copies(params)
    with pytest.raises(RuntimeError) as theirs:
        torch.nn.utils.clip_grad_norm_(dense_copies(params), 1.0, error_if_nonfinite=True)
    with pytest.raises(RuntimeError) as ours:
        clip_grad_norm_(params, 1.0, error_if_nonfinite=True)
    assert str(ours.value) == str(theirs.value)
    assert same_bits(params[0].grad, before[0].grad)
    assert same_bits(params[1].grad._values(), before[1].grad._values())

    dense = dense_copies(params)
    total = clip_grad_norm_(params, 1.0)
    assert_same_total(total, torch.nn.utils.clip_grad_norm_(dense, 1.0), params)
    assert torch.equal(params[0].grad.isnan(), dense[0].grad.isnan())
    touched = params[1].grad._indices()[0].unique()
    assert torch.equal(dense_sum(params[1].grad)[touched].isnan(), dense[1].grad[touched].isnan())


@every_norm
def test_a_nan_reaches_every_norm_but_the_count(backend, p):
    grad = sparse_grad(parameter(9, 20), 20)
    grad._values()[3, 5] = math.nan
    params = with_grads(grad)
    expected = torch.linalg.vector_norm(dense_sum(grad), p)
    assert expected.isnan() == (p != 0)
    assert clip_grad_norm_(params, 1.0, p).isnan() == (p != 0)


@pytest.mark.parametrize("index", [9, -1, 2**40])
@pytest.mark.parametrize("sparse_dim", [1, 2])
def test_bad_row_index(backend, index, sparse_dim):
    indices = torch.randint(9, (sparse_dim, 12))
    indices[-1, 7] = index
    shape = (9, 9, 2)
    bad = unchecked_sparse(indices, torch.randn(12, *shape[sparse_dim:]), shape)
    params = with_grads(torch.randn(3), sparse_grad(parameter(5, 2), 8), torch.randn(2), bad)
    del params[2].grad
    before = [params[0].grad.clone(), params[1].grad._values().clone(), bad._values().clone()]
    with pytest.raises(IndexError) as error:
        clip_grad_norm_(params, 0.1)
    assert str(error.value) == (
        f"tiger_ext: parameters[3]: the gradient's entry 7 has row index {index} in dimension "
        f"{sparse_dim - 1}, out of range for 9 rows"
    )
    after = [params[0].grad, params[1].grad._values(), bad._values()]
    assert all(same_bits(a, b) for a, b in zip(after, before))


def test_the_stand_in_needs_no_value_of_a_device():
    # On the meta device there are no values: any host synchronisation raises.
    table = Parameter(torch.zeros(10, 3, device="meta"))
    for p in (2.0, -2.0):
        table.grad = torch.sparse_coo_tensor(
            torch.empty(1, 30, dtype=torch.int64, device="meta"),
            torch.empty(30, 3, device="meta"),
            (10, 3),
            device="meta",
        )
        assert clip_grad_norm_([table], 1.0, p).shape == ()


# ------------------------------------------------------------------------------ in torch's place


def test_ours_may_take_the_place_of_torchs(monkeypatch):
    for module in (torch.nn.utils, torch.nn.utils.clip_grad):
        monkeypatch.setattr(module, "clip_grad_norm_", clip_grad_norm_)
        monkeypatch.setattr(module, "clip_grad_value_", clip_grad_value_)
    table = unchecked_sparse([[1, 1]], torch.tensor([3.0, 1.0]), (5,))
    params = with_grads(torch.tensor([3.0, 0.0]), table)
    assert torch.nn.utils.clip_grad_norm_(params, 1e6).item() == 5.0
    assert torch.nn.utils.clip_grad_norm_(params[:1], 1e6).item() == 3.0
    torch.nn.utils.clip_grad_value_(params, 2.0)
    assert params[0].grad.tolist() == [2.0, 0.0] and params[1].grad.to_dense()[1] == 2.0


@every_norm
@pytest.mark.parametrize("foreach", [None, False, True])
@pytest.mark.parametrize("sparse", [False, True])
def test_foreach_changes_no_result(foreach, sparse, p, backend):
    def make():
        torch.manual_seed(1)
        grads = [torch.randn(4, 3), torch.randn(7)]
        return with_grads(*grads, *([sparse_grad(parameter(6, 2), 9)] if sparse else []))

    ours, theirs = make(), make()
    total = clip_grad_norm_(ours, 0.5, p, False, foreach)
    wanted = torch.nn.utils.clip_grad_norm_(dense_copies(theirs), 0.5, p, foreach=foreach)
    torch.testing.assert_close(total, wanted)
    clip_grad_norm_(theirs, 0.5, p)
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a.grad.to_dense(), b.grad.to_dense())


def test_foreach_where_there_is_no_such_operation():
    p = Parameter(torch.ones(3, device="meta"))
    p.grad = torch.ones(3, device="meta")
    for clamp in (torch.nn.utils.clip_grad_value_, clip_grad_value_):
        with pytest.raises(RuntimeError, match="foreach=True"):
            clamp([p], 1.0, foreach=True)


# ------------------------------------------------------------------------------------------ value


def clamped_as_dense(params, clip_value):
    dense = dense_copies(params)
    torch.nn.utils.clip_grad_value_(dense, clip_value)
    return [p.grad for p in dense]


def dense_now(p):
    return dense_sum(p.grad) if p.grad.layout == torch.sparse_coo else p.grad


@floats("dtype")
@pytest.mark.parametrize("clip_value", [0.0, 0.5, 1, 1e4, math.inf])
@pytest.mark.parametrize("foreach", [None, False, True])
def test_strided_gradients_are_clamped_by_torch(dtype, clip_value, foreach):
    ours = with_grads(*(2 * torch.randn(s).to(dtype) for s in [(4, 3), (7,), ()]))
    theirs = copies(ours)
    ours.append(Parameter(torch.zeros(2)))  # without a gradient
    assert clip_grad_value_((p for p in ours), clip_value, foreach) is None
    torch.nn.utils.clip_grad_value_(theirs, clip_value, foreach)
    for a, b in zip(ours, theirs):
        assert same_bits(a.grad, b.grad)


@floats("dtype")
@pytest.mark.parametrize("clip_value", [0.0, 0.5, 1.5, 1e4, math.inf])
@pytest.mark.parametrize("sparse_dim", [1, 2, 3])
@pytest.mark.parametrize("coalesced", [False, True])
def test_the_sum_of_a_row_is_clamped(dtype, clip_value, sparse_dim, coalesced):
    p, q = parameter(5, 4, 3, dtype=dtype), parameter(6, dtype=dtype)
    p.grad = sparse_grad(p, 30, sparse_dim=sparse_dim, coalesced=coalesced, rows=3)
    q.grad = torch.randn(6, dtype=torch.float64).to(dtype)
    wanted = clamped_as_dense([p, q], clip_value)
    indices, grad = p.grad._indices().clone(), p.grad
    clip_grad_value_([p, q], clip_value)
    assert p.grad is grad and torch.equal(p.grad._indices(), indices)
    assert p.grad.is_coalesced() == coalesced
    for ours, theirs in zip((p, q), wanted):
        torch.testing.assert_close(dense_now(ours), theirs, rtol=tolerance(dtype), atol=1e-6)
    torch.testing.assert_close(p.grad.to_dense().double(), wanted[0].double(), rtol=3e-2, atol=3e-2)


def test_duplicates_are_clamped_as_their_sum():
    rows = [[2, 0, 2, 1, 2, 0]]
    values = torch.tensor([[3.0], [0.25], [3.0], [-9.0], [-5.5], [0.5]])
    (p,) = with_grads(unchecked_sparse(rows, values, (4, 1)))
    clip_grad_value_(p, 1.0)
    # Row 2 is 0.5 and row 0 is 0.75 in sum: left as they are, also where an entry is large.
    assert p.grad._values().flatten().tolist() == [3.0, 0.25, 3.0, -1.0, -5.5, 0.5]
    clip_grad_value_(p, 0.5)
    assert p.grad._values().flatten().tolist() == [3.0, 0.5, 3.0, -0.5, -5.5, 0.0]
    assert p.grad._indices().tolist() == rows


@pytest.mark.filterwarnings("ignore:invalid value")
def test_nan_and_inf_are_clamped_as_by_torch():
    nan, inf = math.nan, math.inf
    values = torch.tensor([[nan, 9.0], [inf, 1.0], [inf, inf], [-inf, 1.0], [-inf, 3.0]])
    (p,) = with_grads(unchecked_sparse([[0, 1, 2, 2, 3]], values, (5, 2)))
    (wanted,) = clamped_as_dense([p], 2.0)
    clip_grad_value_(p, 2.0)
    assert torch.equal(p.grad.to_dense().nan_to_num(77.0), wanted.nan_to_num(77.0))
    assert p.grad.to_dense()[0].isnan().tolist() == [True, False]


def test_values_that_share_memory_are_replaced():
    values = torch.full((1, 1), 3.0).expand(4, 2)
    (p,) = with_grads(unchecked_sparse([[0, 1, 1, 3]], values, (5, 2)))
    grad = p.grad
    clip_grad_value_(p, 2.0)
    assert p.grad is grad and grad.to_dense()[:, 0].tolist() == [2.0, 2.0, 0.0, 2.0, 0.0]
    assert values.flatten().tolist() == [3.0] * 8


def test_gradients_without_entries_or_elements():
    params = with_grads(
        unchecked_sparse(torch.zeros(1, 0), torch.zeros(0, 2), (5, 2)),
        unchecked_sparse([[1, 1]], torch.zeros(2, 0), (5, 0)),
    )
    clip_grad_value_(params, 1.0)
    clip_grad_value_([], 1.0)
    assert [p.grad._nnz() for p in params] == [0, 2]


def test_entries_out_of_range_on_another_device_are_left_as_they_are():
    # All that is asked of a gradient; of one that lies on a GPU no index is looked at.
    indices, values = torch.tensor([[0, 7, 0, -1, 2]]), torch.tensor([[4.0], [9], [4], [9], [1]])
    grad = types.SimpleNamespace(
        _indices=lambda: indices,
        _values=lambda: values,
        sparse_dim=lambda: 1,
        shape=torch.Size([3, 1]),
        dtype=values.dtype,
        device=types.SimpleNamespace(type="cuda"),
    )
    assert clip._clamped(grad, 5.0, 0).flatten().tolist() == [5.0, 9.0, 0.0, 9.0, 1.0]


def test_clamping_needs_no_value_of_a_device():
    # On the meta device there are no values: any host synchronisation raises.
    p = Parameter(torch.zeros(10, 3, device="meta"))
    p.grad = torch.sparse_coo_tensor(
        torch.empty(1, 30, dtype=torch.int64, device="meta"),
        torch.empty(30, 3, device="meta"),
        (10, 3),
        device="meta",
        check_invariants=False,
    )
    clip_grad_value_(p, 1.0)


@pytest.mark.parametrize("value", [-1.0, math.nan])
def test_a_limit_that_zeros_would_break_is_refused(value):
    p, q = with_grads(torch.ones(2), unchecked_sparse([[0]], torch.ones(1), (3,)))
    with pytest.raises(ValueError, match=rf"clip_value={value}.*>= 0"):
        clip_grad_value_([p, q], value)
    assert p.grad.tolist() == [1.0, 1.0] and q.grad._values().tolist() == [1.0]


@pytest.mark.parametrize("index", [-1, 3])
def test_a_row_out_of_range_clamps_nothing(index):
    params = with_grads(
        torch.full((2,), 9.0),
        unchecked_sparse([[0]], torch.full((1,), 9.0), (3,)),
        unchecked_sparse([[0, index]], torch.full((2,), 9.0), (3,)),
    )
    with pytest.raises(IndexError, match=rf"parameters\[2\].*entry 1 .*{index}.*3 rows"):
        clip_grad_value_(params, 1.0)
    assert [p.grad.sum().item() for p in params[:2]] == [18.0, 9.0]
    assert params[2].grad._values().tolist() == [9.0, 9.0]


def test_clamping_costs_what_the_entries_cost():
    p = Parameter(torch.empty(10**12, 2, device="meta"))
    grad = unchecked_sparse([[10**11, 3, 10**11]], torch.full((3, 2), 4.0), (10**12, 2))
    holder = types.SimpleNamespace(grad=grad)
    assert p.shape == grad.shape
    clip_grad_value_([holder], 5.0)
    assert grad._values()[:, 0].tolist() == [5.0, 4.0, 0.0]


@given(st.data())
@settings(max_examples=100)
def test_any_gradient_is_clamped_as_its_dense_form(data):
    rows = data.draw(st.integers(1, 5))
    nnz = data.draw(st.integers(0, 12))
    ids = data.draw(st.lists(st.integers(0, rows - 1), min_size=nnz, max_size=nnz))
    quarters = st.integers(-12, 12).map(lambda k: k / 4)
    values = data.draw(st.lists(quarters, min_size=2 * nnz, max_size=2 * nnz))
    limit = data.draw(st.integers(0, 12).map(lambda k: k / 4))
    grad = unchecked_sparse([ids], torch.tensor(values).reshape(nnz, 2), (rows, 2))
    (p,) = with_grads(grad)
    wanted = p.grad.to_dense().clamp(-limit, limit)
    clip_grad_value_(p, limit)
    assert torch.equal(p.grad.to_dense(), wanted)
