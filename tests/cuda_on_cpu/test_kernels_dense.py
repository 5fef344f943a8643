# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels for strided gradients give the bits of the CPU's own."""

import itertools

import emulation
import pytest
import torch
from both import (
    ON_GPU,
    Group,
    Problem,
    compare,
    momenta,
    poisoned_memory,
    problem,
    repeat,
    shifted,
    shifts,
)
from cases import FLOATS, RULES, SIGN_RULES, dense_grad, every_rule, floats, parameter, views

# Tensors are cut into chunks of this many elements.
CHUNK = 8192
SIZES = [
    *range(6),
    *(7, 8, 9, 15, 16, 17, 31, 32, 33),
    *(255, 256, 257, 1023, 1024, 1025, 2047, 2048, 2049),
    *(CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 1, 40_000),
]
F32, F64, BF16, F16 = FLOATS.values()


# ------------------------------------------------------------------------------ sizes, alignment


@every_rule
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["float32", "bfloat16"])
def test_sizes(rule, size, dtype):
    p = parameter(size, dtype=dtype)
    compare(problem(rule, [p], repeat(dense_grad, [p])))


# How many elements into their memory parameter, gradient and first state start.
ALIGNMENTS = [
    *((k, k, k) for k in range(1, 9)),
    *((k, (k + 3) % 9, (k + 5) % 9) for k in range(1, 9)),
    *(a for a in itertools.product((0, 1), repeat=3) if 0 < sum(a) < 3),
    *((4, 4, 2), (2, 4, 4), (4, 2, 4), (8, 4, 8)),
]
# Parameter, gradient, momentum.
TYPES = {
    "float32": (F32, F32, F32),
    "float64": (F64, F64, F64),
    "bfloat16": (BF16, BF16, BF16),
    "mixed": (F32, BF16, F16),
    "mixed-double": (BF16, F64, F32),
}


@every_rule
@pytest.mark.parametrize("types", TYPES.values(), ids=TYPES)
@pytest.mark.parametrize("starts", ALIGNMENTS, ids=lambda a: "-".join(map(str, a)))
def test_alignments(rule, types, starts):
    of_param, of_grad, of_momentum = types
    sizes = [1, 2, 5, 7, 8, 9, 15, 16, 17, 255, 1001, CHUNK - 3, CHUNK + 5]
    params, states = [], {}
    for k, size in enumerate(sizes):
        params.append(shifted(parameter(size, dtype=of_param), starts[0]))
        # The second moment starts somewhere else again.
        states[k] = momenta(rule, params[k], of_momentum, shifts(starts[2], (starts[2] + 2) % 9))
    steps = repeat(lambda p: shifted(dense_grad(p, of_grad), starts[1]), params, 2)
    compare(problem(rule, params, steps, states, momentum_dtype=None))


@every_rule
@views("param", 4)
@views("grad", 4)
def test_memory_layouts(rule, param, grad):
    p = param.make(torch.randn(3, 5, 7, 6))
    compare(problem(rule, [p], repeat(lambda p: grad.make(torch.randn(p.shape)), [p], 2)))


@every_rule
@views("param", 2)
@views("state", 2)
@pytest.mark.parametrize("shape", [(9, 11), (100, 130)], ids=str)
def test_memory_layouts_of_states(rule, param, state, shape):
    p = param.make(torch.randn(shape))
    first = momenta(rule, p, F32, state.make)
    compare(problem(rule, [p], repeat(lambda p: torch.randn(p.shape), [p], 2), {0: first}))


@every_rule
@pytest.mark.parametrize("shape", [(1, 1), (13, 1), (1, 21), ()], ids=str)
def test_expanded_gradients(rule, shape):
    p = parameter(13, 21)
    compare(problem(rule, [p], repeat(lambda p: torch.randn(shape).expand(13, 21), [p], 2)))


# ---------------------------------------------------------------------------------------- numbers


@every_rule
@floats("param")
@floats("grad")
@floats("momentum")
def test_every_mixture_of_dtypes(rule, param, grad, momentum):
    params = [parameter(1037, dtype=param), shifted(parameter(333, dtype=param), 1)]
    states = {k: momenta(rule, p, momentum) for k, p in enumerate(params)}
    compare(problem(rule, params, repeat(lambda p: dense_grad(p, grad), params), states))


