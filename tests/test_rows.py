# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from cases import (
    RULES,
    VIEWS,
    every_rule,
    floats,
    parameter,
    set_grad,
    sparse_grad,
    views,
)
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from oracle import same_bits, summed_gradient, verified
from torch.nn import Parameter

from tiger_ext import Lion, Tiger

# The examples are small already.
NO_SHRINK = [Phase.explicit, Phase.generate]


def run_verified(optimizer, p, *grads):
    for grad in grads:
        set_grad(p, grad)
        with verified(optimizer):
            optimizer.step()


def entries(p, indices, dtype=None):
    """Make a gradient with the given row indices and random values."""
    indices = torch.as_tensor(indices, dtype=torch.int64).reshape(1, -1)
    values = torch.randn(indices.shape[1], *p.shape[1:], dtype=torch.float64)
    return torch.sparse_coo_tensor(indices, values.to(dtype or p.dtype), p.shape)


# ------------------------------------------------------------------------------- kinds of entries

ORDERS = {
    "one": [5],
    "first-and-last-row": [49, 0],
    "sorted-unique": range(3, 40),
    "all-rows": range(50),
    "reversed": range(49, -1, -1),
    "sorted-duplicates": [1, 1, 2, 2, 2, 7, 9, 9],
    "unsorted-duplicates": [9, 1, 9, 2, 1, 1, 40, 9],
    "one-row-twice": [8, 8],
    "one-row-300-times": [8] * 300,
    "two-rows-in-turn": [8, 3] * 400,
    "none": [],
}


@every_rule
@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize("dim", [1, 7, 64])
def test_orders_of_entries(rule, order, dim):
    p = parameter(50, dim)
    run_verified(rule([p]), p, *(entries(p, list(order)) for _ in range(3)))


@every_rule
@pytest.mark.parametrize("coalesced", [False, True], ids=["uncoalesced", "coalesced"])
def test_coalesced_or_not(rule, coalesced):
    p = parameter(50, 12)
    run_verified(rule([p]), p, *(sparse_grad(p, 200, coalesced=coalesced) for _ in range(3)))


@every_rule
def test_coalesced_and_not_give_the_same_bits_up_to_256_duplicates(rule):
    a = parameter(20, 5, dtype=torch.float64)
    b = Parameter(a.detach().clone())
    first, second = rule([a]), rule([b])
    for _ in range(2):
        a.grad = sparse_grad(a, 100)
        rows, sums = summed_gradient(a.grad, torch.float64)
        b.grad = torch.sparse_coo_tensor(rows[None], sums, b.shape, is_coalesced=True)
        first.step()
        second.step()
    assert same_bits(a, b)
    assert (
        same_bits(first.state[a]["exp_avg_sq"], second.state[b]["exp_avg_sq"])
        if ("exp_avg_sq" in first.state[a])
        else same_bits(first.state[a]["exp_avg"], second.state[b]["exp_avg"])
    )


def test_duplicates_are_summed_before_the_sign():
    p = Parameter(torch.zeros(4, 2))
    p.grad = torch.sparse_coo_tensor(
        [[2, 2, 2]], torch.tensor([[1.0, 2.0], [1.0, -1.0], [-3.0, -1.0]]), (4, 2)
    )
    Tiger([p], lr=0.5, weight_decay=0.0).step()
    assert p.tolist() == [[0, 0], [0, 0], [0.5, 0.0], [0, 0]]


@every_rule
def test_row_with_an_exactly_zero_gradient_is_touched(rule):
    p = parameter(6, 3)
    before = p.detach().clone()
    p.grad = torch.sparse_coo_tensor([[4]], torch.zeros(1, 3), (6, 3))
    opt = rule([p])
    with verified(opt):
        opt.step()
    changed = [r for r in range(6) if not same_bits(p[r], before[r])]
    assert changed == [4]  # by the decay alone
    torch.testing.assert_close(p[4], before[4] * (1 - 0.02 * 0.3))


@every_rule
def test_untouched_rows_keep_their_momentum(rule):
    p = parameter(6, 3)
    opt = rule([p])
    run_verified(opt, p, entries(p, [1, 2]), entries(p, [4]), entries(p, [2, 4]))
    name = "exp_avg_sq" if rule.name == "adamw-beta1-0" else "exp_avg"
    used = opt.state[p][name].abs().sum(1) > 0
    assert used.tolist() == [False, True, True, False, True, False]


