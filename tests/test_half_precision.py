# SPDX-License-Identifier: Apache-2.0
"""Half precision is rounded once, where it is stored: the arithmetic between is float32's."""

import itertools

import pytest
import torch

import tiger_ext

HALVES = (torch.bfloat16, torch.float16)
RULES = {
    "tiger": lambda p, **more: tiger_ext.Tiger(p, lr=0.01, weight_decay=0.1, **more),
    "lion": lambda p, **more: tiger_ext.Lion(p, lr=0.01, weight_decay=0.1, **more),
    "adamw": lambda p, **more: tiger_ext.AdamW(p, lr=0.01, weight_decay=0.1, **more),
    "rmsprop": lambda p, **more: tiger_ext.AdamW(p, lr=0.01, betas=(0, 0.9), **more),
}
# (parameter and gradient, momentum): True for half precision.
MIXTURES = ((True, True), (True, False), (False, True))
DIMS = (1, 15, 16, 17, 40, 300)


def numbers(shape, dtype, seed, *, wild=False):
    """Return numbers of all sizes; ``wild``: all that there are, NaN and Inf among them."""
    generator = torch.Generator().manual_seed(seed)
    if wild:
        bits = torch.randint(-(2**15), 2**15, shape, generator=generator, dtype=torch.int16)
        return bits.view(dtype) if dtype in HALVES else bits.view(torch.bfloat16).to(dtype)
    sizes = torch.exp2(torch.randint(-30, 3, shape, generator=generator).float())
    return (torch.randn(shape, generator=generator) * sizes).to(dtype)


def check(rule, half, mixture, shape, *, sparse, wild, lazy="frozen"):
    """Compare each step with one in float32 from the same numbers, rounded by torch."""
    dtypes = [half if small else torch.float32 for small in mixture]
    p = torch.nn.Parameter(numbers(shape, dtypes[0], 1, wild=wild))
    wide = torch.nn.Parameter(p.detach().float())
    opt = RULES[rule]([p], momentum_dtype=dtypes[1], lazy=lazy)
    model = RULES[rule]([wide], momentum_dtype=torch.float32, lazy=lazy)
    for step in range(3):
        g = numbers(shape, dtypes[0], 2 + step, wild=wild)
        if sparse:
            ids = torch.tensor([[3, 0, 3, 5, step]])
            p.grad = torch.sparse_coo_tensor(ids, g[ids[0]], shape)
            wide.grad = torch.sparse_coo_tensor(ids, g[ids[0]].float(), shape)
        else:
            p.grad, wide.grad = g, g.float()
        opt.step()
        model.step()
        pairs = [(p, wide)]
        for name, state in opt.state[p].items():
            if state.is_floating_point():
                pairs.append((state, model.state[wide][name]))
        for got, expected in pairs:
            rounded = expected.detach().to(got.dtype)
            same = torch.equal(got.isnan(), rounded.isnan())
            assert same and torch.equal(got.nan_to_num(nan=0.0), rounded.nan_to_num(nan=0.0)), (
                rule,
                mixture,
                shape,
                step,
            )
            expected.detach().copy_(got)


def check_all(half):
    for rule, mixture, dim in itertools.product(RULES, MIXTURES, DIMS):
        for sparse, wild in itertools.product((True, False), repeat=2):
            check(rule, half, mixture, (9, dim), sparse=sparse, wild=wild)
    for rule, mixture in itertools.product(RULES, MIXTURES):
        for lazy in ("decay", "exact")[: 2 if rule in ("tiger", "lion") else 1]:
            check(rule, half, mixture, (9, 23), sparse=True, wild=False, lazy=lazy)
        check(rule, half, mixture, (9, 7000), sparse=False, wild=True)


# The model is made equal after each step.
@pytest.mark.filterwarnings("ignore:.*was written to by others")
@pytest.mark.parametrize("half", HALVES, ids=str)
def test_each_step_is_that_of_float32_rounded_once(half):
    check_all(half)


def test_each_instruction_set_rounds_alike(on_each_instruction_set):
    on_each_instruction_set(
        "from test_half_precision import *; [check_all(half) for half in HALVES]"
    )


@pytest.mark.parametrize("half", HALVES, ids=str)
def test_every_number_of_a_half_is_kept_by_a_step_that_does_nothing(half):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    p = torch.nn.Parameter(every.view(half).clone())
    p.grad = torch.zeros_like(p)
    tiger_ext.Tiger([p], lr=0.0).step()
    number = ~p.isnan()
    assert torch.equal(number, ~every.view(half).isnan())
    assert torch.equal(p.detach().view(torch.int16)[number], every[number])


@pytest.mark.parametrize("half", HALVES, ids=str)
def test_halfway_between_two_numbers_the_even_one_is_taken(half):
    last = torch.finfo(half).eps
    low = 1 + last * torch.arange(64)
    p = torch.nn.Parameter(torch.zeros(64, dtype=half))
    opt = tiger_ext.Tiger([p], lr=0.01, betas=(0.5,))
    opt.init_state()
    opt.state[p]["exp_avg"].copy_(low)
    p.grad = (low + last).to(half)
    opt.step()
    even = low + last * (torch.arange(64) % 2)
    assert torch.equal(opt.state[p]["exp_avg"].float(), even)
