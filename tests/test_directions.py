# SPDX-License-Identifier: Apache-2.0
import math
import re

import pytest
import torch
from cases import VIEWS, dense_grad, parameter, sparse_grad, views
from oracle import arithmetic, same_bits, sum_rows
from published import (
    DIMS,
    PRECISIONS,
    SCALES,
    apply_direction,
    backends,
    every_direction,
    momentum_of,
    precisions,
    verified_window,
)
from torch import Tensor
from torch.nn import Parameter

from tiger_ext import AdamW, Lion, Tiger

RULES = {
    "tiger": (Tiger, dict(lr=0.02, betas=(0.9,), weight_decay=0.3)),
    "lion": (Lion, dict(lr=0.02, betas=(0.7, 0.95), weight_decay=0.3)),
}
every_rule = pytest.mark.parametrize("rule", RULES)
SMOOTH = ["clip", "power", "atan"]


def optimizer(rule: str, params, **options):
    cls, defaults = RULES[rule]
    return cls(params, **{**defaults, **options})


def sized(grad: Tensor, direction: str, kappa: float | None = None) -> Tensor:
    """Scale a gradient to where the direction bends: saturated and unsaturated elements occur."""
    kappa = SCALES[direction] if kappa is None else kappa
    return grad * (3.0 / kappa if direction in ("clip", "atan") else 1.0)


# ----------------------------------------------------------------------------------------- values


@backends
@every_rule
@every_direction
@pytest.mark.parametrize("kappa", [None, 0.3, 7.0])
@precisions
def test_values(rule, direction, kappa, dtype, fused):
    params = [parameter(37, 19, dtype=dtype), parameter(41, 9, dtype=dtype)]
    opt = optimizer(rule, params, direction=direction, direction_scale=kappa, fused=fused)
    for _ in range(3):
        grads = [dense_grad(params[0]), sparse_grad(params[1], 60)]
        verified_window(opt, params, [sized(g, direction, kappa) for g in grads])


@backends
@every_rule
@pytest.mark.parametrize("direction", SMOOTH)
@pytest.mark.parametrize(
    "shape", [(), (0,), (0, 4), (4, 0), (1,), (15,), (16,), (17,), (1037,), (40_001,)]
)
def test_shapes(rule, direction, shape, fused):
    p = parameter(*shape)
    opt = optimizer(rule, [p], direction=direction, fused=fused)
    for _ in range(2):
        verified_window(opt, [p], [sized(dense_grad(p), direction)])


@backends
@pytest.mark.parametrize("direction", SMOOTH)
@pytest.mark.parametrize("dim", DIMS)
def test_row_lengths(direction, dim, fused):
    p = parameter(23, dim)
    opt = optimizer("tiger", [p], direction=direction, fused=fused)
    counts = torch.tensor([*range(10)] * 2 + [11] * 300 + [4, 5, 4])
    for _ in range(2):
        grad = torch.sparse_coo_tensor(counts[None], torch.randn(len(counts), dim), p.shape)
        verified_window(opt, [p], [sized(grad, direction)])


@backends
@pytest.mark.parametrize("direction", SMOOTH)
@pytest.mark.parametrize("sparse_dim", [1, 2, 3])
def test_sparse_dims(direction, sparse_dim, fused):
    p = parameter(6, 5, 4)
    opt = optimizer("lion", [p], direction=direction, fused=fused)
    for _ in range(2):
        grad = sparse_grad(p, 25, sparse_dim=sparse_dim)
        verified_window(opt, [p], [sized(grad, direction)])


