# SPDX-License-Identifier: Apache-2.0
import math
import re

import pytest
import torch
from cases import VIEWS, dense_grad, every_rule, parameter, set_grad, sparse_grad
from oracle import same_bits, unchanged
from published import (
    DIMS,
    backends,
    momentum_of,
    precisions,
    verified_window,
)
from torch import nn
from torch.nn import Parameter

import tiger_ext
from tiger_ext import AdamW, Lion, Tiger

HYPER = dict(lr=0.05, betas=(0.9,), weight_decay=0.3)
NAN, INF = math.nan, math.inf
numbers = pytest.mark.parametrize("number", [NAN, INF, -INF], ids=["nan", "inf", "-inf"])
layouts = pytest.mark.parametrize("layout", ["strided", "sparse", "nonzero"])
leaving = pytest.mark.parametrize("nonfinite", ["skip", "shrink"])


def make(p, layout, bad=()):
    """Make a gradient of all rows whose elements ``bad``, (row, column) -> number, are replaced."""
    grad = torch.randn(p.shape, dtype=torch.float64).to(p.dtype)
    for at, number in dict(bad).items():
        grad[at] = number
    if layout == "sparse":
        return torch.sparse_coo_tensor(torch.arange(len(p))[None], grad, p.shape)
    return grad


def rows_of(layout):
    return "nonzero" if layout == "nonzero" else None


def values_of(opt, p):
    """Return θ and every state tensor but the step, which counts gradients."""
    state = {k: v for k, v in opt.state.get(p, {}).items() if k.startswith("exp_avg")}
    return {"θ": p.detach(), **state}


def copy_values(opt, p):
    return {k: v.clone() for k, v in values_of(opt, p).items()}


def warm(rule, p, layout, **options):
    """Make an optimizer that has taken a step, so that there is state."""
    opt = rule([p], rows=rows_of(layout), **options)
    p.grad = make(p, layout)
    opt.step()
    return opt


# ---------------------------------------------------------------------------- whole parameters


@backends
@leaving
@pytest.mark.parametrize("at", [0, 15, 16, 255, 256, 32_767, 32_768, 40_000])
def test_one_element_anywhere(nonfinite, at, fused):
    number = (NAN, INF, -INF)[at % 3]
    params = [parameter(40_001), parameter(40_001), parameter(5)]
    opt = Tiger(params, **HYPER, nonfinite=nonfinite, fused=fused)
    verified_window(opt, params, [dense_grad(p) for p in params])
    grads = [dense_grad(p) for p in params]
    grads[1][at] = number
    _, o, _ = verified_window(opt, params, grads)
    assert not bool(o.touched.any())
    verified_window(opt, params, [dense_grad(p) for p in params])


@backends
@every_rule
@leaving
@numbers
@precisions
def test_strided_gradients(rule, nonfinite, number, dtype, fused):
    p = parameter(7, 5, dtype=dtype)
    opt = warm(rule, p, "strided", nonfinite=nonfinite, fused=fused)
    before = copy_values(opt, p)
    p.grad = make(p, "strided", {(3, 4): number})
    opt.step()
    after = values_of(opt, p)
    theta, old = after.pop("θ"), before.pop("θ")
    assert all(same_bits(after[k], before[k]) for k in before)
    if nonfinite == "skip":
        assert same_bits(theta, old)
    else:
        close = dict(rtol=1e-2, atol=0) if dtype == torch.bfloat16 else dict(rtol=3e-7, atol=0)
        torch.testing.assert_close(theta, (0.99 * old.double()).to(dtype), **close)
        assert not same_bits(theta, old)


@backends
@pytest.mark.parametrize("nonfinite", ["propagate", "skip", "shrink", "raise"])
@pytest.mark.parametrize("cls", [Tiger, Lion])
@layouts
def test_finite_gradients_are_updated_as_ever(nonfinite, cls, layout, fused):
    a = parameter(40, 9)
    b = Parameter(a.detach().clone())
    first = cls([a], lr=0.1, rows=rows_of(layout), nonfinite=nonfinite, fused=fused)
    second = cls([b], lr=0.1, rows=rows_of(layout), fused=fused)
    for _ in range(3):
        a.grad = b.grad = make(a, layout, {(0, 0): 1e30, (1, 1): -1e-45})
        first.step()
        second.step()
        assert same_bits(a, b)
        assert same_bits(first.state[a]["exp_avg"], second.state[b]["exp_avg"])


