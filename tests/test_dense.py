# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from cases import (
    RULES,
    SIGN_RULES,
    dense_grad,
    every_rule,
    floats,
    parameter,
    set_grad,
    views,
)
from oracle import same_bits, verified
from torch.nn import Parameter

from tiger_ext import AdamW, Lion, Tiger


def run_verified(optimizer, params, grads, steps=3):
    for _ in range(steps):
        for p, make in zip(params, grads):
            set_grad(p, make(p))
        with verified(optimizer):
            optimizer.step()


@every_rule
@floats("param")
@floats("grad")
@pytest.mark.parametrize(
    "momentum",
    [None, torch.float32, torch.bfloat16, torch.float16],
    ids=["momentum=param", "momentum=float32", "momentum=bfloat16", "momentum=float16"],
)
def test_every_mixture_of_dtypes(rule, param, grad, momentum):
    p = parameter(1037, dtype=param)
    opt = rule([p], momentum_dtype=momentum)
    run_verified(opt, [p], [lambda p: dense_grad(p, grad)])


SHAPES = {
    "empty": (0,),
    "empty-rows": (0, 5),
    "empty-columns": (5, 0),
    "scalar": (),
    "one": (1,),
    "one-by-one": (1, 1),
    "15": (15,),
    "16": (16,),
    "17": (17,),
    "odd-matrix": (31, 33),
    "block-513": (513,),
    "block-1024": (1024,),
    "task-32768": (32768,),
    "task-32769": (32769,),
    "several-tasks": (100_003,),
    "5d": (2, 3, 1, 4, 5),
}


@every_rule
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_shapes(rule, shape, dtype):
    p = parameter(*shape, dtype=dtype)
    run_verified(rule([p]), [p], [dense_grad])


@every_rule
def test_many_tensors_of_all_dtypes_and_sizes(rule):
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    sizes = [k % 37 for k in range(300)] + [40_000, 3, 70_001, 0, 32768]
    params = [parameter(n, dtype=dtypes[k % 4]) for k, n in enumerate(sizes)]
    run_verified(rule(params), params, [dense_grad] * len(params), steps=2)


@every_rule
@views("param", 4)
@views("grad", 4)
def test_memory_layouts(rule, param, grad):
    p = Parameter(param.make(torch.randn(3, 5, 7, 6)))
    run_verified(rule([p]), [p], [lambda p: grad.make(torch.randn(p.shape))], steps=2)


@every_rule
@views("param", 2)
def test_nothing_is_written_beside_a_view(rule, param):
    p = Parameter(param.make(torch.randn(9, 11)))
    storage = torch.as_strided(p.detach(), (p.untyped_storage().nbytes() // 4,), (1,), 0)
    mine = torch.zeros(storage.shape, dtype=torch.bool)
    torch.as_strided(mine, p.shape, p.stride(), p.storage_offset()).fill_(True)
    before = storage.clone()
    p.grad = torch.randn(9, 11)
    with verified(opt := rule([p])):
        opt.step()
    assert same_bits(storage[~mine], before[~mine])
    assert not bool((storage[mine] == before[mine]).any())


@every_rule
def test_layout_of_parameter_changes_between_steps(rule):
    p = Parameter(torch.randn(8, 3, 5, 7))
    opt = rule([p])
    p.grad = torch.randn(p.shape)
    opt.step()
    p.data = p.data.contiguous(memory_format=torch.channels_last)
    p.grad = torch.randn(p.shape)
    with verified(opt):
        opt.step()


@every_rule
@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.randn(1, 1).expand(13, 21),
        lambda: torch.randn(13, 1).expand(13, 21),
        lambda: torch.randn(21).expand(13, 21),
        lambda: torch.tensor(0.5).expand(13, 21),
    ],
    ids=["both", "columns", "rows", "scalar"],
)
def test_expanded_gradients(rule, make):
    p = parameter(13, 21)
    opt = rule([p])
    for _ in range(2):
        p.grad = make()
        with verified(opt):
            opt.step()


@every_rule
def test_negated_view_as_gradient(rule):
    p = parameter(13, 21)
    p.grad = torch._neg_view(torch.randn(13, 21))
    with verified(opt := rule([p])):
        opt.step()


