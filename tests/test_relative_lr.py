# SPDX-License-Identifier: Apache-2.0
import math
import re

import pytest
import torch
from cases import VIEWS, dense_grad, parameter, sparse_grad, views
from oracle import same_bits
from published import (
    DIMS,
    SCALES,
    Options,
    backends,
    every_direction,
    momentum_of,
    precisions,
    verified_window,
    window,
)
from torch import nn
from torch.nn import Parameter

import tiger_ext
from tiger_ext import AdamW, Lion, Tiger

HYPER = dict(lr=0.05, betas=(0.9,), weight_decay=0.3)
SCALINGS = ["rms", "rms_rows"]
every_scale = pytest.mark.parametrize("scale", SCALINGS)


def sized(grad, direction):
    return grad * (3.0 / SCALES[direction] if direction in ("clip", "atan") else 1.0)


# ----------------------------------------------------------------------------------------- values


@backends
@every_scale
@every_direction
@pytest.mark.parametrize("rule", ["tiger", "lion"])
@precisions
def test_values(scale, direction, rule, dtype, fused):
    params = [
        parameter(37, 19, dtype=dtype),
        parameter(41, 9, dtype=dtype),
        parameter(23, dtype=dtype),
        parameter(4, 3, 5, dtype=dtype),
    ]
    options = dict(scale=scale, direction=direction, fused=fused)
    if rule == "tiger":
        opt = Tiger(params, **HYPER, **options)
    else:
        opt = Lion(params, lr=0.05, betas=(0.7, 0.95), weight_decay=0.3, **options)
    for _ in range(3):
        grads = [dense_grad(p) for p in params]
        grads[1] = sparse_grad(params[1], 60)
        verified_window(opt, params, [sized(g, direction) for g in grads])


@backends
@every_scale
@pytest.mark.parametrize("direction", ["sign", "power"])
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("rows", [1, 6])
def test_dense_row_lengths(scale, direction, dim, rows, fused):
    p = Parameter(torch.randn(rows, dim) * torch.logspace(-2, 2, rows)[:, None])
    opt = Tiger([p], **HYPER, scale=scale, direction=direction, fused=fused)
    for _ in range(2):
        verified_window(opt, [p], [dense_grad(p)])


@backends
@every_scale
@pytest.mark.parametrize("direction", ["sign", "clip"])
@pytest.mark.parametrize("dim", DIMS)
def test_sparse_row_lengths(scale, direction, dim, fused):
    p = Parameter(torch.randn(23, dim) * torch.logspace(-2, 2, 23)[:, None])
    opt = Tiger([p], **HYPER, scale=scale, direction=direction, fused=fused)
    counts = torch.tensor([*range(10)] * 2 + [11] * 300 + [4, 5, 4])
    for _ in range(2):
        grad = torch.sparse_coo_tensor(counts[None], torch.randn(len(counts), dim), p.shape)
        verified_window(opt, [p], [sized(grad, direction)])


@backends
@every_scale
@every_direction
@pytest.mark.parametrize("rows,dim", [(5000, 1), (700, 257), (3, 40_001)])
def test_large_parameters(scale, direction, rows, dim, fused):
    params = [parameter(rows, dim), parameter(rows, dim)]
    opt = Tiger(params, **HYPER, scale=scale, direction=direction, fused=fused)
    for _ in range(2):
        grads = [dense_grad(params[0]), sparse_grad(params[1], min(rows, 500))]
        verified_window(opt, params, [sized(g, direction) for g in grads])


@backends
@every_scale
@pytest.mark.parametrize("shape", [(), (0,), (0, 4), (4, 0), (1,), (17,), (2, 3, 1, 4)])
def test_shapes(scale, shape, fused):
    for direction in ("sign", "atan"):
        p = parameter(*shape)
        opt = Tiger([p], **HYPER, scale=scale, direction=direction, fused=fused)
        verified_window(opt, [p], [sized(dense_grad(p), direction)])


