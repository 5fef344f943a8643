# SPDX-License-Identifier: Apache-2.0
"""Sparse gradients of all shapes, dtypes and layouts: the CUDA kernels give the CPU's bits."""

import pytest
import torch
from both import DEVICE, ON_GPU, compare, entries, momenta, problem, repeat, shifted, shifts
from cases import FLOATS, RULES, every_rule, floats, parameter, sparse_grad, views
from oracle import same_bits
from torch.nn import Parameter

F32, F64, BF16, F16 = FLOATS.values()


@every_rule
@pytest.mark.parametrize("shape", [(7,), (6, 5), (4, 3, 5), (3, 2, 4, 5), (17, 1, 40)], ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["float32", "bfloat16"])
def test_every_sparse_dim(rule, shape, dtype):
    p = parameter(*shape, dtype=dtype)
    steps = [[sparse_grad(p, 30, sparse_dim=1 + d)] for d in range(len(shape))]
    dense = torch.randn(shape) * (torch.rand(shape) < 0.5)
    steps += [[dense.to(dtype).to_sparse(1 + d)] for d in range(len(shape))]
    compare(problem(rule, [p], steps))


@every_rule
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0,), (1, 1), (1,)], ids=str)
def test_degenerate_tables(rule, shape):
    p, other = parameter(*shape), parameter(3, 2)
    count = 4 if shape[0] else 0
    steps = [[sparse_grad(p, count, coalesced=c), sparse_grad(other, 2)] for c in (False, True)]
    compare(problem(rule, [p, other], steps))
    compare(problem(rule, [p], [[g] for g, _ in steps]))


@every_rule
@floats("param")
@floats("grad")
@floats("momentum")
def test_every_mixture_of_dtypes(rule, param, grad, momentum):
    tables = [parameter(60, 19, dtype=param), shifted(parameter(60, 64, dtype=param), 3)]
    states = {k: momenta(rule, p, momentum) for k, p in enumerate(tables)}
    ids = torch.cat([torch.randint(60, (150,)), torch.full((300,), 7)])
    compare(problem(rule, tables, repeat(lambda p: entries(p, ids, dtype=grad), tables, 2), states))


@every_rule
@floats("grad")
def test_nan_infinity_and_zeros(rule, grad):
    p = parameter(50, 6)
    kinds = torch.tensor([0, -0.0, torch.inf, -torch.inf, torch.nan, 1, -1, 1e-45, 3e38, 6e-8])
    steps = []
    for _ in range(3):
        values = kinds[torch.randint(len(kinds), (120, 6))].to(grad)
        steps.append([entries(p, torch.randint(50, (120,)), values=values)])
    compare(problem(rule, [p], steps))


STARTS = [*((k, k, k) for k in range(1, 5)), *((k, (k + 3) % 9, (k + 5) % 9) for k in range(9))]


@every_rule
@pytest.mark.parametrize("starts", STARTS, ids=lambda a: "-".join(map(str, a)))
@pytest.mark.parametrize(
    "types", [(F32, F32), (BF16, BF16), (F32, BF16)], ids=["f32", "bf16", "mix"]
)
def test_alignments(rule, starts, types):
    tables, states = [], {}
    for k, dim in enumerate((4, 8, 12, 17, 64, 136, 1024)):
        tables.append(shifted(parameter(9, dim, dtype=types[0]), starts[0]))
        states[k] = momenta(rule, tables[k], types[1], shifts(starts[2], (starts[2] + 2) % 9))

    def grad(p):
        values = shifted(torch.randn(25, p.shape[1]).to(types[1]), starts[1])
        return entries(p, torch.randint(9, (25,)), values=values)

    compare(problem(rule, tables, repeat(grad, tables, 2), states))


@every_rule
@views("param", 2)
@views("state", 2)
def test_memory_layouts(rule, param, state):
    params = [param.make(torch.randn(30, dim)) for dim in (1, 9, 64, 600)]
    states = {k: momenta(rule, p, F32, state.make) for k, p in enumerate(params)}
    kinds = [(100, 1), (3, 1), (50, 2)]
    steps = [[sparse_grad(p, count, sparse_dim=d) for p in params] for count, d in kinds]
    compare(problem(rule, params, steps, states))