@backends
@pytest.mark.parametrize("cls", [Tiger, Lion])
@layouts
def test_propagate(cls, layout, fused):
    p = parameter(4, 3)
    before = p.detach().clone()
    opt = cls([p], lr=0.5, weight_decay=0.0, rows=rows_of(layout), fused=fused)
    p.grad = make(p, layout, {(0, 0): NAN, (1, 1): INF, (2, 2): -INF})
    opt.step()
    m = opt.state[p]["exp_avg"]
    assert p.isnan().nonzero().tolist() == m.isnan().nonzero().tolist() == [[0, 0]]
    assert (m[1, 1].item(), m[2, 2].item()) == (INF, -INF)
    torch.testing.assert_close(p[1, 1].item(), before[1, 1].item() - 0.5)
    torch.testing.assert_close(p[2, 2].item(), before[2, 2].item() + 0.5)
    assert int((~m.isfinite()).sum()) == 3


@backends
@leaving
def test_the_first_gradient_is_bad(nonfinite, fused):
    a, b = parameter(7, 5), parameter(7, 5)
    opt = Tiger([a, b], **HYPER, nonfinite=nonfinite, fused=fused)
    grads = [make(a, "strided", {(0, 0): NAN}), make(b, "strided")]
    verified_window(opt, [a, b], grads)
    assert not bool(momentum_of(opt, a).any())
    verified_window(opt, [a, b], [make(a, "strided"), make(b, "strided")])


@backends
@leaving
def test_memory_layouts(nonfinite, fused):
    for param in [v for v in VIEWS if v.dims <= 2]:
        p = Parameter(param.make(torch.randn(9, 11)))
        for layout in ("strided", "nonzero"):
            opt = Tiger([p], **HYPER, rows=rows_of(layout), nonfinite=nonfinite, fused=fused)
            for view in [v for v in VIEWS if v.dims <= 2]:
                grad = view.make(make(p, layout, {(8, 10): NAN}))
                verified_window(opt, [p], [grad])
                verified_window(opt, [p], [view.make(make(p, layout))])


@backends
@leaving
def test_many_parameters(nonfinite, fused):
    dtypes = (torch.float32, torch.float64, torch.bfloat16)
    params = [parameter(k % 13 + 1, k % 7 + 1, dtype=dtypes[k % 3]) for k in range(150)]
    params += [parameter(40_000, 1), parameter(3, 1)]
    opt = Tiger(params, **HYPER, nonfinite=nonfinite, fused=fused)
    for _ in range(2):
        grads = [make(p, "sparse" if k % 2 else "strided") for k, p in enumerate(params)]
        for g in grads[::3]:
            (g._values() if g.is_sparse else g)[-1, -1] = INF
        verified_window(opt, params, grads)


@backends
@leaving
@pytest.mark.parametrize("shape", [(), (0,), (1,), (0, 4), (4, 0), (2, 3, 4)])
def test_shapes(nonfinite, shape, fused):
    p = parameter(*shape)
    opt = Tiger([p], **HYPER, nonfinite=nonfinite, fused=fused)
    grad = dense_grad(p)
    if grad.numel():
        grad.view(-1)[-1] = NAN
    verified_window(opt, [p], [grad])
    verified_window(opt, [p], [dense_grad(p)])


@backends
@leaving
def test_a_gradient_beyond_the_arithmetic_type_is_infinite(nonfinite, fused):
    p = parameter(5)
    opt = Tiger([p], **HYPER, nonfinite=nonfinite, fused=fused)
    grad = torch.randn(5, dtype=torch.float64)
    grad[2] = 1e300
    (o,) = verified_window(opt, [p], [grad])
    assert not bool(o.touched.any())
    wide = parameter(5, dtype=torch.float64)
    opt = Tiger([wide], **HYPER, nonfinite=nonfinite, fused=fused)
    (o,) = verified_window(opt, [wide], [grad])
    assert bool(o.touched.all())