@backends
@every_scale
@pytest.mark.parametrize("sparse_dim", [1, 2, 3])
def test_sparse_dims(scale, sparse_dim, fused):
    p = parameter(6, 5, 4)
    opt = Tiger([p], **HYPER, scale=scale, direction="power", fused=fused)
    for _ in range(2):
        verified_window(opt, [p], [sparse_grad(p, 25, sparse_dim=sparse_dim)])


@backends
@every_scale
@pytest.mark.parametrize("direction", ["sign", "power"])
@views("param", 3)
@pytest.mark.parametrize("layout", ["strided", "sparse"])
def test_memory_layouts(scale, direction, param, layout, fused):
    p = Parameter(param.make(torch.randn(9, 11, 3)))
    opt = Tiger([p], **HYPER, scale=scale, direction=direction, fused=fused)
    for view in [v for v in VIEWS if v.dims <= 3]:
        grad = view.make(torch.randn(9, 11, 3)) if layout == "strided" else sparse_grad(p, 12)
        verified_window(opt, [p], [grad])


@backends
@every_scale
def test_many_parameters_in_one_step(scale, fused):
    dtypes = (torch.float32, torch.float64, torch.bfloat16)
    params = [parameter(k % 11 + 1, k % 37 + 1, dtype=dtypes[k % 3]) for k in range(200)]
    params += [parameter(40_000), parameter(300, 200), parameter(3), parameter()]
    half = len(params) // 2
    groups = [
        {"params": params[:half], "direction": "clip", "lr": 0.3},
        {"params": params[half:], "weight_decay": 0.1, "rms_floor": 2.0},
    ]
    opt = Tiger(groups, **HYPER, scale=scale, fused=fused)
    for _ in range(2):
        grads = [
            1e-4 * (sparse_grad(p, 4) if k % 3 == 0 and p.dim() == 2 else dense_grad(p))
            for k, p in enumerate(params)
        ]
        grads[7] = None
        verified_window(opt, params, grads)


# -------------------------------------------------------------------------- what counts as what


def one_step(theta, grad, *, fused=None, cls=Tiger, **options):
    p = Parameter(theta.clone())
    p.grad = grad
    cls([p], **{**dict(lr=0.5, betas=(0.0,), weight_decay=0.0), **options, "fused": fused}).step()
    return p.detach()


@backends
def test_tensor_wide_or_per_row(fused):
    theta = torch.tensor([[3.0, 4.0, 0.0, 0.0], [30.0, 40.0, 0.0, 0.0]])  # RMS 2.5 and 25
    whole = math.sqrt((2.5**2 + 25.0**2) / 2)
    grad = torch.ones(2, 4)
    sparse = torch.sparse_coo_tensor([[0, 1]], grad, (2, 4))
    per_row = theta - 0.5 * torch.tensor([[2.5], [25.0]])
    for scale, g, rows, expected in [
        ("rms", grad, None, theta - 0.5 * whole),
        ("rms", sparse, None, per_row),
        ("rms", grad, "nonzero", per_row),
        ("rms_rows", grad, None, per_row),
        ("rms_rows", sparse, None, per_row),
        ("rms_rows", grad, "nonzero", per_row),
    ]:
        result = one_step(theta, g, scale=scale, rows=rows, fused=fused)
        torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-6)


@backends
def test_rows_of_one_dimensional_parameters(fused):
    theta, grad = torch.tensor([1.0, -7.0, 0.0]), torch.tensor([1.0, 1.0, -1.0])
    whole = math.sqrt(50 / 3)
    for scale, rows, rms in [
        ("rms", None, torch.full((3,), whole)),
        ("rms", "nonzero", torch.full((3,), whole)),  # rows are of tables only
        ("rms_rows", None, torch.tensor([1.0, 7.0, 0.001])),
    ]:
        result = one_step(theta, grad, scale=scale, rows=rows, fused=fused)
        torch.testing.assert_close(result, theta - 0.5 * rms * grad, rtol=1e-6, atol=1e-6)
    result = one_step(theta, grad.to_sparse(), scale="rms", fused=fused)
    expected = theta - 0.5 * torch.tensor([1.0, 7.0, 0.001]) * grad
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-6)