@every_rule
@views("param", 4)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["float32", "bfloat16"])
def test_memory_layouts_of_many_dimensions(rule, param, dtype):
    p = param.make(torch.randn(5, 4, 3, 6).to(dtype))
    steps = [[sparse_grad(p, 40, sparse_dim=d)] for d in (1, 2, 3, 4)]
    compare(problem(rule, [p], steps))


VALUES = {
    "transposed": lambda n, d: torch.randn(d, n).T,
    "every-second": lambda n, d: torch.randn(2 * n, d)[::2],
    "columns": lambda n, d: torch.randn(n, d + 3)[:, 2 : d + 2],
    "every-second-column": lambda n, d: torch.randn(n, 2 * d)[:, ::2],
    "one-row": lambda n, d: torch.randn(1, d).expand(n, d),
    "one-column": lambda n, d: torch.randn(n, 1).expand(n, d),
    "one-number": lambda n, d: torch.ones(1, 1).expand(n, d),
}
INDICES = {
    "contiguous": lambda i: i,
    "transposed": lambda i: i.T.contiguous().T,
    "every-second": lambda i: torch.stack([i, i + 1], 2)[:, :, 0],
    "expanded": lambda i: i[:, :1].expand(i.shape),
}


@every_rule
@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)
@pytest.mark.parametrize("indices", INDICES.values(), ids=INDICES)
def test_non_contiguous_gradients(rule, values, indices):
    tables = [parameter(20, 3, dim) for dim in (1, 5, 64, 200)]

    def by_row(p):
        rows = indices(torch.randint(20, (1, 37)))
        return entries(p, rows, values=values(37, 3 * p.shape[2]).unflatten(1, p.shape[1:]))

    def by_pair(p):
        return entries(p, indices(torch.randint(3, (2, 37))), values=values(37, p.shape[2]))

    compare(problem(rule, tables, [[grad(p) for p in tables] for grad in (by_row, by_pair)]))


@pytest.mark.parametrize("sparse_dim,shape", [(1, (2**27 + 3, 17)), (2, (2**16 + 1, 2**16))])
def test_offsets_beyond_32_bits(sparse_dim, shape):
    # Memory that is never written costs nothing on the CPU.
    if ON_GPU and torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GiB of memory on the GPU")
    try:
        big = Parameter(torch.empty(shape, dtype=BF16, device=DEVICE))
        momentum = torch.empty_like(big.detach())
    except RuntimeError as error:
        pytest.skip(f"not enough memory: {error}")
    at = [torch.tensor([0, n // 2 + 1, n - 1], device=DEVICE) for n in shape[:sparse_dim]]
    tail = shape[sparse_dim:]
    params, momenta = (torch.randn(3, *tail).bfloat16() for _ in range(2))
    big.data[tuple(at)], momentum[tuple(at)] = params.to(DEVICE), momenta.to(DEVICE)
    which = torch.tensor([2, 1, 2, 0, 2])
    values = torch.randn(5, *tail).bfloat16()

    # The table beside it comes after more rows than 32 bits can count.
    small = parameter(20, 3)
    side = compare(
        problem(
            RULES[0],
            [params, small],
            [[entries(params, which, values=values), entries(small, [19, 0, 19])]],
            {0: {"exp_avg": momenta}},
        )
    )
    last = Parameter(small.to(DEVICE))
    opt = RULES[0]([big, last], fused=True)
    opt.state[big]["exp_avg"] = momentum
    big.grad = torch.sparse_coo_tensor(
        torch.stack([a[which.to(DEVICE)] for a in at]), values.to(DEVICE), shape
    )
    last.grad = side.params[1].grad
    opt.step()
    assert same_bits(big.detach()[tuple(at)], side.params[0])
    assert same_bits(momentum[tuple(at)], side.opt.state[side.params[0]]["exp_avg"])
    assert same_bits(last, side.params[1])