def test_zero_tensor_as_gradient(run_python):
    # Forward-mode autograd's zeros have no memory at all. In a process of its own: it may crash.
    run_python("""
import torch
from cases import RULES, parameter
from oracle import same_bits

for rule in RULES:
    p = parameter(13, 21)
    q = torch.nn.Parameter(p.detach().clone())
    opt = rule([p, q])
    p.grad = torch.randn(13, 21)
    q.grad = p.grad.clone()
    opt.step()
    p.grad = torch._efficientzerotensor((13, 21))
    q.grad = torch.zeros(13, 21)
    opt.step()
    assert same_bits(p, q), rule.name
""")


@every_rule
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_maximize(rule, dtype):
    p = parameter(777, dtype=dtype)
    opt = rule([p], maximize=True)
    run_verified(opt, [p], [dense_grad])


@every_rule
def test_maximize_is_the_step_of_the_negated_gradient(rule):
    a = parameter(1000)
    b = Parameter(a.detach().clone())
    up, down = rule([a], maximize=True), rule([b])
    for _ in range(3):
        a.grad = torch.randn(1000)
        b.grad = -a.grad
        up.step()
        down.step()
        assert same_bits(a, b)
        for name, value in up.state[a].items():
            assert same_bits(value, down.state[b][name])


@every_rule
def test_expanded_parameter_is_refused(rule):
    p = torch.randn(4, 1).expand(4, 5).requires_grad_()
    opt = rule([p])
    p.grad = torch.ones(4, 5)
    before = p.detach().clone()
    with pytest.raises(RuntimeError, match=r"parameter.*\[4, 5\].*same memory"):
        opt.step()
    assert same_bits(p, before)


# ------------------------------------------------------------------------- what the rules promise