@backends
@every_scale
def test_the_rms_of_a_sign_is_one_even_with_zeros(scale, fused):
    theta, grad = torch.full((4, 4), 2.0), torch.zeros(4, 4)
    grad[:, 0] = 1.0
    result = one_step(theta, grad, scale=scale, fused=fused)
    torch.testing.assert_close(result, theta - 0.5 * 2.0 * grad)


@backends
@every_scale
@every_direction
@pytest.mark.parametrize("layout", ["strided", "sparse"])
def test_a_zero_direction_only_decays(scale, direction, layout, fused):
    theta, grad = torch.full((4, 4), 2.0), torch.zeros(4, 4)
    if layout == "sparse":
        grad = torch.sparse_coo_tensor([[0, 1, 2, 3]], grad, (4, 4))
    result = one_step(theta, grad, scale=scale, direction=direction, weight_decay=0.25, fused=fused)
    torch.testing.assert_close(result, theta * (1 - 0.5 * 2.0 * 0.25))


@backends
@pytest.mark.parametrize("direction", ["clip", "power", "atan"])
def test_zero_direction_of_some_rows(direction, fused):
    p = parameter(6, 10)
    opt = Tiger([p], **HYPER, scale="rms_rows", direction=direction, fused=fused)
    for _ in range(2):
        grad = sized(dense_grad(p), direction)
        grad[::2] = 0
        verified_window(opt, [p], [grad])
    assert bool(p.isfinite().all())


@backends
@every_scale
def test_the_floor(scale, fused):
    grad = torch.ones(3, 4)
    for floor in (1e-3, 0.25):
        zeros = one_step(torch.zeros(3, 4), grad, scale=scale, rms_floor=floor, fused=fused)
        torch.testing.assert_close(zeros, -0.5 * floor * grad)
        small = torch.full((3, 4), floor / 10)
        result = one_step(small, grad, scale=scale, rms_floor=floor, fused=fused)
        torch.testing.assert_close(result, small - 0.5 * floor * grad)
        large = torch.full((3, 4), floor * 10)
        result = one_step(large, grad, scale=scale, rms_floor=floor, fused=fused)
        torch.testing.assert_close(result, large - 0.5 * 10 * floor * grad)
    result = one_step(torch.zeros(3, 4), grad, scale=scale, rms_floor=0, fused=fused)
    assert not bool(result.any())
    default = one_step(torch.zeros(3, 4), grad, scale=scale, fused=fused)
    torch.testing.assert_close(default, -0.5e-3 * grad)


@backends
def test_the_floor_of_each_row(fused):
    theta = torch.tensor([[0.0, 0.0], [3.0, 4.0], [1e-9, 0.0]])
    for grad in (torch.ones(3, 2), torch.sparse_coo_tensor([[0, 1, 2]], torch.ones(3, 2))):
        result = one_step(theta, grad, scale="rms_rows", rms_floor=0.1, fused=fused)
        rms = torch.tensor([0.1, math.sqrt(12.5), 0.1])[:, None]
        torch.testing.assert_close(result, theta - 0.5 * rms)


@backends
@every_scale
@pytest.mark.parametrize("layout", ["strided", "sparse"])
@pytest.mark.parametrize("size", [1e-24, 1e25])
def test_squares_outside_the_range_of_float32(scale, layout, size, fused):
    theta = torch.full((3, 4), size)
    grad = torch.full((3, 4), 1e-3 * size)
    if layout == "sparse":
        grad = torch.sparse_coo_tensor([[0, 1, 2]], grad, (3, 4))
    for direction, kappa in (("sign", None), ("power", 1.0)):
        result = one_step(
            theta,
            grad,
            scale=scale,
            direction=direction,
            direction_scale=kappa,
            rms_floor=0,
            fused=fused,
        )
        torch.testing.assert_close(result / size, torch.full((3, 4), 0.5))