# ----------------------------------------------------------------------------------------- rows


@backends
@leaving
@numbers
@pytest.mark.parametrize("layout", ["sparse", "nonzero"])
@pytest.mark.parametrize("dim", DIMS)
def test_one_element_of_a_row(nonfinite, number, layout, dim, fused):
    columns = sorted({0, dim // 2, dim - 1, min(dim - 1, 255)})
    p = parameter(2 * len(columns) + 1, dim)
    opt = Tiger([p], **HYPER, nonfinite=nonfinite, rows=rows_of(layout), fused=fused)
    bad = {(2 * k + 1, c): number for k, c in enumerate(columns)}
    verified_window(opt, [p], [make(p, layout)])
    (o,) = verified_window(opt, [p], [make(p, layout, bad)])
    assert o.touched.tolist() == [k % 2 == 0 for k in range(len(p))]
    assert o.moved.tolist() == [k % 2 == 0 or nonfinite == "shrink" for k in range(len(p))]
    verified_window(opt, [p], [make(p, layout)])


@backends
@every_rule
@pytest.mark.parametrize("layout", ["sparse", "nonzero"])
def test_skipped_rows_count_as_untouched(rule, layout, fused):
    a = parameter(40, 9)
    b = Parameter(a.detach().clone())
    first = rule([a], nonfinite="skip", rows=rows_of(layout), fused=fused)
    second = rule([b], fused=fused)
    for bad in ([], [3, 20], [0, 39], []):
        grad = make(a, "strided")
        good = torch.tensor([r for r in range(40) if r not in bad])
        b.grad = torch.sparse_coo_tensor(good[None], grad[good], b.shape)
        for r in bad:
            grad[r, r % 9] = (NAN, INF, -INF)[r % 3]
        a.grad = grad
        if layout == "sparse":
            a.grad = torch.sparse_coo_tensor(torch.arange(40)[None], grad, a.shape)
        first.step()
        second.step()
        for name, value in values_of(second, b).items():
            assert same_bits(values_of(first, a)[name], value), name


@backends
@every_rule
@pytest.mark.parametrize("layout", ["sparse", "nonzero"])
def test_shrunk_rows(rule, layout, fused):
    p = parameter(8, 9)
    opt = warm(rule, p, layout, nonfinite="shrink", fused=fused)
    before = copy_values(opt, p)
    p.grad = make(p, layout, {(2, 8): NAN, (5, 0): INF})
    opt.step()
    for name, value in values_of(opt, p).items():
        for row in (2, 5):
            if name != "θ":
                assert same_bits(value[row], before[name][row])
            else:
                torch.testing.assert_close(value[row], 0.99 * before[name][row], rtol=3e-7, atol=0)
        assert not bool((value[[0, 1, 3, 4, 6, 7]] == before[name][[0, 1, 3, 4, 6, 7]]).any())


SUMS = {
    "inf-inf": ([INF, -INF], True),
    "inf-and-finite": ([1.0, INF], True),
    "overflow": ([3e38, 3e38], True),
    "negative-overflow": ([-2e38, -1e38, -2e38], True),
    "just-below": ([1.5e38, 1.5e38], False),
    "cancels": ([3e38, -3e38], False),
    "one": ([3e38], False),
    "nan-first": ([NAN, 1.0], True),
}


@backends
@leaving
@pytest.mark.parametrize("values,bad", SUMS.values(), ids=SUMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_summed_row_is_judged(nonfinite, values, bad, dtype, fused):
    p = parameter(6, 3, dtype=dtype)
    opt = Tiger([p], **HYPER, nonfinite=nonfinite, fused=fused)
    ids = torch.tensor([[4] * len(values) + [1, 1, 5]])
    entries = torch.randn(ids.shape[1], 3)
    entries[: len(values), 1] = torch.tensor(values)
    p.grad = torch.sparse_coo_tensor(ids, entries.to(dtype), p.shape)
    (o,) = verified_window(opt, [p], [p.grad])
    assert o.touched.nonzero()[:, 0].tolist() == ([1, 5] if bad else [1, 4, 5])


@backends
def test_sums_of_float64_do_not_overflow(fused):
    p = parameter(3, 1, dtype=torch.float64)
    opt = Tiger([p], **HYPER, nonfinite="skip", fused=fused)
    grad = torch.sparse_coo_tensor(
        [[1, 1]], torch.tensor([[3e38], [3e38]], dtype=torch.float64), (3, 1)
    )
    (o,) = verified_window(opt, [p], [grad])
    assert o.touched.tolist() == [False, True, False]


@backends
@leaving
def test_rows_with_hundreds_of_entries(nonfinite, fused):
    p = parameter(9, 70)
    opt = Tiger([p], **HYPER, nonfinite=nonfinite, fused=fused)
    ids = torch.tensor([3] * 300 + [4] * 600 + [5, 4, 3, 8])
    for at in (0, 255, 256, 299, 902):
        values = torch.randn(len(ids), 70)
        values[at, 69] = NAN
        (o,) = verified_window(opt, [p], [torch.sparse_coo_tensor(ids[None], values, p.shape)])
        assert o.touched.nonzero()[:, 0].tolist() == [4, 5, 8]


@backends
@leaving
@pytest.mark.parametrize("sparse_dim", [1, 2, 3])
def test_several_sparse_dimensions(nonfinite, sparse_dim, fused):
    p = parameter(5, 4, 3)
    opt = Tiger([p], **HYPER, nonfinite=nonfinite, fused=fused)
    for _ in range(2):
        grad = sparse_grad(p, 20, sparse_dim=sparse_dim)
        grad._values().view(20, -1)[::5, -1] = INF
        verified_window(opt, [p], [grad])


@backends
@leaving
def test_thousands_of_rows(nonfinite, fused):
    p = parameter(5000, 3)
    opt = Tiger([p], **HYPER, nonfinite=nonfinite, fused=fused)
    for _ in range(2):
        grad = sparse_grad(p, 6000)
        grad._values()[torch.rand(6000) < 0.1, 1] = NAN
        verified_window(opt, [p], [grad])


@backends
@leaving
@pytest.mark.parametrize("direction", ["clip", "power", "atan"])
@pytest.mark.parametrize("scale", [None, "rms", "rms_rows"])
@layouts
def test_directions_and_scales(nonfinite, direction, scale, layout, fused):
    params = [parameter(9, 5), parameter(6, 4)]
    opt = Tiger(
        params,
        **HYPER,
        nonfinite=nonfinite,
        direction=direction,
        scale=scale,
        rows=rows_of(layout),
        fused=fused,
    )
    for _ in range(2):
        grads = [make(params[0], layout, {(2, 3): NAN}), make(params[1], layout)]
        size = 1.0 if direction == "power" else 1e-4
        verified_window(opt, params, [size * g for g in grads])


@backends
@leaving
def test_tracked_rows(nonfinite, fused):
    table = nn.Embedding(10, 4)
    opt = Tiger([table.weight], **HYPER, nonfinite=nonfinite, rows="tracked", fused=fused)
    opt.track(table)
    ids = torch.tensor([1, 5, 7])
    table(ids)
    grad = make(table.weight, "strided", {(5, 2): INF, (8, 0): NAN})
    (o,) = verified_window(opt, [table.weight], [grad], tracked=[ids])
    assert o.touched.nonzero()[:, 0].tolist() == [1, 7]


# --------------------------------------------------------------------------------------- shrinking


@backends
@layouts
@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("to", [None, 0.0, 1.0, -2.5])
def test_shrink_ratio_and_target(layout, ratio, to, fused):
    p = parameter(6, 4)
    group = {"params": [p]} if to is None else {"params": [p], "shrink_to": to}
    opt = Tiger(
        [group],
        **HYPER,
        nonfinite="shrink",
        shrink_ratio=ratio,
        rows=rows_of(layout),
        fused=fused,
    )
    before = p.detach().clone()
    p.grad = make(p, layout, {(k, 0): NAN for k in range(6)})
    opt.step()
    target = to or 0.0
    expected = target + ratio * (before.double() - target)
    torch.testing.assert_close(p.detach(), expected.float(), rtol=1e-6, atol=1e-6)
    assert not bool(momentum_of(opt, p).any())


@backends
def test_normalisation_gains_shrink_towards_one(fused):
    model = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4))
    groups = tiger_ext.param_groups(model, nonfinite="shrink", fused=fused)
    opt = Tiger(groups)
    for p in model.parameters():
        p.data.fill_(3.0)
        p.grad = torch.full_like(p, NAN)
    opt.step()
    gain, *others = model.parameters()
    torch.testing.assert_close(gain.detach(), torch.full((4,), 2.98))
    for p in others:
        torch.testing.assert_close(p.detach(), torch.full(p.shape, 2.97))


# ------------------------------------------------------------------------------------------ raising


@backends
@every_rule
@layouts
@numbers
def test_raise_is_all_or_nothing(rule, layout, number, fused):
    params = [parameter(6, 4) for _ in range(4)]
    twins = [Parameter(p.detach().clone()) for p in params]
    names = ["first", "table.weight", "third", "last"]
    options = dict(rows=rows_of(layout), fused=fused)
    opt = rule(list(zip(names, params)), nonfinite="raise", **options)
    twin = rule(twins, **options)
    for first in (True, False):
        grads = [make(p, layout) for p in params]
        for p, q, g in zip(params, twins, grads):
            p.grad = q.grad = g
        params[1].grad = make(params[1], layout, {(5, 3): number})
        with unchanged(opt), pytest.raises(FloatingPointError, match=r"table\.weight"):
            opt.step()
        assert not first or not opt.state
        params[1].grad = grads[1]
        opt.step()
        twin.step()
        for p, q in zip(params, twins):
            assert same_bits(p, q)
            assert set(opt.state[p]) == set(twin.state[q])
            assert all(same_bits(opt.state[p][k], v) for k, v in twin.state[q].items())


@backends
def test_raise_judges_the_summed_row(fused):
    p = parameter(6, 3)
    opt = Tiger([("words", p)], nonfinite="raise", fused=fused)
    for values, bad in SUMS.values():
        entries = torch.randn(len(values), 3)
        entries[:, 2] = torch.tensor(values)
        ids = torch.full((1, len(values)), 4)
        p.grad = torch.sparse_coo_tensor(ids, entries, p.shape)
        if bad:
            with unchanged(opt), pytest.raises(FloatingPointError, match="words"):
                opt.step()
        else:
            opt.step()


@pytest.mark.parametrize("order", [(None, False), (False, None)])
def test_raise_over_both_backends(order):
    params = [parameter(6, 4), parameter(6, 4)]
    groups = [
        {"params": [(f"p{k}", p)], "fused": fused}
        for k, (p, fused) in enumerate(zip(params, order))
    ]
    for bad in range(2):
        opt = Tiger(groups, nonfinite="raise")
        for k, p in enumerate(params):
            p.grad = make(p, "strided", {(0, 0): NAN} if k == bad else {})
        with unchanged(opt), pytest.raises(FloatingPointError, match=f"p{bad}"):
            opt.step()


@backends
def test_only_the_groups_that_ask_are_judged(fused):
    params = [parameter(6, 4) for _ in range(4)]
    choices = ["propagate", "skip", "shrink", "raise"]
    groups = [{"params": [p], "nonfinite": n} for p, n in zip(params, choices)]
    opt = Tiger(groups, **HYPER, fused=fused)
    before = [p.detach().clone() for p in params]
    for p in params[:3]:
        p.grad = make(p, "strided", {(0, 0): NAN})
    params[3].grad = make(params[3], "strided")
    opt.step()
    assert int(params[0].isnan().sum()) == 1
    assert same_bits(params[1], before[1])
    torch.testing.assert_close(params[2].detach(), 0.99 * before[2])
    assert bool(params[3].isfinite().all()) and not bool((params[3] == before[3]).any())


@backends
def test_parameters_without_names_are_named_by_position(fused):
    params = [parameter(3), parameter(3)]
    opt = Tiger([{"params": [params[0]]}, {"params": [params[1]]}], nonfinite="raise", fused=fused)
    params[0].grad, params[1].grad = torch.ones(3), torch.full((3,), NAN)
    with pytest.raises(FloatingPointError, match=r"group 1.*position 0"):
        opt.step()


@pytest.mark.indices_checked_at_once
@backends
def test_a_bad_index_is_reported_whatever_the_values(fused):
    p = parameter(4, 2)
    for nonfinite in ("skip", "shrink", "raise"):
        opt = Tiger([p], nonfinite=nonfinite, fused=fused)
        p.grad = torch.sparse_coo_tensor(
            [[1, 4]], torch.tensor([[1.0, 1.0], [NAN, 1.0]]), (4, 2), check_invariants=False
        )
        with unchanged(opt), pytest.raises((IndexError, FloatingPointError)):
            opt.step()


# ----------------------------------------------------------------------------- what is judged when


@backends
@pytest.mark.parametrize("nonfinite", ["skip", "shrink", "raise"])
@layouts
def test_bad_parameters_and_momenta_are_not_the_gradients_fault(nonfinite, layout, fused):
    a = parameter(6, 4)
    a.data[2, 1], a.data[3, 3] = NAN, INF
    b = Parameter(a.detach().clone())
    results = []
    for p, choice in ((a, nonfinite), (b, "propagate")):
        torch.manual_seed(2)
        opt = Tiger([p], **HYPER, nonfinite=choice, rows=rows_of(layout), fused=fused)
        p.grad = make(p, layout)
        opt.step()
        opt.state[p]["exp_avg"][4, 0] = NAN
        p.grad = make(p, layout)
        opt.step()
        results.append((p.detach(), opt.state[p]["exp_avg"]))
    for x, y in zip(*results):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)
    assert results[0][0].isnan().nonzero().tolist() == [[2, 1], [4, 0]]