@backends
@pytest.mark.parametrize("direction", SMOOTH)
@views("param", 2)
@pytest.mark.parametrize("layout", ["strided", "sparse"])
def test_memory_layouts(direction, param, layout, fused):
    p = Parameter(param.make(torch.randn(9, 11)))
    storage = torch.as_strided(p.detach(), (p.untyped_storage().nbytes() // 4,), (1,), 0)
    mine = torch.zeros(storage.shape, dtype=torch.bool)
    torch.as_strided(mine, p.shape, p.stride(), p.storage_offset()).fill_(True)
    before = storage.clone()
    opt = optimizer("tiger", [p], direction=direction, fused=fused)
    for view in [v for v in VIEWS if v.dims <= 2]:
        grad = view.make(torch.randn(9, 11)) if layout == "strided" else sparse_grad(p, 12)
        verified_window(opt, [p], [sized(grad, direction)])
    assert same_bits(storage[~mine], before[~mine])


@backends
@pytest.mark.parametrize("grad_dtype", PRECISIONS.values(), ids=PRECISIONS)
@pytest.mark.parametrize("momentum", [None, torch.float32, torch.bfloat16, torch.float16])
def test_mixtures_of_dtypes(grad_dtype, momentum, fused):
    params = [parameter(301, dtype=d) for d in PRECISIONS.values()]
    params += [parameter(30, 7, dtype=d) for d in PRECISIONS.values()]
    opt = optimizer("tiger", params, direction="power", momentum_dtype=momentum, fused=fused)
    for _ in range(2):
        grads = [dense_grad(p, grad_dtype) for p in params[:3]]
        grads += [sparse_grad(p, 40, dtype=grad_dtype) for p in params[3:]]
        verified_window(opt, params, grads)


@backends
def test_many_parameters_and_directions_in_one_step(fused):
    groups, params = [], []
    for k, direction in enumerate(SCALES):
        own = [parameter(n, dtype=[torch.float32, torch.bfloat16][n % 2]) for n in range(1, 40)]
        own += [parameter(20, 5), parameter(40_000)]
        algorithm = "lion" if k % 2 else "tiger"
        betas = (0.8, 0.97) if k % 2 else (0.95,)
        groups.append(
            dict(params=own, direction=direction, algorithm=algorithm, betas=betas, lr=0.01 + k)
        )
        params += own
    opt = Tiger(groups, weight_decay=0.1, fused=fused)
    for _ in range(2):
        grads = [sparse_grad(p, 9) if p.dim() == 2 else dense_grad(p) for p in params]
        verified_window(opt, params, [1e-3 * g for g in grads])


@backends
@every_rule
def test_the_default_scales_are_the_documented_ones(rule, fused):
    for direction, kappa in (("clip", 1e4), ("power", 0.5), ("atan", 1e4)):
        a = parameter(200)
        b = Parameter(a.detach().clone())
        grad = sized(dense_grad(a), direction)
        for p, options in ((a, {}), (b, {"direction_scale": kappa})):
            opt = optimizer(rule, [p], direction=direction, fused=fused, **options)
            p.grad = grad
            opt.step()
        assert same_bits(a, b)


# ------------------------------------------------------------------------ one direction's own shape


def direction_of(values: Tensor, direction: str, kappa: float | None, fused, layout: str):
    """Return d(values), seen through a step that adds nothing to it."""
    shape = (len(values), 1) if layout == "short rows" else (1, len(values))
    p = Parameter(torch.zeros(shape, dtype=values.dtype))
    opt = Tiger(
        [p],
        lr=1.0,
        betas=(0.0,),
        weight_decay=0.0,
        direction=direction,
        direction_scale=kappa,
        fused=fused,
    )
    p.grad = -values.view(shape)
    if layout != "strided":
        p.grad = torch.sparse_coo_tensor(torch.arange(len(p))[None], p.grad, shape)
    opt.step()
    return p.detach().view(-1)


EXTREMES = [1e-45, 3e-42, 1e-38, 1e-30, 1e-20, 1e-10, 1e-4, 0.3, 1.0, 17.0, 1e10, 1e30, 3.3e38]


@backends
@pytest.mark.parametrize("direction", SMOOTH)
@pytest.mark.parametrize("kappa", [None, 0.1, 1.0, 2.0])
@pytest.mark.parametrize("layout", ["strided", "short rows", "long row"])
def test_extreme_values(direction, kappa, layout, fused):
    values = torch.tensor(EXTREMES * 3)
    d = direction_of(values, direction, kappa, fused, layout)
    expected = apply_direction(values.double(), direction, kappa).float()
    torch.testing.assert_close(d, expected, rtol=2e-6, atol=3e-45)
    minus = direction_of(-values, direction, kappa, fused, layout)
    assert torch.equal(d, -minus)  # odd
    increasing = d[: len(EXTREMES)]
    assert bool((increasing[1:] >= increasing[:-1]).all())
    if direction != "power":
        assert bool((d <= 1).all())


@backends
@every_rule
@every_direction
@pytest.mark.parametrize("layout", ["strided", "short rows", "long row"])
def test_zero_infinite_and_nan(rule, direction, layout, fused):
    values = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan] * 15)
    values = values.view((75, 1) if layout == "short rows" else (1, 75))
    p = Parameter(torch.full_like(values, 2.0))
    p.grad = values.clone()
    if layout != "strided":
        p.grad = torch.sparse_coo_tensor(torch.arange(len(p))[None], values, p.shape)
    optimizer(rule, [p], direction=direction, fused=fused).step()
    decayed = 2.0 * (1 - 0.02 * 0.3)
    step = math.inf if direction == "power" else 0.02
    expected = [decayed, decayed, decayed - step, decayed + step, math.nan] * 15
    torch.testing.assert_close(
        p.detach().view(-1), torch.tensor(expected), equal_nan=True, rtol=1e-6, atol=0
    )