@backends
@every_scale
def test_a_row_does_not_see_the_others(scale, fused):
    ids = torch.tensor([[5, 2, 5, 9]])
    values = torch.randn(4, 33)
    results = []
    for other in (1.0, 1e20):
        torch.manual_seed(1)
        p = Parameter(torch.randn(12, 33))
        p.data[[0, 9, 11]] *= other
        v = values.clone()
        v[3] *= other
        opt = Tiger([p], **HYPER, scale=scale, direction="power", fused=fused)
        p.grad = torch.sparse_coo_tensor(ids, v, p.shape)
        opt.step()
        results.append(p.detach()[[2, 5]])
    assert same_bits(*results)


@backends
@every_scale
@pytest.mark.parametrize("layout", ["strided", "sparse"])
def test_tensor_lr_and_maximize(scale, layout, fused):
    start = torch.randn(40, 6)
    template = Parameter(start)
    make = dense_grad if layout == "strided" else (lambda p: sparse_grad(p, 30))
    grads = [make(template) for _ in range(3)]
    lr = torch.tensor(0.02)
    results = []
    for options, factor in (
        ({"lr": float(lr)}, 1.0),
        ({"lr": lr}, 1.0),
        ({"lr": lr, "maximize": True}, -1.0),
    ):
        p = Parameter(start.clone())
        opt = Tiger([p], scale=scale, direction="power", fused=fused, **options)
        for g in grads:
            p.grad = g * factor
            opt.step()
        results.append(p.detach())
    assert same_bits(results[0], results[1]) and same_bits(results[0], results[2])


@backends
@every_scale
def test_a_changed_lr_counts(scale, fused):
    p = parameter(20, 6)
    lr = torch.tensor(0.1)
    opt = Tiger([p], lr=lr, scale=scale, fused=fused)
    for value in (0.1, 0.02, 0.0, 0.3):
        lr.fill_(value)
        verified_window(opt, [p], [dense_grad(p)])


@every_scale
@every_direction
def test_the_number_of_threads_changes_nothing(scale, direction):
    results = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        torch.manual_seed(3)
        params = [parameter(70_001), parameter(5000, 33), parameter(999, 41)]
        opt = Tiger(params, scale=scale, direction=direction)
        for _ in range(2):
            for p in params:
                p.grad = sparse_grad(p, 900) if len(p) == 5000 else dense_grad(p)
            opt.step()
        results.append([p.detach() for p in params])
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], other))


@every_scale
@every_direction
@precisions
def test_native_kernels_exist(scale, direction, dtype):
    params = [parameter(100, 3, dtype=dtype), parameter(100, 3, dtype=dtype)]
    opt = Tiger(params, **HYPER, scale=scale, direction=direction, fused=True)
    verified_window(opt, params, [dense_grad(params[0]), sparse_grad(params[1], 70)])


@every_scale
@every_direction
@precisions
def test_native_kernels_agree_with_the_reference(scale, direction, dtype):
    start = torch.randn(60, 21, dtype=torch.float64).to(dtype)
    grads = []
    for k in range(10):
        p = Parameter(start)
        grads.append(sized(sparse_grad(p, 90) if k % 2 else dense_grad(p), direction))
    results = []
    for fused in (None, False):
        p = Parameter(start.clone())
        opt = Tiger([p], **HYPER, scale=scale, direction=direction, fused=fused)
        for g in grads:
            p.grad = g
            opt.step()
        results.append((p.detach(), opt.state[p]["exp_avg"]))
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.02}[dtype]
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# ----------------------------------------------------------------------------------- param_groups


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)
        self.norm = nn.LayerNorm(8)
        self.rms = nn.RMSNorm(8)
        self.out = nn.Linear(8, 8)
        self.bias_net = nn.Linear(8, 3, bias=False)  # only the last component counts
        self.relative_bias_table = Parameter(torch.randn(5, 2))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(20, 8)
        self.bags = nn.EmbeddingBag(15, 4, sparse=True)
        self.tied = nn.Embedding(10, 8)
        self.head = nn.Linear(8, 10)
        self.head.weight = self.tied.weight
        self.blocks = nn.ModuleList([Block()])
        self.conv = nn.Conv1d(3, 4, 3)
        self.batch_norm = nn.BatchNorm1d(4)
        self.group_norm = nn.GroupNorm(2, 4)
        self.instance_norm = nn.InstanceNorm1d(4, affine=True)
        self.scale = Parameter(torch.tensor(1.5))