@backends
@pytest.mark.parametrize("nonfinite", ["skip", "raise"])
def test_adamw_skipped_whole_does_not_advance(nonfinite, fused):
    for betas in ((0.8, 0.99), (0.0, 0.99)):
        a = parameter(7, 5)
        b = Parameter(a.detach().clone())
        first = AdamW([a], lr=0.02, betas=betas, nonfinite=nonfinite, fused=fused)
        second = AdamW([b], lr=0.02, betas=betas, fused=fused)
        for k in range(6):
            grad = make(a, "strided")
            if k % 2:
                a.grad = make(a, "strided", {(6, 4): NAN})
                if nonfinite == "skip":
                    first.step()
                else:
                    with pytest.raises(FloatingPointError):
                        first.step()
                assert same_bits(a, b)
            a.grad = b.grad = grad
            first.step()
            second.step()
            assert int(first.state[a]["step"]) == int(second.state[b]["step"]) == k + 1
            assert all(same_bits(first.state[a][n], v) for n, v in second.state[b].items())
            assert same_bits(a, b)


@backends
@pytest.mark.parametrize("nonfinite", ["skip", "shrink", "raise"])
def test_a_cancelled_step_is_not_judged(nonfinite, fused):
    p = parameter(5)
    opt = Tiger([p], nonfinite=nonfinite, fused=fused)
    p.grad = torch.full((5,), NAN)
    opt.grad_scale, opt.found_inf = torch.tensor(2.0), torch.tensor(1.0)
    with unchanged(opt):
        opt.step()