@backends
@every_rule
def test_steep_directions_are_the_sign(rule, fused):
    kappas = {"clip": 1e30, "atan": 1e30, "power": 1e-30}
    start = torch.randn(500)
    grads = [torch.randn(500) for _ in range(3)]
    results = {}
    for direction in SCALES:
        p = Parameter(start.clone())
        opt = optimizer(
            rule, [p], direction=direction, direction_scale=kappas.get(direction), fused=fused
        )
        for g in grads:
            p.grad = g
            opt.step()
        results[direction] = p.detach()
    assert same_bits(results["clip"], results["sign"])
    for direction in ("atan", "power"):
        torch.testing.assert_close(results[direction], results["sign"], rtol=1e-6, atol=1e-7)


@backends
@every_rule
def test_power_one_is_momentum_itself(rule, fused):
    p = parameter(300, dtype=torch.float64)
    start = p.detach().clone()
    grad = torch.randn(300, dtype=torch.float64)
    p.grad = grad
    opt = optimizer(rule, [p], direction="power", direction_scale=1.0, fused=fused)
    opt.step()
    expected = start * (1 - 0.02 * 0.3) - 0.02 * grad * (0.1 if rule == "tiger" else 0.3)
    torch.testing.assert_close(p.detach(), expected, rtol=1e-13, atol=1e-15)


@backends
@every_direction
def test_the_momentum_does_not_depend_on_the_direction(direction, fused):
    for rule in RULES:
        a = parameter(123)
        b = Parameter(a.detach().clone())
        first = optimizer(rule, [a], direction=direction, fused=fused)
        second = optimizer(rule, [b], fused=fused)
        for _ in range(3):
            a.grad = b.grad = torch.randn(123)
            first.step()
            second.step()
        assert same_bits(first.state[a]["exp_avg"], second.state[b]["exp_avg"])


# ------------------------------------------------------------------------- exact bits of the clip


def clip_step(p, g, m, *, lr, betas, weight_decay, kappa):
    """Take one step in single IEEE operations of the arithmetic type."""
    wide = arithmetic(p.dtype)

    def constant(x: float) -> Tensor:
        return torch.tensor(x, dtype=torch.float64).to(wide)

    def mix(beta: float) -> Tensor:
        kept = constant(beta) * m.to(wide)
        return kept + constant(1.0 - beta) * g.to(wide)

    d = torch.clamp(constant(kappa) * mix(betas[0]), -1.0, 1.0)
    new = constant(1.0 - lr * weight_decay) * p.to(wide) - constant(lr) * d
    return new.to(p.dtype), mix(betas[-1]).to(m.dtype)