def kind_of(name: str) -> str:
    if name in ("tokens.weight", "bags.weight"):
        return "embedding"
    if "norm" in name or ".rms." in name or "bias" in name.split(".")[-1]:
        return "gain" if name.endswith("weight") else "bias"
    return "other"


KINDS = {
    "embedding": dict(lr=0.25, weight_decay=0.5, scale="rms_rows"),
    "other": dict(lr=0.25, weight_decay=0.5, scale="rms"),
    "bias": dict(lr=0.125, weight_decay=0.0, scale=None),
    "gain": dict(lr=0.125, weight_decay=0.0, scale=None, shrink_to=1.0),
}


def names_and_groups(model, opt):
    group_of = {p: g for g in opt.param_groups for p in g["params"]}
    assert sum(len(g["params"]) for g in opt.param_groups) == len(group_of)
    found = {name: group_of[p] for name, p in model.named_parameters()}
    assert len(found) == len(group_of)
    return found


@pytest.mark.parametrize("cls", [Tiger, Lion])
def test_param_groups(cls):
    model = Model()
    groups = tiger_ext.param_groups(model, lr=0.25, weight_decay=0.5, nonfinite="shrink")
    for name, group in names_and_groups(model, cls(groups)).items():
        for key, value in KINDS[kind_of(name)].items():
            assert group[key] == value, (name, key)
        if kind_of(name) != "gain":
            assert group.get("shrink_to", 0.0) == 0.0, name
        assert group["nonfinite"] == "shrink"
        assert group["algorithm"] == cls._algorithm


def test_param_groups_has_the_defaults_of_tiger():
    model = Model()
    found = names_and_groups(model, Tiger(tiger_ext.param_groups(model)))
    assert found["tokens.weight"]["lr"] == found["conv.weight"]["lr"] == 1e-3
    assert found["tokens.weight"]["weight_decay"] == found["conv.weight"]["weight_decay"] == 0.01
    assert found["conv.bias"]["lr"] == 0.5e-3 and found["conv.bias"]["weight_decay"] == 0
    assert found["conv.weight"]["rms_floor"] == 1e-3


def test_param_groups_with_a_tensor_lr():
    model = Model()
    groups = tiger_ext.param_groups(model, lr=torch.tensor(0.25), weight_decay=0.5)
    for name, group in names_and_groups(model, Tiger(groups)).items():
        assert float(group["lr"]) == KINDS[kind_of(name)]["lr"], name


def test_param_groups_pass_options_on():
    model = Model()
    options = dict(accumulation_steps=3, rms_floor=0.5, direction="clip", betas=(0.8,))
    groups = tiger_ext.param_groups(model, **options)
    for name, group in names_and_groups(model, Tiger(groups)).items():
        for key, value in options.items():
            assert group[key] == value, (name, key)


def test_param_groups_with_another_algorithm_for_embeddings():
    model = Model()
    groups = tiger_ext.param_groups(model, embedding_algorithm="adamw", nonfinite="skip")
    for name, group in names_and_groups(model, Tiger(groups)).items():
        expected = "adamw" if kind_of(name) == "embedding" else "tiger"
        assert group["algorithm"] == expected, name
        assert group["nonfinite"] == "skip"
    groups = tiger_ext.param_groups(model, embedding_algorithm="lion")
    found = names_and_groups(model, Tiger(groups))
    assert found["tokens.weight"]["algorithm"] == "lion"
    assert found["tokens.weight"]["scale"] == "rms_rows"


def test_param_groups_of_small_models():
    table = nn.Embedding(3, 2)
    opt = Tiger(tiger_ext.param_groups(table))
    assert len(opt.param_groups) == 1 and opt.param_groups[0]["scale"] == "rms_rows"
    opt = Tiger(tiger_ext.param_groups(nn.Linear(3, 2)))
    assert sorted(str(g["scale"]) for g in opt.param_groups) == ["None", "rms"]
    bare = nn.LayerNorm(3, elementwise_affine=False)
    opt = Tiger(tiger_ext.param_groups(nn.Sequential(bare, nn.Linear(3, 2, bias=False))))
    assert len(opt.param_groups) == 1 and opt.param_groups[0]["scale"] == "rms"