@every_rule
def test_gradients_of_two_backward_passes(rule):
    table = torch.nn.Embedding(30, 6, sparse=True)
    opt = rule([table.weight])
    for _ in range(2):
        opt.zero_grad()
        for _ in range(2):
            (table(torch.randint(30, (4, 5))) * torch.randn(4, 5, 6)).sum().backward()
        assert not table.weight.grad.is_coalesced()
        with verified(opt):
            opt.step()


@every_rule
def test_padding_only_and_empty_batches(rule):
    table = torch.nn.Embedding(30, 6, sparse=True, padding_idx=3)
    opt = rule([table.weight])
    before = table.weight.detach().clone()
    for ids in (torch.tensor([3, 3]), torch.empty(0, dtype=torch.int64)):
        opt.zero_grad()
        table(ids).sum().backward()
        assert table.weight.grad._nnz() == 0
        with verified(opt):
            opt.step()
    assert same_bits(table.weight, before)


@every_rule
def test_embedding_bag(rule):
    bag = torch.nn.EmbeddingBag(30, 6, sparse=True, mode="sum")
    opt = rule([bag.weight])
    for _ in range(2):
        opt.zero_grad()
        (bag(torch.randint(30, (4, 5))) * torch.randn(4, 6)).sum().backward()
        with verified(opt):
            opt.step()


# ----------------------------------------------------------------------- shapes, dtypes, layouts

DIMS = [
    1,
    2,
    3,
    15,
    16,
    17,
    31,
    63,
    64,
    65,
    100,
    127,
    128,
    255,
    257,
    511,
    512,
    513,
    768,
    1023,
    1100,
]


@every_rule
@pytest.mark.parametrize("dim", DIMS)
def test_row_lengths(rule, dim):
    p = parameter(23, dim)
    counts = [*range(10)] * 2 + [11] * 300 + [4, 5, 4]
    run_verified(rule([p]), p, entries(p, counts), entries(p, [22, 3, 4]))


@every_rule
@floats("param")
@floats("grad")
@pytest.mark.parametrize("momentum", [None, torch.float32, torch.bfloat16, torch.float16])
def test_every_mixture_of_dtypes(rule, param, grad, momentum):
    p = parameter(40, 19, dtype=param)
    opt = rule([p], momentum_dtype=momentum)
    run_verified(opt, p, *(sparse_grad(p, 150, dtype=grad) for _ in range(2)))


@every_rule
@pytest.mark.parametrize("dim", [512, 513, 1100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_long_rows_of_other_dtypes(rule, dim, dtype):
    p = parameter(9, dim, dtype=dtype)
    run_verified(rule([p]), p, entries(p, [3] * 600 + [1, 8, 1]), entries(p, [3, 1]))


@every_rule
@pytest.mark.parametrize("shape", [(7,), (6, 5), (4, 3, 5), (3, 2, 4, 5)], ids=str)
@pytest.mark.parametrize("make", ["sparse_dim", "to_sparse"])
def test_every_sparse_dim(rule, shape, make):
    p = parameter(*shape)
    opt = rule([p])
    for sparse_dim in range(1, len(shape) + 1):
        if make == "to_sparse":
            dense = torch.randn(shape) * (torch.rand(shape) < 0.5)
            grads = [dense.to_sparse(sparse_dim)]
        else:
            grads = [sparse_grad(p, 30, sparse_dim=sparse_dim) for _ in range(2)]
        run_verified(opt, p, *grads)


@every_rule
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0,), (1, 1), (1,)], ids=str)
def test_degenerate_tables(rule, shape):
    p = parameter(*shape)
    nnz = 0 if shape[0] == 0 else 4
    run_verified(rule([p]), p, sparse_grad(p, nnz), sparse_grad(p, nnz, coalesced=True))


@every_rule
@views("param", 2)
def test_memory_layouts_of_matrices(rule, param):
    p = Parameter(param.make(torch.randn(30, 9)))
    run_verified(
        rule([p]), p, sparse_grad(p, 100), sparse_grad(p, 3), sparse_grad(p, 50, sparse_dim=2)
    )