@every_rule
@pytest.mark.parametrize("kappa", [None, 0.37, 3.0])
@precisions
@pytest.mark.parametrize("momentum", [None, torch.float32])
def test_clip_gives_exact_bits_on_dense_gradients(rule, kappa, dtype, momentum):
    sizes = [*range(1, 70), 255, 256, 257, 1037, 40_001]
    params = [parameter(n, dtype=dtype) for n in sizes]
    cls, hyper = RULES[rule]
    opt = cls(params, **hyper, direction="clip", direction_scale=kappa, momentum_dtype=momentum)
    for _ in range(3):
        expected = []
        for p in params:
            p.grad = sized(dense_grad(p), "clip", kappa)
            expected.append(
                clip_step(p.detach(), p.grad, momentum_of(opt, p), kappa=kappa or 1e4, **hyper)
            )
        opt.step()
        for p, (theta, m) in zip(params, expected):
            assert same_bits(p.detach(), theta), p.shape
            assert same_bits(opt.state[p]["exp_avg"], m), p.shape


@every_rule
@pytest.mark.parametrize("dim", DIMS)
@precisions
def test_clip_gives_exact_bits_on_rows(rule, dim, dtype):
    p = parameter(50, dim, dtype=dtype)
    cls, hyper = RULES[rule]
    opt = cls([p], **hyper, direction="clip")
    ids = torch.tensor([3] * 300 + [4, 9, 4, 0, 49, 9] + list(range(20, 30)))
    for _ in range(2):
        values = (torch.randn(len(ids), dim) * 1e-4).to(dtype)
        rows, sums = sum_rows(ids.numpy(), values.to(arithmetic(dtype)).numpy())
        rows, sums = torch.from_numpy(rows), torch.from_numpy(sums)
        theta, m = p.detach().clone(), momentum_of(opt, p)
        theta[rows], m[rows] = clip_step(theta[rows], sums, m[rows], kappa=1e4, **hyper)
        p.grad = torch.sparse_coo_tensor(ids[None], values, p.shape)
        opt.step()
        assert same_bits(p.detach(), theta)
        assert same_bits(opt.state[p]["exp_avg"], m)


# ------------------------------------------------------------------------------- the rest of a step


def run(p, grads, **options):
    opt = Tiger([p], weight_decay=0.3, betas=(0.9,), **{"lr": 0.02, **options})
    for g in grads:
        p.grad = g
        opt.step()
    return p.detach(), opt.state[p]["exp_avg"]


@backends
@every_direction
@pytest.mark.parametrize("layout", ["strided", "sparse"])
def test_tensor_lr_and_maximize(direction, layout, fused):
    start = torch.randn(40, 6)
    template = Parameter(start)
    grads = [
        dense_grad(template) if layout == "strided" else sparse_grad(template, 30) for _ in range(3)
    ]
    lr = torch.tensor(0.02)
    plain = dict(direction=direction, fused=fused, lr=float(lr))
    expected = run(Parameter(start.clone()), grads, **plain)
    for changed, factor in (({"lr": lr}, 1.0), ({"maximize": True}, -1.0)):
        result = run(Parameter(start.clone()), [g * factor for g in grads], **{**plain, **changed})
        assert same_bits(result[0], expected[0]) and same_bits(result[1], expected[1])


