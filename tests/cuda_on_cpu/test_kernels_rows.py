# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels for sparse gradients give the bits of the CPU's own, and touch nothing else."""

import emulation
import pytest
import torch
from both import (
    ON_GPU,
    Group,
    Problem,
    compare,
    entries,
    poisoned_memory,
    problem,
    repeat,
)
from cases import FLOATS, RULES, dense_grad, every_rule, parameter, sparse_grad

F32, F64, BF16, F16 = FLOATS.values()
# A row's entries are summed in pieces of this many.
PIECE = 256


def skewed(count, rows):
    """Make indices of which a few make up most, and are not the lowest."""
    return torch.randperm(rows)[(torch.rand(count) ** 8 * rows).long()]


# -------------------------------------------------------------------------- lengths and numbers

DIMS = [
    *(1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 31, 32, 33, 48, 64, 100, 127, 128, 129),
    *(255, 256, 257, 300, 512, 1000, 1023, 1024, 1025, 2048, 4100),
]


@every_rule
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize(
    "types", [(F32, F32), (BF16, BF16), (F32, BF16)], ids=["f32", "bf16", "mix"]
)
def test_row_lengths(rule, dim, types):
    p = parameter(60, dim, dtype=types[0])
    few = skewed(min(700, 100_000 // dim), 60)
    long_run = torch.cat([few, torch.full((PIECE + 1,), 41)])[torch.randperm(len(few) + PIECE + 1)]
    order = [long_run, [59], few, torch.arange(60)]
    compare(problem(rule, [p], [[entries(p, ids, dtype=types[1])] for ids in order]))


COUNTS = [0, 1, 2, 31, 32, 33, 255, 256, 257, 258, 511, 512, 513, 1000, 5000]


@every_rule
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("dims", [[3], [20], [64], [1, 3, 20, 64]], ids=str)
def test_numbers_of_entries(rule, count, dims):
    params = [parameter(300, dim) for dim in dims]
    steps = [[sparse_grad(p, count, coalesced=c) for p in params] for c in (False, True)]
    steps.append([entries(p, skewed(count, 300)) for p in params])
    compare(problem(rule, params, steps))


# ------------------------------------------------------------------------------ orders of entries

ROWS = 2000


def _runs(*lengths):
    return torch.repeat_interleave(torch.arange(len(lengths)) * 7, torch.tensor(lengths))


PATTERNS = {
    "sorted": lambda: torch.arange(0, ROWS, 3),
    "reversed": lambda: torch.arange(ROWS - 1, 5, -2),
    "all-rows": lambda: torch.randperm(ROWS),
    "sorted-pairs": lambda: torch.arange(ROWS) // 2,
    "first-and-last": lambda: torch.tensor([ROWS - 1, 0]),
    "last": lambda: torch.tensor([ROWS - 1]),
    "first-and-last-in-turn": lambda: torch.tensor([ROWS - 1, 0]).repeat(700),
    "two-in-turn": lambda: torch.tensor([8, 3]).repeat(400),
    "three-blocks": lambda: torch.tensor([9, 1, 9]).repeat_interleave(300),
    "skewed": lambda: skewed(6000, ROWS),
    "skewed-sorted": lambda: skewed(6000, ROWS).sort().values,
    "unique-then-one-row": lambda: torch.cat([torch.arange(300), torch.full((600,), 1000)]),
    "one-row-then-unique": lambda: torch.cat([torch.full((600,), 2), torch.arange(3, 1003)]),
}


@every_rule
@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
@pytest.mark.parametrize("dims", [[20], [1, 3, 72]], ids=str)
def test_patterns(rule, pattern, dims):
    params = [parameter(ROWS, dim) for dim in dims]
    compare(problem(rule, params, repeat(lambda p: entries(p, pattern()), params, 2)))


@every_rule
@pytest.mark.parametrize("coalesced", [False, True], ids=["not-said", "said"])
@pytest.mark.parametrize("dims", [[20], [1, 130, 5]], ids=str)
@pytest.mark.parametrize("count", [1, 40, 2000])
def test_sorted_unique_rows(rule, coalesced, dims, count):
    params = [parameter(ROWS, dim) for dim in dims]

    def grad(p):
        ids = torch.randperm(ROWS)[:count].sort().values
        return entries(p, ids, coalesced=coalesced)

    steps = repeat(grad, params, 2)
    assert all(g.is_coalesced() == coalesced for grads in steps for g in grads)
    compare(problem(rule, params, steps))


@every_rule
@pytest.mark.parametrize("count", [255, 256, 257, 511, 512, 513, 1025, 5000])
@pytest.mark.parametrize("dims", [[20], [1, 3, 128]], ids=str)
@pytest.mark.parametrize("types", [(F32, F32), (BF16, F16), (F64, F64)], ids=["f32", "half", "f64"])
def test_one_row_takes_all(rule, count, dims, types):
    params = [parameter(5, dim, dtype=types[0]) for dim in dims]
    steps = [[entries(p, torch.full((count,), 4), dtype=types[1]) for p in params]]
    compare(problem(rule, params, steps))


@pytest.mark.parametrize("rule", RULES[::2], ids=lambda r: r.name)
@pytest.mark.parametrize("count", [PIECE * PIECE - 1, PIECE * PIECE, PIECE * PIECE + 1, 100_000])
def test_a_very_long_run(rule, count):
    p = parameter(5, 3)
    compare(problem(rule, [p], [[entries(p, torch.full((count,), 2))]]))


LENGTHS = [255, 256, 257, 511, 512, 513]


@every_rule
@pytest.mark.parametrize("before", [0, 1, 2, 255, 256, 257, 511, 512], ids="{}-before".format)
@pytest.mark.parametrize(
    "lengths",
    [
        LENGTHS,
        LENGTHS[::-1],
        [n for k in LENGTHS for n in (k, 1)],
        [256, 256, 257, 257, 255, 1, 255],
    ],
    ids=["ascending", "descending", "singles-between", "equal"],
)
@pytest.mark.parametrize("shuffled", [False, True], ids=["sorted", "shuffled"])
def test_runs_at_the_seams(rule, before, lengths, shuffled):
    """Runs around multiples of a piece, at positions around multiples of a piece."""
    ids = torch.cat([torch.arange(before), before + _runs(*lengths)])
    ids = ids[torch.randperm(len(ids))] if shuffled else ids
    tables = [parameter(int(ids.max()) + 1, dim) for dim in (3, 20)]
    compare(problem(rule, tables, repeat(lambda p: entries(p, ids), tables, 1)))


@pytest.mark.parametrize("rule", RULES[::2], ids=lambda r: r.name)
@pytest.mark.parametrize("length", [2, 3, 31, 32, 33, 128, 255, 256, 257, 512, 513])
def test_equal_runs(rule, length):
    ids = torch.arange(5000) // length
    p = parameter(int(ids.max()) + 1, 5)
    compare(problem(rule, [p], [[entries(p, ids)], [entries(p, ids.flip(0))]]))


@pytest.mark.parametrize("rows", [1, 2, 255, 256, 257, 65535, 65536, 65537, 2**20, 2**20 + 1])
def test_sorting_of_many_digits(rows):
    p = parameter(rows, 1)
    ids = torch.randint(rows, (3000,))
    ids[:2] = torch.tensor([rows - 1, 0])
    compare(problem(RULES[0], [p], [[entries(p, ids)]]))


# ----------------------------------------------------------------------------------- many tables


def tables(count, dtypes):
    dims = [1, 3, 8, 16, 20, 64, 65, 128, 130]
    return [
        parameter(1 + k * 37 % 300, dims[k * k % 9], dtype=dtypes[k % len(dtypes)])
        for k in range(count)
    ]


def some_entries(k, p, dtype=None):
    count = [0, 1, 40, 700, 3, 257][k * 7 % 6]
    if k % 3 == 2:
        return entries(p, skewed(count, len(p)), dtype=dtype)
    return sparse_grad(p, count, dtype=dtype, coalesced=k % 3 == 1)


@every_rule
@pytest.mark.parametrize("count", [1, 26, 200])
@pytest.mark.parametrize("dtypes", [[F32], [F32, BF16, F64, F16]], ids=["float32", "mixed"])
def test_many_tables(rule, count, dtypes):
    params = tables(count, dtypes)
    steps = []
    for number in range(2):
        steps.append([some_entries(k + number, p) for k, p in enumerate(params)])
        steps[-1][7::9] = [None] * len(steps[-1][7::9])
    compare(problem(rule, params, steps))


@pytest.mark.skipif(ON_GPU, reason="launches are counted in the emulation only")
def test_many_tables_take_few_launches():
    params = [p.requires_grad_() for p in tables(200, [F32])]
    opt = RULES[0](params)
    for k, p in enumerate(params):
        p.grad = some_entries(k, p)
    before = emulation.launches()
    opt.step()
    assert 0 < emulation.launches() - before <= 12


@pytest.mark.parametrize("count", [4, 40])
def test_dense_and_sparse_in_one_step(count):
    """Rules, dtypes, and from step to step layouts mixed."""
    types = list(FLOATS.values())
    groups = []
    for k in range(count):
        params = [
            parameter(30 + k, 1 + 5 * k % 41, dtype=types[k % 4]),
            parameter(k % 3, 7),
            torch.randn(25, 6 + k).T,
            parameter(100 * k % 999),
        ]
        options = {"momentum_dtype": [None, F32, BF16, F16][k // 4 % 4], "maximize": k % 5 == 0}
        groups.append(Group(RULES[k % 4], params, options))
    task = Problem(groups, [])
    for number in range(4):
        grads = []
        for k, p in enumerate(task.params):
            kind, dtype = (k + number) % 7, types[k // 3 % 4]
            if kind == 0:
                grads.append(None)
            elif kind % 2:
                grads.append(dense_grad(p, dtype))
            else:
                grads.append(sparse_grad(p, 90 if p.shape[0] else 0, dtype=dtype))
        task.steps.append(grads)
    compare(task)


@pytest.mark.parametrize("rule", RULES[::2], ids=lambda r: r.name)
def test_long_runs_at_the_seams_of_parameters(rule):
    params = [parameter(3, 8) for _ in range(4)]
    ids = [[2] * (3000 + k) + [0] * (2500 - k) for k in range(4)]
    compare(problem(rule, params, [[entries(p, i) for p, i in zip(params, ids)]]))


# ---------------------------------------------------------------------------------- order, memory


def order_problem(rule):
    params = [parameter(300, 20), parameter(50, 130), torch.randn(9, 40).T, parameter(500)]
    steps = []
    for _ in range(2):
        ids = [skewed(3000, 300), skewed(600, 50), torch.randint(40, (60,))]
        steps.append([*map(entries, params, ids), dense_grad(params[3])])
    return problem(rule, params, steps)


@pytest.mark.skipif(ON_GPU, reason="the order is chosen in the emulation only")
@every_rule
def test_order_of_blocks_and_threads(rule):
    task = order_problem(rule)
    try:
        for seed in range(1, 11):
            emulation.seed(seed)
            compare(task)
    finally:
        emulation.seed(1)


@every_rule
def test_new_memory_is_not_read(rule):
    task = order_problem(rule)
    with poisoned_memory():
        compare(task)