@backends
@leaving
@layouts
def test_maximize_and_tensor_lr(nonfinite, layout, fused):
    a = parameter(6, 4)
    b = Parameter(a.detach().clone())
    options = dict(nonfinite=nonfinite, rows=rows_of(layout), fused=fused)
    lr = torch.tensor(0.07)
    first = Tiger([a], lr=lr, maximize=True, **options)
    second = Tiger([b], lr=float(lr), **options)
    for bad in ({(1, 1): -INF}, {}, {(5, 3): NAN, (0, 0): INF}):
        b.grad = make(b, layout, bad)
        a.grad = -b.grad
        first.step()
        second.step()
        assert same_bits(a, b)


@leaving
@layouts
def test_the_number_of_threads_changes_nothing(nonfinite, layout):
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        torch.manual_seed(3)
        p, q = parameter(5000, 33), parameter(70_000, 1)
        opt = Tiger([p, q], nonfinite=nonfinite, rows=rows_of(layout), direction="power")
        for k in range(3):
            p.grad = make(p, layout, {(k * 1000, 5): NAN, (4999, 32): INF})
            q.grad = make(q, layout, {(69_999, 0): NAN} if k == 1 else {})
            opt.step()
        results.append((p.detach(), q.detach()))
    assert all(same_bits(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("nonfinite", ["skip", "shrink", "raise"])
@every_rule
@precisions
def test_native_kernels_exist(nonfinite, rule, dtype):
    params = [parameter(100, 3, dtype=dtype), parameter(100, 3, dtype=dtype)]
    opt = rule(params, nonfinite=nonfinite, fused=True)
    params[0].grad, params[1].grad = dense_grad(params[0]), sparse_grad(params[1], 70)
    opt.step()


@leaving
@every_rule
@layouts
@precisions
def test_native_kernels_agree_with_the_reference(nonfinite, rule, layout, dtype):
    a = parameter(40, 9, dtype=dtype)
    b = Parameter(a.detach().clone())
    options = dict(nonfinite=nonfinite, rows=rows_of(layout))
    first, second = rule([a], **options), rule([b], fused=False, **options)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.02}[dtype]
    for k in range(5):
        a.grad = b.grad = make(a, layout, {(3 * k, k): NAN, (7, 8): INF} if k % 2 else {})
        first.step()
        second.step()
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@backends
@leaving
def test_gradients_of_other_dtypes(nonfinite, fused):
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        params = [parameter(6, 4), parameter(6, 4)]
        opt = Tiger(params, **HYPER, nonfinite=nonfinite, fused=fused)
        for k in range(2):
            grads = [
                make(params[0], "strided", {(1, 1): INF} if k else {}).to(dtype),
                make(params[1], "sparse", {(1, 1): NAN}).to(dtype),
            ]
            verified_window(opt, params, grads)
            set_grad(params[0], None)


# ----------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("cls", [Tiger, Lion, AdamW])
@pytest.mark.parametrize("value", ["ignore", "Skip", "", None, 1, True, ["skip"]])
@pytest.mark.parametrize("where", ["constructor", "group"])
def test_unknown_values_are_refused(cls, value, where):
    match = rf"(?s)nonfinite={re.escape(repr(value))}.*propagate.*skip.*shrink.*raise"
    with pytest.raises(ValueError, match=match):
        if where == "constructor":
            cls([parameter(3)], nonfinite=value)
        else:
            cls([{"params": [parameter(3)], "nonfinite": value}])


@pytest.mark.parametrize("cls", [Tiger, Lion, AdamW])
@pytest.mark.parametrize("value", [-0.1, 1.1, NAN, INF, None, "1", True])
def test_bad_ratios_are_refused(cls, value):
    match = rf"(?s)shrink_ratio={re.escape(repr(value))}.*\[0, 1\]"
    with pytest.raises(ValueError, match=match):
        cls([parameter(3)], nonfinite="shrink", shrink_ratio=value)


@pytest.mark.parametrize("cls", [Tiger, Lion, AdamW])
@pytest.mark.parametrize("value", [NAN, INF, None, "1", True])
def test_bad_targets_are_refused(cls, value):
    match = rf"(?s)shrink_to={re.escape(repr(value))}.*finite"
    with pytest.raises(ValueError, match=match):
        cls([{"params": [parameter(3)], "nonfinite": "shrink", "shrink_to": value}])