def test_a_table_shared_by_two_embeddings_is_one_embedding():
    model = nn.ModuleDict({"a": nn.Embedding(4, 3), "b": nn.Embedding(4, 3)})
    model["b"].weight = model["a"].weight
    opt = Tiger(tiger_ext.param_groups(model))
    (group,) = opt.param_groups
    assert len(group["params"]) == 1 and group["scale"] == "rms_rows"


def test_subclasses_are_recognised():
    class Table(nn.Embedding):
        pass

    class Norm(nn.LayerNorm):
        pass

    model = nn.ModuleDict({"table": Table(4, 3), "gain": Norm(3)})
    found = names_and_groups(model, Tiger(tiger_ext.param_groups(model)))
    assert found["table.weight"]["scale"] == "rms_rows"
    assert found["gain.weight"]["scale"] is None and found["gain.weight"]["shrink_to"] == 1.0


# -------------------------------------------------------------------------- fifty published updates

STEPS, MICRO = 50, 3


def micro_gradients(p, name, signs, generator):
    """Return one gradient a micro-step; the signs of the momenta are kept away from zero."""

    def values(shape):
        return 0.5 + torch.rand(shape, generator=generator, dtype=torch.float64)

    grads = []
    for k in range(MICRO):
        kind = float(torch.rand((), generator=generator))
        if name == "bags.weight":
            ids = torch.randint(len(p), (5,), generator=generator)
            v = signs[ids] * values((5, p.shape[1]))
            if kind < 0.1:
                v[int(torch.randint(5, (), generator=generator)), 0] = torch.nan
            grads.append(torch.sparse_coo_tensor(ids[None], v.to(p.dtype), p.shape))
        elif kind < 0.1 and k > 0:
            grads.append(None)
        else:
            g = signs * values(p.shape)
            if kind < 0.15 and name != "tokens.weight":
                g.view(-1)[int(torch.randint(g.numel(), (), generator=generator))] = torch.inf
            grads.append(g.to(p.dtype))
    return grads


@backends
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_fifty_published_updates(dtype, fused):
    model = Model().to(dtype)
    named = dict(model.named_parameters())
    generator = torch.Generator().manual_seed(5)
    signs = {
        n: torch.randint(2, p.shape, generator=generator).double() * 2 - 1 for n, p in named.items()
    }
    groups = tiger_ext.param_groups(
        model,
        lr=0.02,
        weight_decay=0.3,
        betas=(0.9,),
        nonfinite="shrink",
        accumulation_steps=MICRO,
        rms_floor=1e-3,
        fused=fused,
    )
    opt = Tiger(groups)
    options = {}
    for name in named:
        kind = KINDS[kind_of(name)]
        options[name] = Options(
            **{**kind, "lr": 0.02 * kind["lr"] / 0.25, "weight_decay": 0.6 * kind["weight_decay"]},
            betas=(0.9,),
            nonfinite="shrink",
            accumulation_steps=MICRO,
        )
    theta = {n: p.detach().double().clone() for n, p in named.items()}
    momentum = {n: torch.zeros_like(t) for n, t in theta.items()}
    closest = math.inf
    for step in range(STEPS):
        if step == 25:
            signs = {n: -s for n, s in signs.items()}
        micro = {n: micro_gradients(p, n, signs[n], generator) for n, p in named.items()}
        for k in range(MICRO):
            for n, p in named.items():
                p.grad = micro[n][k]
            opt.step()
        for n, p in named.items():
            wide = [None if g is None else g.double() for g in micro[n]]
            o = window(theta[n], wide, momentum[n], options[n])
            theta[n], momentum[n] = o.theta.view(p.shape), o.momentum.view(p.shape)
            m = o.momentum[o.touched]
            if dtype == torch.float32:
                assert not bool((m == 0).any())
            closest = min(closest, float(m.abs().min()) if m.numel() else math.inf)
        tight = (
            dict(rtol=1e-10, atol=1e-12) if dtype == torch.float64 else dict(rtol=2e-4, atol=2e-5)
        )
        for n, p in named.items() if step % 5 == 4 else ():
            what = f"{n} after {step + 1} updates: "
            for value, expected in ((p, theta[n]), (momentum_of(opt, p), momentum[n])):
                torch.testing.assert_close(
                    value.detach().double(), expected, **tight, msg=lambda m, w=what: w + m
                )
    assert closest > (1e-13 if dtype == torch.float64 else 1e-5)  # else a sign could flip