@pytest.mark.parametrize("rule", SIGN_RULES, ids=lambda r: r.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_zero_gradient_and_momentum_move_nothing_but_decay(rule, dtype):
    p = parameter(100, dtype=dtype)
    still = Parameter(p.detach().clone())
    opt = rule([{"params": [p]}, {"params": [still], "weight_decay": 0.0}])
    before = p.detach().clone()
    for zero in (0.0, -0.0):
        p.grad = torch.full_like(p, zero)
        still.grad = torch.full_like(p, zero)
        with verified(opt):
            opt.step()
    assert same_bits(still, before)
    assert not same_bits(p, before)


@every_rule
def test_zero_gradient_moves_nothing_without_decay(rule):
    p = parameter(1000)
    before = p.detach().clone()
    opt = rule([p], weight_decay=0.0)
    for _ in range(3):
        p.grad = torch.zeros(1000)
        opt.step()
    assert same_bits(p, before)
    for name, value in opt.state[p].items():
        assert name == "step" or not bool(value.any())


@every_rule
def test_lr_zero_moves_nothing(rule):
    p = parameter(1000)
    before = p.detach().clone()
    opt = rule([p], lr=0.0)
    p.grad = torch.randn(1000)
    with verified(opt):
        opt.step()
    assert same_bits(p, before)


def test_tiger_takes_the_sign_of_the_new_momentum():
    # Old momentum +1, gradient -3: Lion with beta1 = 0.99 still follows the old momentum.
    p, q = (Parameter(torch.zeros(4)) for _ in range(2))
    tiger = Tiger([p], lr=0.5, betas=(0.5,), weight_decay=0.0)
    lion = Lion([q], lr=0.5, betas=(0.99, 0.5), weight_decay=0.0)
    for x, opt in ((p, tiger), (q, lion)):
        x.grad = torch.full((4,), 2.0)
        opt.step()
        x.grad = torch.full((4,), -3.0)
        opt.step()
    assert p.tolist() == [0.0] * 4  # -0.5 + 0.5
    assert q.tolist() == [-1.0] * 4  # -0.5 - 0.5
    assert tiger.state[p]["exp_avg"].tolist() == [-1.0] * 4
    assert lion.state[q]["exp_avg"].tolist() == [-1.0] * 4


def test_direction_is_taken_before_the_momentum_is_rounded():
    # c = 1e-9 vanishes in float16, the step does not.
    p = Parameter(torch.zeros(8, dtype=torch.float16))
    opt = Tiger([p], lr=0.5, betas=(0.5,), weight_decay=0.0)
    set_grad(p, torch.full((8,), 2e-9))
    opt.step()
    assert p.tolist() == [-0.5] * 8
    assert opt.state[p]["exp_avg"].tolist() == [0.0] * 8


def test_decay_of_bfloat16_is_computed_in_float32():
    # 1 - lr wd rounds to 1 in bfloat16; 257 * 0.998 does not round to 256 or 258 by accident.
    p = Parameter(torch.full((16,), 256.0, dtype=torch.bfloat16))
    opt = Tiger([p], lr=1e-3, weight_decay=3.0)
    p.grad = torch.zeros_like(p)
    opt.step()
    assert p.tolist() == [255.0] * 16  # 255.232 in steps of 1


@pytest.mark.parametrize("rule", SIGN_RULES, ids=lambda r: r.name)
def test_momentum_that_shrank_to_subnormals_still_has_a_sign(rule):
    p = Parameter(torch.zeros(5))
    opt = rule([p], weight_decay=0.0)
    p.grad = torch.full((5,), -1e-44)
    opt.step()
    with verified(opt):
        opt.step()
    assert bool((p > 0).all())


def test_adamw_without_first_moment_stores_none():
    p = parameter(10)
    p.grad = torch.randn(10)
    opt = AdamW([p], betas=(0.0, 0.9))
    opt.step()
    assert sorted(opt.state[p]) == ["exp_avg_sq", "step"]


@floats("dtype")
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("maximize", [False, True], ids=["descend", "ascend"])
def test_adamw_equals_torch(dtype, weight_decay, maximize):
    start = torch.randn(501, dtype=torch.float64).to(dtype)
    ours, theirs = Parameter(start.clone()), Parameter(start.clone().to(torch.float64))
    options = dict(lr=0.01, betas=(0.85, 0.995), eps=1e-7, weight_decay=weight_decay)
    opt = AdamW([ours], maximize=maximize, momentum_dtype=None, **options)
    ref = torch.optim.AdamW([theirs], maximize=maximize, **options)
    for _ in range(20):
        ours.grad = dense_grad(ours)
        theirs.grad = ours.grad.to(torch.float64)
        opt.step()
        ref.step()
    if dtype in (torch.float32, torch.float64):
        tolerance = (
            dict(rtol=1e-5, atol=1e-6) if dtype == torch.float32 else dict(rtol=1e-13, atol=1e-14)
        )
        torch.testing.assert_close(ours.to(torch.float64), theirs, **tolerance)
        for name in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(
                opt.state[ours][name].to(torch.float64), ref.state[theirs][name], **tolerance
            )
    else:  # 20 roundings to nearest of values around 1
        ulp = torch.finfo(dtype).eps
        assert float((ours - theirs).detach().abs().max()) < 20 * 4 * ulp * 0.5
    assert int(opt.state[ours]["step"]) == 20


@pytest.mark.parametrize("t", [1, 2, 10, 1000, 2**24 + 1, 2**40])
@pytest.mark.parametrize("rule", RULES[2:], ids=lambda r: r.name)
def test_bias_correction_at_any_step(rule, t):
    p = parameter(100)
    opt = rule([p], betas=(rule.options["betas"][0], 0.9999))
    p.grad = torch.randn(100)
    opt.step()
    opt.state[p]["step"].fill_(t - 1)
    with verified(opt):
        opt.step()
    assert int(opt.state[p]["step"]) == t


# ---------------------------------------------------------------------------- rounding of storage


def float32_samples():
    """Return float32 numbers at and around every rounding boundary of the 16-bit types."""
    half = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    edges = []
    for dtype in (torch.float16, torch.bfloat16):
        x = half.view(dtype).to(torch.float32)
        x = x[x.isfinite()]
        up = torch.nextafter(x.to(dtype), torch.tensor(torch.inf, dtype=dtype)).to(torch.float32)
        middle = ((x.to(torch.float64) + up) / 2).to(torch.float32)
        for y in (x, middle):
            edges += [
                y,
                torch.nextafter(y, torch.tensor(torch.inf)),
                torch.nextafter(y, torch.tensor(-torch.inf)),
            ]
    samples = torch.cat(edges)
    return samples[samples.isfinite()]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_momentum_is_rounded_to_nearest_even(dtype):
    grad = float32_samples()
    p = Parameter(torch.zeros_like(grad))
    p.grad = grad
    opt = Lion([p], betas=(0.0, 0.0), momentum_dtype=dtype)
    opt.step()
    expected = (grad + 0.0).to(dtype)  # 0 m + g has no negative zero
    assert same_bits(opt.state[p]["exp_avg"], expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_parameter_is_rounded_to_nearest_even(dtype):
    # theta = 1 theta - lr sign: an lr of 3/8 of an ulp must not move, one of 5/8 must.
    ulp = torch.finfo(dtype).eps
    for eighths, moved in ((3, 0.0), (4, 0.0), (5, ulp)):
        p = Parameter(torch.ones(70, dtype=dtype))
        p.grad = -torch.ones(70, dtype=dtype)
        opt = Tiger([p], lr=ulp * eighths / 8, weight_decay=0.0)
        opt.step()
        assert p.tolist() == [1.0 + moved] * 70


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_number_of_a_type_is_read(dtype):
    grad = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    p = Parameter(torch.zeros(grad.shape))
    set_grad(p, grad)
    opt = Lion([p], betas=(0.0, 0.0))
    opt.step()
    expected = grad.to(torch.float32) + 0.0
    momentum = opt.state[p]["exp_avg"]
    assert torch.equal(momentum.isnan(), expected.isnan())
    number = ~expected.isnan()
    assert same_bits(momentum[number], expected[number])


# ------------------------------------------------------------------------------ NaN and infinity


@pytest.mark.parametrize("rule", SIGN_RULES, ids=lambda r: r.name)
@floats("dtype")
def test_nan_and_infinity_propagate(rule, dtype):
    p = Parameter(torch.ones(35, dtype=dtype))
    grad = torch.ones(35, dtype=dtype)
    grad[3], grad[17], grad[20] = torch.nan, torch.inf, -torch.inf
    p.grad = grad
    opt = rule([p])
    opt.step()
    m = opt.state[p]["exp_avg"]
    assert p.isnan().nonzero().tolist() == [[3]]
    assert m.isnan().nonzero().tolist() == [[3]]
    assert m[17] == torch.inf and m[20] == -torch.inf
    step = rule.options["lr"]
    rest = 1 - step * rule.options["weight_decay"]
    torch.testing.assert_close(p[17], torch.tensor(rest - step, dtype=dtype))
    torch.testing.assert_close(p[20], torch.tensor(rest + step, dtype=dtype))
    torch.testing.assert_close(p[0], p[17])


@pytest.mark.parametrize("rule", RULES[2:], ids=lambda r: r.name)
def test_nan_reaches_adamw(rule):
    p = Parameter(torch.ones(35))
    p.grad = torch.ones(35)
    p.grad[3] = torch.nan
    opt = rule([p])
    opt.step()
    assert p.isnan().nonzero().tolist() == [[3]]
    assert opt.state[p]["exp_avg_sq"].isnan().nonzero().tolist() == [[3]]


# -------------------------------------------------------------------------- against the reference


@every_rule
@floats("dtype")
def test_reference_agrees(rule, dtype):
    """``fused=False`` is held to the same bands, as its own optimizer."""
    p = parameter(513, dtype=dtype)
    opt = rule([p], fused=False)
    run_verified(opt, [p], [dense_grad])


@every_rule
def test_fused_true_equals_default(rule):
    a = parameter(5000)
    b = Parameter(a.detach().clone())
    first, second = rule([a], fused=True), rule([b])
    for _ in range(2):
        a.grad = torch.randn(5000)
        b.grad = a.grad.clone()
        first.step()
        second.step()
    assert same_bits(a, b)