@pytest.mark.parametrize("direction", SMOOTH)
def test_the_number_of_threads_changes_nothing(direction):
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        torch.manual_seed(3)
        p, q = parameter(70_001), parameter(5000, 33)
        opt = Tiger([p, q], direction=direction)
        for _ in range(2):
            p.grad, q.grad = dense_grad(p), sparse_grad(q, 9000)
            opt.step()
        results.append((p.detach(), q.detach()))
    assert same_bits(results[0][0], results[1][0]) and same_bits(results[0][1], results[1][1])


@every_rule
@pytest.mark.parametrize("direction", SMOOTH)
@precisions
def test_native_kernels_exist(rule, direction, dtype):
    params = [parameter(100, 3, dtype=dtype), parameter(100, 3, dtype=dtype)]
    opt = optimizer(rule, params, direction=direction, fused=True)
    verified_window(opt, params, [dense_grad(params[0]), sparse_grad(params[1], 70)])


@every_rule
@pytest.mark.parametrize("direction", SMOOTH)
@precisions
def test_native_kernels_agree_with_the_reference(rule, direction, dtype):
    start = torch.randn(60, 21, dtype=torch.float64).to(dtype)
    grads = []
    for k in range(10):
        p = Parameter(start)
        grads.append(sized(sparse_grad(p, 90) if k % 2 else dense_grad(p), direction))
    results = []
    for fused in (None, False):
        p = Parameter(start.clone())
        opt = optimizer(rule, [p], direction=direction, fused=fused)
        for g in grads:
            p.grad = g
            opt.step()
        results.append((p.detach(), opt.state[p]["exp_avg"]))
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.02}[dtype]
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@backends
@pytest.mark.parametrize("layout", ["strided", "sparse"])
def test_amp_scale(layout, fused):
    start = torch.randn(20, 7)
    p, q = Parameter(start.clone()), Parameter(start.clone())
    grad = sized(dense_grad(p) if layout == "strided" else sparse_grad(p, 30), "clip")
    options = dict(direction="clip", weight_decay=0.1, fused=fused)
    first, second = Tiger([p], **options), Tiger([q], **options)
    p.grad, q.grad = grad, grad * 1024.0
    first.step()
    second.grad_scale, second.found_inf = torch.tensor(1024.0), torch.tensor(0.0)
    second.step()
    torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8)


@backends
def test_direction_survives_a_state_dict(fused):
    p = parameter(30)
    opt = Tiger([p], direction="atan", direction_scale=5.0, fused=fused)
    q = Parameter(p.detach().clone())
    other = Tiger([q], fused=fused)
    p.grad = torch.randn(30)
    opt.step()
    q.data.copy_(p.data)
    other.load_state_dict(opt.state_dict())
    p.grad = q.grad = torch.randn(30)
    opt.step()
    other.step()
    assert same_bits(p, q)


# ----------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("cls", [Tiger, Lion])
@pytest.mark.parametrize("value", ["up", "Sign", "", None, 1, True, ["clip"]])
@pytest.mark.parametrize("where", ["constructor", "group"])
def test_unknown_directions_are_refused(cls, value, where):
    match = rf"(?s)direction={re.escape(repr(value))}.*sign.*clip.*power.*atan"
    with pytest.raises(ValueError, match=match):
        if where == "constructor":
            cls([parameter(3)], direction=value)
        else:
            cls([{"params": [parameter(3)], "direction": value}])


@pytest.mark.parametrize("cls", [Tiger, Lion])
@pytest.mark.parametrize("value", [0, 0.0, -1.0, math.inf, math.nan, "1", True])
def test_bad_direction_scales_are_refused(cls, value):
    match = rf"(?s)direction_scale={re.escape(repr(value))}.*> ?0"
    with pytest.raises(ValueError, match=match):
        cls([parameter(3)], direction="clip", direction_scale=value)


def test_adamw_has_no_direction():
    with pytest.raises(TypeError, match="direction"):
        AdamW([parameter(3)], direction="clip")
    with pytest.raises(TypeError, match=r"adamw.*direction"):
        Tiger([{"params": [parameter(3)], "algorithm": "adamw", "direction": "clip"}])