# ----------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("cls", [Tiger, Lion])
@pytest.mark.parametrize("value", ["rows", "RMS", "", 1.0, True, ["rms"]])
@pytest.mark.parametrize("where", ["constructor", "group"])
def test_unknown_scales_are_refused(cls, value, where):
    match = rf"(?s)[^_]scale={re.escape(repr(value))}.*None.*rms.*rms_rows"
    with pytest.raises(ValueError, match=match.replace("[^_]", r"(^|[^_])")):
        if where == "constructor":
            cls([parameter(3)], scale=value)
        else:
            cls([{"params": [parameter(3)], "scale": value}])


@pytest.mark.parametrize("cls", [Tiger, Lion])
@pytest.mark.parametrize("value", [-1e-3, math.inf, math.nan, None, "1", True])
def test_bad_floors_are_refused(cls, value):
    match = rf"(?s)rms_floor={re.escape(repr(value))}.*>= 0"
    with pytest.raises(ValueError, match=match):
        cls([parameter(3)], scale="rms", rms_floor=value)


def test_adamw_has_no_scale():
    for key, value in (("scale", "rms"), ("rms_floor", 0.1)):
        with pytest.raises(TypeError, match=key):
            AdamW([parameter(3)], **{key: value})
        with pytest.raises(TypeError, match=rf"adamw.*{key}"):
            Tiger([{"params": [parameter(3)], "algorithm": "adamw", key: value}])


@every_scale
@pytest.mark.parametrize("lazy", ["decay", "exact"])
def test_lazy_modes_are_still_refused(scale, lazy):
    with pytest.raises(ValueError, match=rf"lazy.*'{lazy}'"):
        Tiger([parameter(3)], scale=scale, lazy=lazy)


@pytest.mark.parametrize("algorithm", ["tiger", "lion", "adamw"])
def test_param_groups_with_another_algorithm_for_the_embeddings(algorithm):
    model = nn.ModuleDict({"table": nn.Embedding(10, 4), "head": nn.Linear(4, 3)})
    groups = tiger_ext.param_groups(
        model, betas=(0.9,), accumulation_steps=1, embedding_algorithm=algorithm
    )
    opt = Tiger(groups)
    group = next(g for g in opt.param_groups if g["params"] == [model["table"].weight])
    assert group["algorithm"] == algorithm
    assert len(group["betas"]) == (1 if algorithm == "tiger" else 2)


def test_param_groups_take_tied_weights_as_dense():
    tied = tiger_ext.nn.TiedEmbedding(10, 4)
    shared = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10, bias=False))
    shared[1].weight = shared[0].weight
    for model in (tied, shared):
        (group,) = tiger_ext.param_groups(model)
        assert group["scale"] == "rms"


# ------------------------------------------------------------- no more than the sign would do

smoothed = pytest.mark.parametrize("direction", ["clip", "power", "atan"])
storages = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str
)


def row_rms(x):
    return x.double().square().mean(1, keepdim=True).sqrt()