def special(count, dtype):
    """Return numbers of all kinds: of every size, halfway between 16-bit numbers, and NaNs."""
    pattern = torch.randint(-(2**31), 2**31, (count,)).to(torch.int32)
    pattern[::3] = pattern[::3] & ~0xFFFF | 0x8000  # between two bfloat16
    pattern[1::3] = pattern[1::3] & ~0x1FFF | 0x1000  # ... or float16
    x = pattern.view(F32)
    x[: count // 2] *= 2.0 ** -(x[: count // 2].abs().log2().nan_to_num(0, 0, 0) * 0.9).round()
    inf, nan = torch.inf, torch.nan
    x[:12] = torch.tensor([0, -0.0, inf, -inf, nan, 1e-45, -1e-45, 1e-40, 3e38, 7e4, 6e-8, -3e-8])
    return x[torch.randperm(count)].to(dtype)


@every_rule
@floats("param")
@floats("grad")
@pytest.mark.parametrize("momentum", [F32, BF16, F16], ids=["float32", "bfloat16", "float16"])
def test_numbers_of_all_kinds(rule, param, grad, momentum):
    p = special(3000, param)
    state = momenta(rule, p, momentum)
    for name in state.keys() - {"step"}:
        first = special(3000, state[name].dtype)
        state[name] = first.abs() if name == "exp_avg_sq" else first
    steps = repeat(lambda p: special(3000, grad), [p])
    compare(problem(rule, [p], steps, {0: state}))


@pytest.mark.parametrize("rule", SIGN_RULES, ids=lambda r: r.name)
@floats("dtype")
def test_zero_gradient_and_momentum_only_decay(rule, dtype):
    p = parameter(100, dtype=dtype)
    steps = [[torch.zeros_like(p)], [-torch.zeros_like(p)]]
    side = compare(problem(rule, [p], steps))
    assert not bool((side.params[0].cpu() == p).all())


@pytest.mark.parametrize("rule", RULES[2:], ids=lambda r: r.name)
@pytest.mark.parametrize("step", [0, 1, 999, 2**24, 2**40])
def test_bias_correction_at_any_step(rule, step):
    p = parameter(100)
    state = momenta(rule, p, F32) | {"step": torch.tensor(step)}
    compare(problem(rule, [p], repeat(dense_grad, [p]), {0: state}))


@every_rule
@pytest.mark.parametrize("maximize", [False, True], ids=["descend", "ascend"])
def test_every_hyperparameter_reaches_its_group(rule, maximize):
    groups = []
    for k in range(5):
        own = {
            "lr": 0.01 * (k + 1),
            "weight_decay": 0.1 * (k + 1),
            "maximize": maximize ^ (k % 2 == 1),
        }
        own["betas"] = tuple(b - 0.01 * k if b else b for b in rule.options["betas"])
        if rule.name.startswith("adamw"):
            own["eps"] = 10.0 ** (-3 - k)
        groups.append(Group(rule, [parameter(50 + k), parameter(3)], own))
    task = Problem(groups, [])
    task.steps = repeat(dense_grad, task.params)
    compare(task)


# ----------------------------------------------------------------------------------- many tensors


def small(count, dtypes):
    sizes = [(k * k) % 83 if k % 11 else 0 for k in range(count)]
    return [parameter(n, dtype=dtypes[k % len(dtypes)]) for k, n in enumerate(sizes)]


@every_rule
@pytest.mark.parametrize("count", [1, 2, 26, 400])
@pytest.mark.parametrize("dtypes", [[F32], [F32, BF16, F64, F16]], ids=["float32", "mixed"])
def test_many_tensors(rule, count, dtypes):
    params = small(count, dtypes)
    compare(problem(rule, params, repeat(dense_grad, params, 2)))


@pytest.mark.parametrize("rule", RULES[::2], ids=lambda r: r.name)
def test_very_many_tensors(rule):
    params = small(1500, [F32, F32, BF16])
    compare(problem(rule, params, repeat(dense_grad, params, 2)))


@pytest.mark.parametrize("rule", SIGN_RULES, ids=lambda r: r.name)
def test_large_and_small_tensors_in_turn(rule):
    sizes = [1, CHUNK, 0, 3, CHUNK + 1, 17, 40_000, 0, 2, 3 * CHUNK, 5, 5, CHUNK - 1]
    params = [parameter(n) for n in sizes * 4]
    compare(problem(rule, params, repeat(dense_grad, params, 2)))


@pytest.mark.skipif(ON_GPU, reason="launches are counted in the emulation only")
@pytest.mark.parametrize("count", [1, 400, 1500])
def test_many_tensors_take_few_launches(count):
    params = [p.requires_grad_() for p in small(count, [F32])]
    opt = RULES[0](params)
    for number in range(2):
        for p in params:
            p.grad = dense_grad(p)
        before = emulation.launches()
        opt.step()
        assert 0 < emulation.launches() - before + (count == 1) <= 10, number


@pytest.mark.parametrize("count", [4, 60])
def test_mixed_rules_groups_and_dtypes_in_one_step(count):
    groups = []
    for k in range(count):
        params = [
            parameter(10 + k, dtype=list(FLOATS.values())[k % 4]),
            parameter(k % 3, 7),
            torch.randn(5, 6 + k).T,
        ]
        options = {"momentum_dtype": [None, F32, BF16, F16][k // 4 % 4], "maximize": k % 5 == 0}
        groups.append(Group(RULES[k % 4], params, options))
    task = Problem(groups, [])
    for number in range(3):
        task.steps.append(
            [
                None if (k + number) % 7 == 3 else dense_grad(p, list(FLOATS.values())[k // 3 % 4])
                for k, p in enumerate(task.params)
            ]
        )
    compare(task)


# ---------------------------------------------------------------------------------- order, memory


def order_problem(rule):
    params = [parameter(n) for n in (0, 5, CHUNK - 1, 3 * CHUNK + 7)] + [torch.randn(40, 30).T]
    return problem(rule, params, repeat(dense_grad, params, 2))


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