@every_rule
@views("param", 4)
@pytest.mark.parametrize("sparse_dim", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_layouts(rule, param, sparse_dim, dtype):
    p = Parameter(param.make(torch.randn(5, 4, 3, 6).to(dtype)))
    opt = rule([p], momentum_dtype=torch.float32)
    run_verified(opt, p, *(sparse_grad(p, 40, sparse_dim=sparse_dim) for _ in range(2)))


@every_rule
@pytest.mark.parametrize(
    "shape", [(2, 1, 3, 4), (2, 1, 1, 3, 4), (1, 2, 3, 4), (2, 3, 1, 4)], ids=str
)
@pytest.mark.parametrize("order", ["transposed", "every-second"])
def test_layouts_with_dimensions_of_length_one(rule, shape, order):
    make = {v.name: v.make for v in VIEWS}[order]
    for sparse_dim in range(1, len(shape) + 1):
        p = Parameter(make(torch.randn(shape)))
        run_verified(rule([p]), p, sparse_grad(p, 20, sparse_dim=sparse_dim))


@every_rule
@pytest.mark.parametrize("dim", [600, 1100])
def test_long_rows_of_a_transposed_parameter(rule, dim):
    p = Parameter(torch.randn(dim, 8).mT)
    run_verified(rule([p]), p, sparse_grad(p, 30), sparse_grad(p, 5))


@every_rule
def test_nothing_is_written_beside_a_view(rule):
    big = torch.randn(12, 10)
    before = big.clone()
    p = Parameter(big[1::2, 2:9])
    opt = rule([p])
    run_verified(opt, p, entries(p, [0, 5, 3, 0]))
    outside = torch.ones(12, 10, dtype=torch.bool)
    outside[torch.tensor([1, 7, 11]), 2:9] = False
    assert same_bits(big[outside], before[outside])
    assert not bool((big[~outside] == before[~outside]).any())


@every_rule
@pytest.mark.parametrize(
    "make",
    [
        lambda n, d: torch.randn(d, n).T,
        lambda n, d: torch.randn(2 * n, d)[::2],
        lambda n, d: torch.randn(n, d + 3)[:, 2 : d + 2],
        lambda n, d: torch.randn(n, 2 * d)[:, ::2],
        lambda n, d: torch.randn(d).expand(n, d),
        lambda n, d: torch.randn(n, 1).expand(n, d),
        lambda n, d: torch.randn(1).expand(n, d),
        lambda n, d: torch.randn(n * d + 1)[1:].view(n, d),
    ],
    ids=[
        "transposed",
        "every-second",
        "columns",
        "every-second-column",
        "one-row",
        "one-column",
        "one-number",
        "misaligned",
    ],
)
@pytest.mark.parametrize("dim", [1, 5, 600])
def test_non_contiguous_values(rule, make, dim):
    p = parameter(20, dim)
    rows = torch.randint(20, (1, 37))
    run_verified(rule([p]), p, torch.sparse_coo_tensor(rows, make(37, dim), p.shape))


@every_rule
@pytest.mark.parametrize(
    "make",
    [
        lambda i: i.T.contiguous().T,
        lambda i: torch.stack([i, i + 1], 2)[:, :, 0],
        lambda i: torch.cat([i, i])[: i.shape[0]],
        lambda i: i[:, :1].expand(i.shape),
    ],
    ids=["transposed", "every-second", "slice", "expanded"],
)
@pytest.mark.parametrize("sparse_dim", [1, 2])
def test_non_contiguous_indices(rule, make, sparse_dim):
    p = parameter(20, 7, 3)
    indices = make(torch.randint(7, (sparse_dim, 37)))
    grad = torch.sparse_coo_tensor(indices, torch.randn(37, *p.shape[sparse_dim:]), p.shape)
    assert grad._indices().stride() == indices.stride()
    run_verified(rule([p]), p, grad)


@every_rule
def test_several_sparse_parameters_in_one_step(rule):
    kinds = [(50, 1), (1, 64), (1000, 17), (7, 600), (300,), (6, 5, 4), (0, 3), (90, 128)]
    dtypes = [torch.float32, torch.bfloat16, torch.float64, torch.float16]
    params = [parameter(*shape, dtype=d) for shape in kinds for d in dtypes]
    opt = rule(params)
    for step in range(3):
        for k, p in enumerate(params):
            if (k + step) % 5 == 0:
                p.grad = None
            elif (k + step) % 7 == 0:
                p.grad = torch.randn(p.shape).to(p.dtype)
            else:
                nnz = [0, 1, 40, 700][(k + step) % 4] if p.shape[0] else 0
                p.grad = sparse_grad(p, nnz, sparse_dim=1 + (k + step) % p.dim())
        with verified(opt):
            opt.step()


@every_rule
@pytest.mark.parametrize("layouts", ["dense-rows-dense", "rows-dense-rows"])
def test_gradient_layout_changes_from_step_to_step(rule, layouts):
    p = parameter(20, 6)
    opt = rule([p])
    for layout in layouts.split("-"):
        run_verified(opt, p, torch.randn(20, 6) if layout == "dense" else sparse_grad(p, 15))


@every_rule
def test_all_rows_touched_once_equals_the_dense_road(rule):
    a = parameter(33, 21)
    b = Parameter(a.detach().clone())
    first, second = rule([a]), rule([b])
    for _ in range(3):
        b.grad = torch.randn(33, 21)
        shuffled = torch.randperm(33)
        a.grad = torch.sparse_coo_tensor(shuffled[None], b.grad[shuffled], a.shape)
        first.step()
        second.step()
    assert same_bits(a, b)


@every_rule
def test_maximize(rule):
    p = parameter(20, 6)
    opt = rule([p], maximize=True)
    run_verified(opt, p, sparse_grad(p, 30), sparse_grad(p, 30))


@every_rule
def test_reference_agrees(rule):
    p = parameter(4, 5, 6, dtype=torch.float64)
    opt = rule([p], fused=False)
    run_verified(opt, p, *(sparse_grad(p, 30, sparse_dim=d) for d in (1, 2, 3, 1)))


@pytest.mark.parametrize("rule", RULES[:2], ids=lambda r: r.name)
def test_nan_and_infinity_stay_in_their_rows(rule):
    p = Parameter(torch.ones(6, 2))
    values = torch.ones(4, 2)
    values[0, 0], values[1, 1] = torch.nan, torch.inf
    values[2], values[3] = torch.inf, -torch.inf
    p.grad = torch.sparse_coo_tensor([[1, 3, 5, 5]], values, (6, 2))
    opt = rule([p])
    opt.step()
    assert p.isnan().nonzero().tolist() == [[1, 0], [5, 0], [5, 1]]  # Inf - Inf is NaN
    momentum = opt.state[p]["exp_avg"]
    assert momentum.isnan().nonzero().tolist() == [[1, 0], [5, 0], [5, 1]]
    assert momentum.isinf().nonzero().tolist() == [[3, 1]]


# ---------------------------------------------------------------------- order of the summation


def summed_by_lion(p, grad):
    """With both betas zero and no momentum, the new momentum is the summed gradient itself."""
    set_grad(p, grad)
    opt = Lion(
        [p], betas=(0.0, 0.0), momentum_dtype=torch.float32 if p.element_size() < 4 else None
    )
    opt.step()
    return opt.state[p]["exp_avg"]


@pytest.mark.parametrize(
    "count", [1, 2, 255, 256, 257, 511, 512, 513, 1023, 1024, 1025, 2049, 5000]
)
@pytest.mark.parametrize("dim", [1, 3, 16, 65, 600])
@pytest.mark.parametrize("kind", ["float32", "float64", "bfloat16", "float32-from-bfloat16"])
def test_summation_order_bit_by_bit(count, dim, kind):
    dtype = getattr(torch, kind.split("-")[0])
    values_dtype = getattr(torch, kind.split("-")[-1])
    p = parameter(6, dim, dtype=dtype)
    rows = torch.cat([torch.tensor([1, 5, 0]), torch.full((count,), 3), torch.tensor([5, 1, 5])])
    rows = rows[torch.randperm(len(rows))]
    grad = entries(p, rows, dtype=values_dtype)
    touched, sums = summed_gradient(
        grad, torch.float64 if dtype == torch.float64 else torch.float32
    )
    momentum = summed_by_lion(p, grad)
    assert touched.tolist() == [0, 1, 3, 5]
    assert same_bits(momentum[touched], sums + 0.0)
    assert not bool(momentum[torch.tensor([2, 4])].any())


def test_the_order_makes_a_difference():
    # Guards the tests around this one: other orders of the same numbers give other bits.
    values = torch.randn(1000, 1)
    grad = torch.sparse_coo_tensor(torch.zeros(1, 1000, dtype=torch.int64), values, (1, 1))
    _, sums = summed_gradient(grad, torch.float32)
    one_by_one = torch.zeros(1)
    for v in values:
        one_by_one = one_by_one + v
    assert not same_bits(sums[0], one_by_one)
    assert not same_bits(sums[0], values.sum(0))


@pytest.mark.parametrize("dim,count", [(1, 1_000_000), (3, 300_000), (64, 30_000)])
def test_very_long_runs(dim, count):
    p = parameter(5, dim)
    rows = torch.full((count,), 2)
    rows[torch.randint(count, (50,))] = 4
    rows[torch.randint(count, (50,))] = 0
    grad = entries(p, rows)
    momentum = summed_by_lion(p, grad)
    touched, sums = summed_gradient(grad, torch.float32)
    assert same_bits(momentum[touched], sums + 0.0)
    exact = torch.zeros(5, dim, dtype=torch.float64)
    exact.index_add_(0, rows, grad._values().double())
    size = torch.zeros(5, dim, dtype=torch.float64)
    size.index_add_(0, rows, grad._values().double().abs())
    additions = 256 + count / 256
    assert bool(((momentum - exact).abs() <= size * additions * 2.0**-24).all())


@every_rule
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_skewed_popularity(rule, dtype):
    # A few rows take most entries: runs of all lengths, long ones side by side, over many tasks.
    p = parameter(2000, 24, dtype=dtype)
    rows = (torch.rand(20_000) ** 8 * 2000).long()
    run_verified(rule([p]), p, entries(p, rows), entries(p, rows.sort().values))


def test_long_runs_at_the_seams_of_parameters():
    # The last row of one table and the first of the next are long and adjacent when sorted.
    params = [parameter(3, 8) for _ in range(4)]
    opt = Tiger(params, weight_decay=0.1)
    for k, p in enumerate(params):
        p.grad = entries(p, [2] * (3000 + k) + [0] * (2500 - k))
    with verified(opt):
        opt.step()


@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 2, 255, 256, 257, 1024, 1025, 2047, 2048, 2049, 4096])
def test_equal_runs_over_the_borders_of_tasks(threads, length):
    torch.set_num_threads(threads)
    p = parameter(100_000 // length + 1, 4)
    rows = torch.arange(100_000) // length
    grad = entries(p, rows)
    momentum = summed_by_lion(p, grad)
    touched, sums = summed_gradient(grad, torch.float32)
    assert same_bits(momentum[touched], sums + 0.0)


@pytest.mark.parametrize("rows", [2, 3, 1 << 11, (1 << 11) + 1, 1 << 22, (1 << 22) + 1])
def test_sorting_of_many_digits(rows):
    p = Parameter(torch.zeros(rows, 1))
    ids = torch.randint(rows, (20_000,))
    ids[:2] = torch.tensor([rows - 1, 0])
    grad = entries(p, ids)
    momentum = summed_by_lion(p, grad)
    touched, sums = summed_gradient(grad, torch.float32)
    assert same_bits(momentum[touched], sums + 0.0)
    assert int(momentum.count_nonzero()) == len(touched)


@pytest.mark.parametrize("sparse_dim", [1, 2])
def test_offsets_beyond_32_bits(sparse_dim):
    # 2.3e9 elements; memory that is never written costs nothing.
    rows, dim = 2**27 + 3, 17
    ids = torch.tensor([0, 2**26 + 1, rows - 1])
    big = [torch.empty(rows, dim, dtype=torch.bfloat16) for _ in range(2)]
    small = [torch.randn(3, dim).bfloat16() for _ in range(2)]
    for b, s in zip(big, small):
        b[ids] = s
    which = torch.tensor([2, 1, 2, 0])
    columns = torch.tensor([16, 3, 16, 0])
    indices = [torch.stack([which, columns][:sparse_dim]) for _ in range(2)]
    indices[0] = torch.cat([ids[which][None], indices[0][1:]])
    values = torch.randn([4, dim][: 3 - sparse_dim]).bfloat16()
    hyper = dict(lr=0.1, beta1=0.5, beta2=0.5, weight_decay=0.3)
    before = small[0].clone()
    for (param, momentum), index in zip((big, small), indices):
        torch.ops.tiger_ext.sign_momentum_rows_([param], [index], [values], [momentum], **hyper)
    assert not same_bits(small[0], before)
    for b, s in zip(big, small):
        assert same_bits(b[ids], s)


# ------------------------------------------------------------------------------------ properties


@st.composite
def _row_problems(draw):
    sparse_dim = draw(st.integers(1, 3))
    shape = draw(st.lists(st.integers(1, 6), min_size=sparse_dim, max_size=sparse_dim))
    tail = draw(st.lists(st.integers(1, 40), min_size=0, max_size=2))
    nnz = draw(st.integers(0, 60))
    repeat = draw(st.sampled_from([1, 1, 1, 40]))
    index = [draw(st.lists(st.integers(0, n - 1), min_size=nnz, max_size=nnz)) for n in shape]
    return dict(
        shape=(*shape, *tail),
        indices=torch.tensor(index, dtype=torch.int64).repeat(1, repeat),
        param=draw(st.sampled_from(FLOAT_TYPES)),
        grad=draw(st.sampled_from(FLOAT_TYPES)),
        momentum=draw(st.sampled_from([None, torch.float32, torch.bfloat16, torch.float16])),
        rule=draw(st.sampled_from(RULES)),
        threads=draw(st.integers(1, 3)),
        transposed=draw(st.booleans()),
        seed=draw(st.integers(0, 10**6)),
    )


FLOAT_TYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@settings(max_examples=100, phases=NO_SHRINK)
@given(_row_problems())
def test_any_row_gradient(problem):
    torch.manual_seed(problem["seed"])
    torch.set_num_threads(problem["threads"])
    p = parameter(*problem["shape"], dtype=problem["param"])
    if problem["transposed"] and p.dim() > 1:
        p = Parameter(p.detach().mT.contiguous().mT)
    indices = problem["indices"]
    opt = problem["rule"]([p], momentum_dtype=problem["momentum"])
    for _ in range(2):
        values = torch.randn(indices.shape[1], *p.shape[indices.shape[0] :]).to(problem["grad"])
        set_grad(p, torch.sparse_coo_tensor(indices, values, p.shape))
        with verified(opt):
            opt.step()


@settings(max_examples=60)
@given(
    lengths=st.lists(st.sampled_from([1, 2, 7, 255, 256, 257, 600, 1300]), min_size=1, max_size=12),
    dim=st.sampled_from([1, 2, 17, 48, 130]),
    seed=st.integers(0, 10**6),
    threads=st.integers(1, 4),
)
def test_any_run_lengths_are_summed_bit_by_bit(lengths, dim, seed, threads):
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    rows = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    if seed % 2:
        rows = rows[torch.randperm(len(rows))]
    p = parameter(len(lengths), dim)
    grad = entries(p, rows)
    assert same_bits(summed_by_lion(p, grad), summed_gradient(grad, torch.float32)[1] + 0.0)


@settings(max_examples=40)
@given(ids=st.lists(st.integers(0, 9), min_size=1, max_size=50))
def test_entries_may_be_interleaved_by_row(ids):
    # Only the order within a row counts: sorting the rows stably changes no bit.
    torch.manual_seed(0)
    ids = torch.tensor(ids)
    values = torch.randn(len(ids), 3)
    order = ids.sort(stable=True).indices
    a = Parameter(torch.ones(10, 3))
    b = Parameter(torch.ones(10, 3))
    a.grad = torch.sparse_coo_tensor(ids[None], values, (10, 3))
    b.grad = torch.sparse_coo_tensor(ids[order][None], values[order], (10, 3))
    opt = Lion([a, b], betas=(0.0, 0.0), weight_decay=0.1)
    opt.step()
    assert same_bits(a, b)
    assert same_bits(opt.state[a]["exp_avg"], opt.state[b]["exp_avg"])