@backends
@every_scale
@smoothed
@storages
@pytest.mark.parametrize("steps", [1, 2])
def test_what_has_no_gradient_moves_no_more_than_under_the_sign(
    scale, direction, dtype, steps, fused
):
    p = Parameter((torch.randn(1, 33) * 2).to(dtype))
    hyper = dict(lr=0.01, betas=(0.4,), weight_decay=0.5, accumulation_steps=steps)
    opt = Tiger([p], **hyper, scale=scale, direction=direction, rms_floor=0.0, fused=fused)
    for step in range(180):  # the momentum decays into the subnormal numbers and to 0
        grad = torch.randn(1, 33) if step == 0 else torch.zeros(1, 33)
        old, size = p.detach().double(), row_rms(p.detach())
        for _ in range(steps):
            p.grad = grad.to(dtype)
            opt.step()
        way = p.detach().double() - (1 - 0.01 * 0.5 * size) * old
        rounding = 4 * torch.finfo(dtype).eps * size
        assert bool((row_rms(way) <= 0.01 * size * (1 + 1e-4) + rounding).all()), step


@backends
@every_scale
@smoothed
@pytest.mark.parametrize("layout", ["strided", "sparse"])
@pytest.mark.parametrize("theta", [1e-40, 1.0, 1e30])
@pytest.mark.parametrize("grad", [1.4e-45, 1e-42, 1e-38, 1e-30, 1e30])
def test_any_finite_gradient_moves_no_more_than_a_sign(
    scale, direction, layout, theta, grad, fused
):
    start, g = torch.full((3, 4), theta), torch.full((3, 4), grad)
    if layout == "sparse":
        g = torch.sparse_coo_tensor([[0, 1, 2]], g, (3, 4))
    kappa = 2.0 if direction == "power" else 1.0
    p = one_step(
        start, g, scale=scale, direction=direction, direction_scale=kappa, weight_decay=0.01,
        rms_floor=0.0, lr=0.5, fused=fused,
    )  # fmt: skip
    way = p.double() - max(1 - 0.5 * 0.01 * theta, 0.0) * start.double()
    assert bool((way.abs() <= 0.5 * theta * (1 + 1e-5) + 1e-44).all()), way
    expected = {1e-30: 1.0, 1e30: 1.0, 1.4e-45: 0.0}
    if grad in expected and theta == 1.0 and (direction != "power" or grad > 1):
        torch.testing.assert_close(way, torch.full((3, 4), -0.5 * expected[grad]).double())


@backends
@every_scale
def test_a_fading_direction_leaves_the_decay_as_it_is(scale, fused):
    theta = torch.full((3, 4), 2.0)
    options = dict(scale=scale, direction="clip", direction_scale=1.0, weight_decay=0.25)
    result = one_step(theta, torch.full((3, 4), 1.4e-45), fused=fused, **options)
    torch.testing.assert_close(result, theta * (1 - 0.5 * 2.0 * 0.25))


@backends
@every_scale
@every_direction
def test_the_decay_takes_no_more_than_the_whole_parameter(scale, direction, fused):
    theta = torch.full((3, 4), 1e30)
    options = dict(scale=scale, direction=direction, weight_decay=0.25, fused=fused)
    result = one_step(theta, torch.full((3, 4), 1.0), **options)
    torch.testing.assert_close(result, -0.5 * theta)


@backends
@every_scale
@pytest.mark.parametrize("direction", ["sign", "clip"])
def test_squares_that_overflow_in_float64_give_no_nan(scale, direction, fused):
    theta = torch.full((3, 4), 1e200, dtype=torch.float64)
    options = dict(scale=scale, direction=direction, weight_decay=0.25, fused=fused)
    assert bool(one_step(theta, torch.ones_like(theta), **options).isfinite().all())


@backends
@smoothed
def test_the_published_recipe_leaves_idle_rows_finite(direction, fused):
    table = nn.Embedding(20, 16)
    groups = tiger_ext.param_groups(table, lr=1e-3, direction=direction)
    opt = Tiger(groups, betas=(0.8,), fused=fused)
    start = row_rms(table.weight.detach())
    for step in range(250):
        ids = torch.arange(20) if step == 0 else torch.arange(5)
        table(ids).square().mean().backward()
        opt.step()
        opt.zero_grad()
    # 250 steps of a thousandth of the size each
    assert bool((row_rms(table.weight.detach()) < start * 1.001**250).all())
