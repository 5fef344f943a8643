# SPDX-License-Identifier: Apache-2.0
"""What state costs: a second moment of one number a row; int8; parameters rounded at random.

The models here are written from the specification, in float64 and one row after the other.
"""

import copy
import io
import math
import pickle

import numpy as np
import pytest
import torch
from cases import clock_of, dense_grad, parameter, set_grad, sparse_grad
from oracle import same_bits
from torch.nn import Parameter

from tiger_ext import AdamW, Lion, Tiger, health_report
from tiger_ext.checkpoint import apply_changes, position, save_changes


@pytest.fixture(params=[None, False], ids=["native", "reference"])
def fused(request):
    return request.param


def reloaded(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def coo(ids, values, shape):
    return torch.sparse_coo_tensor(torch.as_tensor([ids]), torch.as_tensor(values), shape)


def states_of(opt):
    """Return parameters and state, in an order of their own."""
    tensors = []
    for group in opt.param_groups:
        for p in group["params"]:
            tensors.append(p.detach())
            state = opt.state.get(p, {})
            tensors += [
                state[name] for name in sorted(state) if isinstance(state[name], torch.Tensor)
            ]
    return tensors


def assert_same(first, second):
    tensors = list(zip(states_of(first), states_of(second), strict=True))
    assert len(tensors) > 1
    for a, b in tensors:
        assert a.dtype == b.dtype and a.shape == b.shape
        assert bool(same_bits(a, b)), "other bits"


# ------------------------------------------------------------------------ row-wise second moment

HYPER = dict(lr=0.02, betas=(0.8, 0.99), eps=1e-6, weight_decay=0.3)


class RowWiseAdamW:
    """AdamW with one second moment a row, of a table [rows, dim] of float64."""

    def __init__(self, table, lr, betas, eps, weight_decay, lazy="frozen"):
        self.p = table.astype(np.float64).copy()
        self.m = np.zeros_like(self.p)
        self.v = np.zeros(len(self.p))
        self.last = np.zeros(len(self.p), dtype=int)
        self.t = 0
        self.lr, (self.beta1, self.beta2), self.eps, self.wd = lr, betas, eps, weight_decay
        self.lazy = lazy

    def catch_up(self, row):
        for _ in range(self.t - self.last[row]):
            if self.lazy == "decay":
                self.p[row] *= 1 - self.lr * self.wd
                self.m[row] *= self.beta1
                self.v[row] *= self.beta2
        self.last[row] = self.t

    def step(self, grads):
        """Take a step with the gradients ``{row: vector}``."""
        for row in grads:
            self.catch_up(row)
        self.t += 1
        for row, g in grads.items():
            self.last[row] = self.t
            self.m[row] = self.beta1 * self.m[row] + (1 - self.beta1) * g
            square = sum(float(x) ** 2 for x in g) / len(g)
            self.v[row] = self.beta2 * self.v[row] + (1 - self.beta2) * square
            m_hat = self.m[row] / (1 - self.beta1**self.t)
            v_hat = self.v[row] / (1 - self.beta2**self.t)
            self.p[row] = (1 - self.lr * self.wd) * self.p[row] - self.lr * m_hat / (
                math.sqrt(v_hat) + self.eps
            )

    def flush(self):
        for row in range(len(self.p)):
            self.catch_up(row)


def rows_of(grad, touched=None):
    """Return the rows of a gradient as ``{row: vector}``; of a strided one all or those chosen."""
    dense = grad.detach().to_dense().double().numpy()
    if grad.layout == torch.sparse_coo:
        touched = grad._indices()[0].unique().tolist()
    return {row: dense[row] for row in (range(len(dense)) if touched is None else touched)}


def check_table(opt, p, model, tolerance):
    state = opt.state[p]
    assert state["exp_avg_sq"].shape == p.shape[:1]
    assert state["exp_avg_sq"].dtype == (
        torch.float64 if p.dtype == torch.float64 else torch.float32
    )
    close = dict(rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(state["exp_avg_sq"].double(), torch.tensor(model.v), **close)
    torch.testing.assert_close(p.detach().double(), torch.tensor(model.p), **close)
    if "exp_avg" in state:
        torch.testing.assert_close(state["exp_avg"].double(), torch.tensor(model.m), **close)


@pytest.mark.parametrize("beta1", [0.8, 0.0])
@pytest.mark.parametrize("lazy", ["frozen", "decay"])
@pytest.mark.parametrize("rows", [None, "nonzero"])
@pytest.mark.parametrize(
    "dtype,tolerance",
    [(torch.float32, 1e-5), (torch.float64, 1e-12), (torch.bfloat16, 0.05)],
    ids=["float32", "float64", "bfloat16"],
)
def test_one_second_moment_a_row(fused, beta1, lazy, rows, dtype, tolerance):
    options = {**HYPER, "betas": (beta1, 0.99)}
    p = parameter(11, 5, dtype=dtype)
    opt = AdamW(
        [p],
        **options,
        lazy=lazy,
        rows=rows,
        second_moment="row",
        momentum_dtype=torch.float32 if dtype == torch.bfloat16 else None,
        fused=fused,
    )
    model = RowWiseAdamW(p.detach().double().numpy(), **options, lazy=lazy)
    for k in range(9):
        if k % 3 == 2:
            grad = dense_grad(p)
            untouched = [1, 4, 7]
            grad[untouched] = 0
            touched = [r for r in range(11) if rows is None or r not in untouched]
            model.step(rows_of(grad, touched))
        else:
            grad = sparse_grad(p, 6, rows=8).coalesce()
            model.step(rows_of(grad))
        p.grad = grad
        opt.step()
    opt.flush()
    model.flush()
    check_table(opt, p, model, tolerance)
    assert ("exp_avg" in opt.state[p]) == (beta1 > 0)
    assert int(opt.state[p]["step"]) == 9


def test_the_mean_square_is_of_the_summed_unscaled_row(fused):
    p = Parameter(torch.zeros(3, 4))
    opt = AdamW([p], lr=0.5, betas=(0.0, 0.75), second_moment="row", maximize=True, fused=fused)
    p.grad = coo([2, 0, 2], [[4.0] * 4, [1.0, 0.0, 0.0, 3.0], [2.0] * 4], p.shape)
    opt.grad_scale, opt.found_inf = torch.tensor(2.0), torch.tensor(0.0)
    opt.step()
    # Row 2: (4 + 2) / 2 = 3, row 0: (0.25 + 2.25) / 4.
    assert opt.state[p]["exp_avg_sq"].tolist() == [0.25 * 0.625, 0.0, 0.25 * 9.0]
    assert opt.state[p].keys() == {"exp_avg_sq", "step"}
    torch.testing.assert_close(p[2], torch.full((4,), 0.5))
    torch.testing.assert_close(p[0], 0.5 * torch.tensor([0.5, 0, 0, 1.5]) / math.sqrt(0.625))
    assert p[1].tolist() == [0.0] * 4


@pytest.mark.parametrize("shape", [(), (7,)])
def test_parameters_without_rows_keep_a_second_moment_of_each_element(fused, shape):
    pairs = []
    for second_moment in ("element", "row"):
        torch.manual_seed(1)
        p = parameter(*shape)
        opt = AdamW([p], **HYPER, second_moment=second_moment, fused=fused)
        for _ in range(3):
            p.grad = dense_grad(p)
            opt.step()
        pairs.append(opt)
    torch.testing.assert_close(*[opt.param_groups[0]["params"][0] for opt in pairs])
    for opt in pairs:
        (p,) = opt.param_groups[0]["params"]
        assert opt.state[p]["exp_avg_sq"].shape == shape


def set_bad_grad(p, layout, value):
    """Give ``p`` a gradient whose row 1 is not finite; return it as a strided one."""
    bad = dense_grad(p)
    bad[1, 2] = value
    p.grad = bad if layout == "strided" else bad.to_sparse(1)
    return bad


@pytest.mark.parametrize("nonfinite", ["propagate", "skip", "shrink", "raise"])
@pytest.mark.parametrize("layout", ["sparse", "strided"])
def test_nonfinite_rows_of_a_row_wise_second_moment(fused, nonfinite, layout):
    p = parameter(4, 3)
    opt = AdamW(
        [p], **HYPER, second_moment="row", nonfinite=nonfinite, shrink_ratio=0.5, fused=fused
    )
    model = RowWiseAdamW(p.detach().double().numpy(), **HYPER)
    p.grad = dense_grad(p)
    model.step(rows_of(p.grad))
    opt.step()
    bad = set_bad_grad(p, layout, math.inf)
    good = {row: g for row, g in rows_of(bad).items() if row != 1}
    before = copy.deepcopy(opt)
    if nonfinite == "raise":
        with pytest.raises(FloatingPointError):
            opt.step()
        assert_same(opt, before)
        return
    opt.step()
    v = opt.state[p]["exp_avg_sq"]
    model.step(good)
    others = [0, 2, 3]
    torch.testing.assert_close(v[others].double(), torch.tensor(model.v[others]), rtol=1e-5, atol=0)
    torch.testing.assert_close(
        p.detach()[others].double(), torch.tensor(model.p[others]), rtol=1e-5, atol=1e-6
    )
    (old,) = before.param_groups[0]["params"]
    if nonfinite == "propagate":
        assert not math.isfinite(v[1]) and not p[1].isfinite().all()
    else:
        assert v[1] == before.state[old]["exp_avg_sq"][1]
        factor = 0.5 if nonfinite == "shrink" else 1.0
        assert torch.equal(p[1], factor * old[1])


def test_rows_of_another_kind_join_or_share_their_second_moment(fused):
    p = parameter(2, 3, 4)
    opt = AdamW([p], **HYPER, second_moment="row", fused=fused)
    state = opt.state[p]
    p.grad = dense_grad(p)
    opt.step()
    assert state["exp_avg_sq"].shape == (2,)

    def without_entries(sparse_dim):
        shape = (0, *p.shape[sparse_dim:])
        indices = torch.zeros(sparse_dim, 0, dtype=torch.int64)
        return torch.sparse_coo_tensor(indices, torch.zeros(shape), p.shape)

    before = state["exp_avg_sq"].clone()
    p.grad = without_entries(2)
    opt.step()
    assert torch.equal(state["exp_avg_sq"], before[:, None].expand(2, 3))
    p.grad = torch.zeros(2, 3, 4)  # keeps the rows
    p.grad[:, 1] = 8.0
    opt.step()
    after = state["exp_avg_sq"].clone()
    assert after.shape == (2, 3)
    torch.testing.assert_close(after[:, 0], 0.99 * before)
    torch.testing.assert_close(after[:, 1], 0.99 * before + 0.64)
    p.grad = without_entries(1)
    opt.step()
    torch.testing.assert_close(state["exp_avg_sq"], after.mean(1))
    p.grad = without_entries(3)
    opt.step()
    assert state["exp_avg_sq"].shape == (2, 3, 4)


def test_rows_catch_up_before_they_are_joined(fused):
    p = Parameter(torch.zeros(2, 2, 3, dtype=torch.float64))
    opt = AdamW([p], **HYPER, lazy="decay", second_moment="row", fused=fused)
    indices = torch.tensor([[0, 1], [0, 1]])
    values = torch.full((2, 3), 10.0, dtype=torch.float64)
    p.grad = torch.sparse_coo_tensor(indices, values, p.shape)
    opt.step()  # rows (0, 0) and (1, 1) have v = 1
    p.grad = torch.sparse_coo_tensor(indices[:, :1], values[:1], p.shape)
    opt.step()  # (0, 0) has 1.99
    p.grad = torch.sparse_coo_tensor(indices[:1, :0], torch.zeros(0, 2, 3).double(), p.shape)
    opt.step()  # all rows have caught up with two steps, before they were joined
    opt.flush()
    expected = torch.tensor([1.99 / 2, 0.99 / 2], dtype=torch.float64) * 0.99
    torch.testing.assert_close(opt.state[p]["exp_avg_sq"], expected, rtol=1e-12, atol=0)


def test_a_second_moment_that_decays_does_not_underflow(fused):
    p = Parameter(torch.zeros(2, 3))
    opt = AdamW([p], lr=0.1, betas=(0.5, 0.5), lazy="decay", second_moment="row", fused=fused)
    p.grad = coo([0, 1], torch.ones(2, 3), p.shape)
    opt.step()
    for _ in range(200):
        p.grad = coo([1], torch.ones(1, 3), p.shape)
        opt.step()
    opt.flush()
    assert opt.state[p]["exp_avg_sq"][0] == torch.finfo(torch.float32).tiny
    assert p.isfinite().all()


def test_a_changed_second_moment_keeps_what_it_was(fused):
    p = parameter(3, 4)
    opt = AdamW([p], **HYPER, fused=fused)
    p.grad = dense_grad(p)
    opt.step()
    squares = opt.state[p]["exp_avg_sq"].clone()
    opt.param_groups[0]["second_moment"] = "row"
    p.grad = torch.zeros(3, 4)
    opt.step()
    v = opt.state[p]["exp_avg_sq"]
    torch.testing.assert_close(v, 0.99 * squares.mean(1))
    opt.param_groups[0]["second_moment"] = "element"
    opt.step()
    torch.testing.assert_close(opt.state[p]["exp_avg_sq"], 0.99 * v[:, None].expand(3, 4))


def test_a_step_that_fails_leaves_the_second_moment_as_it_was(fused):
    p, q = parameter(3, 4, 2), parameter(3)
    opt = AdamW([p, q], **HYPER, second_moment="row", fused=fused)
    p.grad = dense_grad(p)
    opt.step()
    before = copy.deepcopy(opt)
    p.grad = dense_grad(p).to_sparse(2)
    set_grad(q, torch.ones(3, dtype=torch.int32))
    with pytest.raises(RuntimeError):
        opt.step()
    assert_same(opt, before)


ROW_WISE = [
    pytest.param(dict(second_moment="row"), id="row"),
    pytest.param(dict(second_moment="row", betas=(0.0, 0.9)), id="row-beta1-0"),
    pytest.param(dict(second_moment="row", lazy="decay"), id="row-decay"),
    pytest.param(dict(second_moment="row", rows="nonzero"), id="row-nonzero"),
]


def train(opt, first, last):
    """Take steps with gradients that depend on their number alone, of all kinds."""
    for k in range(first, last):
        generator = torch.Generator().manual_seed(k)
        for group in opt.param_groups:
            for p in group["params"]:
                grad = torch.randn(p.shape, generator=generator).to(p.dtype)
                if p.dim() > 1:
                    grad[torch.rand(len(p), generator=generator) < 0.5] = 0
                    if k % 3:
                        grad = grad.to_sparse(1)
                p.grad = grad
        opt.step()


def model_of(dtype=torch.float32):
    torch.manual_seed(5)
    return [parameter(9, 37, dtype=dtype), parameter(40, dtype=dtype)]


def adamw(options, fused, dtype=torch.float32):
    return AdamW(model_of(dtype), **{**HYPER, **options}, fused=fused)


@pytest.mark.parametrize("options", ROW_WISE)
def test_a_saved_run_goes_on_with_the_same_bits(fused, options):
    check_saved_run(lambda: adamw(options, fused))


def check_saved_run(make, make_other=None):
    whole, first = make(), make()
    train(whole, 0, 7)
    train(first, 0, 4)
    second = (make_other or make)()
    with torch.no_grad():
        for group, own in zip(first.param_groups, second.param_groups, strict=True):
            for p, q in zip(group["params"], own["params"], strict=True):
                q.copy_(p)
    second.load_state_dict(reloaded(first.state_dict()))
    copied, pickled = copy.deepcopy(first), pickle.loads(pickle.dumps(first))
    for opt in (first, second, copied, pickled):
        train(opt, 4, 7)
        assert_same(opt, whole)


def test_a_row_wise_state_costs_four_bytes_a_row(fused):
    p = parameter(1000, 64, dtype=torch.bfloat16)
    opt = AdamW([p], betas=(0.0, 0.9), second_moment="row", fused=fused)
    p.grad = sparse_grad(p, 50)
    opt.step()
    assert sum(t.nbytes for t in opt.state[p].values()) == 4 * 1000 + 8


LOADS = [
    ("row", [3, 4], ["first dimensions", "[3, 4, 2]", "second_moment='row'"], [3, 5]),
    ("row", None, ["first dimensions", "second_moment='row'"], []),
    ("element", None, ["parameter's shape [3, 4, 2]", "second_moment='element'"], [3]),
]


@pytest.mark.parametrize("second_moment,legal,said,shape", LOADS)
def test_loading_refuses_second_moments_of_another_shape(fused, second_moment, legal, said, shape):
    p = parameter(3, 4, 2)
    opt = AdamW([p], **HYPER, second_moment=second_moment, fused=fused)
    p.grad = dense_grad(p)
    opt.step()
    saved = copy.deepcopy(opt.state_dict())
    if legal is not None:
        saved["state"][0]["exp_avg_sq"] = torch.rand(legal)
        opt.load_state_dict(saved)
        assert opt.state[p]["exp_avg_sq"].shape == tuple(legal)
    before = copy.deepcopy(opt)
    saved["state"][0]["exp_avg_sq"] = torch.rand(shape)
    with pytest.raises(ValueError) as refused:
        opt.load_state_dict(saved)
    assert all(part in str(refused.value) for part in ["exp_avg_sq", str(shape), *said])
    assert_same(opt, before)


def test_loading_refuses_fewer_second_moments_than_clocks(fused):
    p = parameter(3, 4, 2)
    opt = AdamW([p], **HYPER, second_moment="row", lazy="decay", fused=fused)
    p.grad = dense_grad(p).to_sparse(2)
    opt.step()
    saved = copy.deepcopy(opt.state_dict())
    saved["state"][0]["exp_avg_sq"] = torch.rand(3)
    with pytest.raises(ValueError, match=r"exp_avg_sq: got \[3\], expected .*last_step, \[3, 4\]"):
        opt.load_state_dict(saved)


def test_dicts_from_before_are_of_element_wise_moments(fused):
    p = parameter(3, 4)
    opt = AdamW([p], **HYPER, fused=fused)
    p.grad = dense_grad(p)
    opt.step()
    saved = copy.deepcopy(opt.state_dict())
    del saved["param_groups"][0]["second_moment"]
    fresh = AdamW([parameter(3, 4)], second_moment="row", fused=fused)
    fresh.load_state_dict(saved)
    assert fresh.param_groups[0]["second_moment"] == "element"
    assert same_bits(states_of(fresh)[2], states_of(opt)[2])


def test_only_adamw_has_a_second_moment():
    with pytest.raises(TypeError, match=r"tiger has no option 'second_moment'"):
        Tiger([{"params": [parameter(3)], "second_moment": "row"}])
    for value in ("rows", None, 1, True):
        with pytest.raises(ValueError, match=r"^second_moment=.*expected 'element' or 'row'"):
            AdamW([parameter(3)], second_moment=value)
    group = {"params": [parameter(3, 4)], "algorithm": "adamw", "second_moment": "row"}
    assert Tiger([group]).param_groups[0]["second_moment"] == "row"


def test_the_state_of_rows_with_no_elements_stays_finite(fused):
    p = parameter(3, 0)
    opt = AdamW([p], **HYPER, second_moment="row", fused=fused)
    p.grad = dense_grad(p)
    opt.step()
    assert opt.state[p]["exp_avg_sq"].tolist() == [0.0] * 3


def test_health_reports_read_optimizers_with_small_state(fused):
    p = parameter(30, 4)
    opt = AdamW([p], **HYPER, second_moment="row", lazy="decay", rows="nonzero", fused=fused)
    p.grad = dense_grad(p)
    opt.step()
    (table,) = health_report(opt).tables.values()
    assert table.rows == 30 and clock_of(opt).history.steps == 1


# ------------------------------------------------------------------------- stochastic rounding

SEED = 0x123456789ABCDEF
GOLDEN = 0x9E3779B97F4A7C15
HALVES = {torch.bfloat16: "bfloat16", torch.float16: "float16"}
halves = pytest.mark.parametrize("dtype", HALVES, ids=HALVES.values())


def mixed(x):
    x %= 2**64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % 2**64
    return x ^ (x >> 31)


def random_bits(stream, t, position, unit, place, seed=SEED):
    key = mixed(mixed(mixed(seed + GOLDEN * stream) + GOLDEN * t) + GOLDEN * position)
    of_unit = mixed(key + GOLDEN * unit)
    x = (of_unit + place // 2 * 0x9E3779B9) % 2**32
    x = ((x ^ (x >> 16)) * 0x7FEB352D) % 2**32
    x ^= of_unit >> 32
    x = ((x ^ (x >> 15)) * 0x846CA68B) % 2**32
    x ^= x >> 16
    return x >> 16 if place % 2 else x % 2**16


def places_by_rows(shape):
    """Return (unit, place) of each element of a table, in the order of its indices."""
    dim = math.prod(shape[1:])
    return [(row, c) for row in range(shape[0]) for c in range(dim)]


def places_by_blocks(numel):
    return [(i // 256, i % 256) for i in range(numel)]


def rounded(exact, bits, dtype):
    """Return what a float64 number is rounded to; None where float32 may be on the other side."""
    size = abs(exact)
    small, parts, least = (
        (8, 2**16, 2.0**-126) if dtype == torch.bfloat16 else (11, 2**13, 2.0**-14)
    )
    gap = 2.0 ** (math.floor(math.log2(max(size, least))) - small + 1)
    steps, fraction = divmod(size / gap, 1.0)
    draw = (bits if dtype == torch.bfloat16 else bits >> 3) + (0.5 if size < least else 0)
    tolerance = 4e-4 * parts
    if not tolerance < fraction * parts < parts - tolerance:
        return None
    if abs(fraction * parts + draw - parts) < tolerance:
        return None
    return math.copysign(gap * (steps + (fraction * parts + draw >= parts)), exact)


def check_rounded(actual, exact, places, stream, t, position=0):
    """Check every element of a parameter against its float64 value before it was rounded."""
    certain = 0
    pairs = zip(actual.flatten().tolist(), np.asarray(exact).flatten(), places, strict=True)
    for got, value, (unit, place) in pairs:
        bits = random_bits(stream, t, position, unit, place)
        expected = rounded(float(value), bits, actual.dtype)
        if expected is not None:
            certain += 1
            assert got == expected, (got, value, unit, place)
    assert certain > 0.95 * actual.numel()


def test_the_random_bits_are_those_that_the_documents_define():
    # Once and for all: checkpoints depend on them.
    assert [random_bits(s, 1, 0, 2, 3) for s in range(3)] == [46580, 14531, 50880]


def momentum(p, state):
    """Return the first moment of a contiguous parameter in float64."""
    m = state["exp_avg"].double().numpy().copy()
    if "exp_avg_scale" in state:
        scale = state["exp_avg_scale"].double().numpy()
        if scale.shape == (-(-p.numel() // 256), 1):
            return m * np.repeat(scale, 256)[: p.numel()].reshape(m.shape)
        return m * scale.reshape(*scale.shape, *[1] * (m.ndim - scale.ndim))
    return m


class SignModel:
    """Steps of Lion, or of Tiger with one beta, each from what the optimizer has before it."""

    def __init__(self, opt, p):
        self.opt, self.p, self.group = opt, p, opt.param_groups[0]
        self.last = np.zeros(len(p), dtype=int)
        self.steps = 0
        self.beta1, self.beta2 = self.group["betas"][0], self.group["betas"][-1]

    def before(self):
        state = self.opt.state.get(self.p, {})
        self.m = momentum(self.p, state) if state else np.zeros(self.p.shape)
        self.theta = self.p.detach().double().numpy().copy()

    def catch_up(self, rows):
        lr, decay = self.group["lr"], 1 - self.group["lr"] * self.group["weight_decay"]
        for row in rows:
            for _ in range(self.steps - self.last[row]):
                if self.group["lazy"] == "exact":
                    self.theta[row] = decay * self.theta[row] - lr * np.sign(self.m[row])
                elif self.group["lazy"] == "decay":
                    self.theta[row] *= decay
                if self.group["lazy"] != "frozen":
                    self.m[row] *= self.beta2
            self.last[row] = self.steps

    def step(self, grads):
        """Return the rows after a step with the gradients ``{row: vector}``, unrounded."""
        self.catch_up(grads)
        self.steps += 1
        lr, decay = self.group["lr"], 1 - self.group["lr"] * self.group["weight_decay"]
        for row, g in grads.items():
            self.last[row] = self.steps
            c = self.beta1 * self.m[row] + (1 - self.beta1) * g
            self.theta[row] = decay * self.theta[row] - lr * np.sign(c)
            self.m[row] = self.beta2 * self.m[row] + (1 - self.beta2) * g
        return self.theta


SIGN_RULES = [(Tiger, (0.9,)), (Lion, (0.7, 0.95))]


def seeded(cls, params, **options):
    return cls([{"params": params, "rounding_seed": SEED}], stochastic_rounding=True, **options)


@halves
@pytest.mark.parametrize("cls,betas", SIGN_RULES, ids=["tiger", "lion"])
@pytest.mark.parametrize("lazy", ["frozen", "decay", "exact"])
@pytest.mark.parametrize("gradients", ["sparse", "nonzero"])
def test_rows_are_rounded_by_their_number_and_step(fused, dtype, cls, betas, lazy, gradients):
    p = parameter(12, 9, dtype=dtype)
    rows = "nonzero" if gradients == "nonzero" else None
    options = dict(lr=1e-3, betas=betas, weight_decay=0.5, lazy=lazy, rows=rows, fused=fused)
    opt = seeded(cls, [p], **options, momentum_dtype=torch.float32)
    model = SignModel(opt, p)
    for t in range(1, 6):
        model.before()
        grad = sparse_grad(p, 7, dtype=torch.float32).coalesce()
        set_grad(p, grad if rows is None else grad.to_dense())
        untouched = copy.deepcopy(p.detach())
        touched = rows_of(grad)
        exact = model.step(touched)
        opt.step()
        places = [place for place in places_by_rows(p.shape) if place[0] in touched]
        chosen = sorted(touched)
        check_rounded(p.detach()[chosen], exact[chosen], places, 0, t)
        others = [row for row in range(12) if row not in touched]
        assert same_bits(p.detach()[others], untouched[others])
        assert int(opt.state[p]["step"]) == t
    model.before()
    behind = [row for row in range(12) if model.last[row] < model.steps]
    model.catch_up(range(12))
    opt.flush()
    if lazy != "frozen":
        places = [place for place in places_by_rows(p.shape) if place[0] in behind]
        check_rounded(p.detach()[behind], model.theta[behind], places, 2, 5)


@halves
@pytest.mark.parametrize("cls,betas", SIGN_RULES, ids=["tiger", "lion"])
def test_dense_updates_are_rounded_by_their_place_in_memory(fused, dtype, cls, betas):
    p = Parameter(parameter(31, 20, dtype=dtype).detach().t())
    q = Parameter(torch.randn(9, 62, dtype=torch.float32).to(dtype)[:, ::2])
    options = dict(lr=1e-3, betas=betas, weight_decay=0.5, fused=fused)
    first = parameter(3, dtype=dtype)
    opt = cls([first], stochastic_rounding=True, **options)
    opt.add_param_group({"params": [q, p], "rounding_seed": SEED})
    opt.param_groups[1]["momentum_dtype"] = torch.float32
    for t in range(1, 4):
        expected = []
        for x in (q, p):
            model = SignModel(opt, x)
            model.before()
            set_grad(x, dense_grad(x, torch.float32))
            expected.append(model.step(rows_of(x.grad)))
        opt.step()
        check_rounded(q.detach(), expected[0], places_by_blocks(q.numel()), 0, t, position=1)
        check_rounded(p.detach().t(), expected[1].T, places_by_blocks(p.numel()), 0, t, position=2)


@halves
@pytest.mark.parametrize("gradients", ["dense", "sparse"])
def test_a_window_is_rounded_when_it_closes(fused, dtype, gradients):
    p = parameter(6, 50, dtype=dtype)
    options = dict(lr=1e-3, betas=(0.9,), weight_decay=0.5, accumulation_steps=2, fused=fused)
    opt = seeded(Tiger, [p], **options, momentum_dtype=torch.float32)
    for window in range(2):
        model = SignModel(opt, p)
        model.before()
        total = torch.zeros(6, 50)
        for k in range(2):
            grad = dense_grad(p, torch.float32)
            if gradients == "sparse":
                grad[2 * k + window :] = 0
                grad = grad.to_sparse(1)
            total += grad.to_dense()
            set_grad(p, grad)
            opt.step()
        touched = range(6) if gradients == "dense" else range(2 + window)
        exact = model.step(rows_of(total / 2, touched))[list(touched)]
        places = places_by_blocks(300)
        if gradients == "sparse":
            places = [place for place in places_by_rows(p.shape) if place[0] in touched]
        # Two micro-steps and the closing pass: each has a number of its own.
        check_rounded(p.detach()[list(touched)], exact, places, 0, 3 * (window + 1))
        assert int(opt.state[p]["step"]) == 3 * (window + 1)


@halves
def test_adamw_rounds_with_the_counter_that_it_has(fused, dtype):
    p = parameter(8, 7, dtype=dtype)
    options = dict(HYPER, lr=1e-3, momentum_dtype=torch.float32, second_moment="row")
    opt = seeded(AdamW, [p], **options, fused=fused)
    model = RowWiseAdamW(p.detach().double().numpy(), **dict(HYPER, lr=1e-3))
    for t in range(1, 4):
        model.p = p.detach().double().numpy().copy()
        grad = sparse_grad(p, 5, dtype=torch.float32).coalesce()
        set_grad(p, grad)
        touched = rows_of(grad)
        model.step(touched)
        opt.step()
        places = [place for place in places_by_rows(p.shape) if place[0] in touched]
        check_rounded(p.detach()[sorted(touched)], model.p[sorted(touched)], places, 0, t)


# (dtype, the value, its size after the decay of 1 - 2**-12)
MEANS = [
    pytest.param(torch.bfloat16, 1.0, id="bfloat16"),
    pytest.param(torch.bfloat16, -3.0e-39, id="bfloat16-subnormal"),
    pytest.param(torch.float16, -1.5, id="float16"),
    pytest.param(torch.float16, 300 * 2.0**-24, id="float16-subnormal"),
]


@pytest.mark.parametrize("dtype,value", MEANS)
@pytest.mark.parametrize("layout", ["dense", "sparse"])
def test_the_mean_of_rounded_numbers_is_right(fused, dtype, value, layout):
    value = float(torch.tensor(value, dtype=dtype))
    decay = 1 - 2.0**-12
    rows, dim, steps = 500, 500, 4
    p = Parameter(torch.empty(rows, dim, dtype=dtype))
    opt = Tiger([p], lr=2.0**-12, weight_decay=1.0, stochastic_rounding=True, fused=fused)
    draws = []
    for _ in range(steps):
        with torch.no_grad():
            p.fill_(value)
        p.grad = torch.zeros(rows, dim, dtype=dtype)
        if layout == "sparse":
            p.grad = coo(list(range(rows)), p.grad, p.shape)
        opt.step()
        draws.append(p.detach().double().clone())
    drawn = torch.stack(draws)
    exact = float(np.float32(value) * np.float32(decay))
    found = drawn.unique()
    assert len(found) == 2 and found.min() <= exact <= found.max()
    share = (exact - float(found[0])) / float(found[1] - found[0])
    ups = (drawn == found[1]).double()
    error = math.sqrt(share * (1 - share))
    assert abs(float(ups.mean()) - share) < 4 * error / math.sqrt(ups.numel())
    # What is drawn in one place says nothing of its neighbours, nor of the next step.
    centred = ups - share
    for first, second in (
        (centred[:, :, :-1], centred[:, :, 1:]),
        (centred[:, :-1], centred[:, 1:]),
        (centred[:-1], centred[1:]),
    ):
        product = first * second
        assert abs(float(product.mean())) < 4 * error**2 / math.sqrt(product.numel())


@halves
@pytest.mark.parametrize("layout", ["dense", "sparse"])
def test_numbers_that_can_be_stored_are_kept(fused, dtype, layout):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    p = Parameter(every.reshape(256, 256).clone())
    opt = Tiger([p], lr=0.0, stochastic_rounding=True, fused=fused)
    zeros = torch.zeros(256, 256)
    set_grad(p, zeros if layout == "dense" else coo(list(range(256)), zeros, p.shape))
    opt.step()
    before = every.reshape(256, 256)
    assert torch.equal(p.isnan(), before.isnan())
    numbers = ~before.isnan()
    assert same_bits(p.detach()[numbers], before[numbers])


def test_what_is_too_large_for_float16_becomes_inf(fused):
    p = Parameter(torch.full((4, 3), 60000.0, dtype=torch.float16))
    opt = Tiger([p], lr=1e6, weight_decay=0.0, stochastic_rounding=True, fused=fused)
    p.grad = torch.full((4, 3), -1.0, dtype=torch.float16)
    opt.step()
    assert (p == math.inf).all()


def test_small_steps_are_lost_by_nearest_rounding_alone(fused):
    results = {}
    for stochastic_rounding in (False, True):
        torch.manual_seed(3)
        p = Parameter(torch.ones(1000, dtype=torch.bfloat16))
        opt = Tiger(
            [p], lr=2.0**-12, weight_decay=0.0, fused=fused, stochastic_rounding=stochastic_rounding
        )
        for _ in range(64):
            p.grad = torch.ones(1000, dtype=torch.bfloat16)
            opt.step()
        results[stochastic_rounding] = float(p.detach().double().mean())
    assert results[False] == 1.0
    assert abs(results[True] - (1 - 64 * 2.0**-12)) < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_parameters_are_not_rounded(fused, dtype):
    runs = []
    for stochastic_rounding in (False, True):
        torch.manual_seed(4)
        p = parameter(5, 6, dtype=dtype)
        opt = Tiger([p], stochastic_rounding=stochastic_rounding, fused=fused)
        for _ in range(3):
            p.grad = sparse_grad(p, 4).coalesce()
            opt.step()
        runs.append((p.detach(), opt.state[p]["exp_avg"]))
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_what_does_not_happen_is_not_counted(fused):
    p = parameter(5, 6, dtype=torch.bfloat16)
    opt = Tiger([p], stochastic_rounding=True, nonfinite="skip", fused=fused)
    p.grad = dense_grad(p)
    opt.step()
    before = p.detach().clone()
    opt.grad_scale, opt.found_inf = torch.tensor(1.0), torch.tensor(1.0)
    opt.step()
    del opt.grad_scale, opt.found_inf
    p.grad = torch.full_like(p, math.nan)
    opt.step()
    p.grad = None
    opt.step()
    assert int(opt.state[p]["step"]) == 1 and same_bits(p.detach(), before)
    p.grad = coo([], torch.zeros(0, 6, dtype=torch.bfloat16), p.shape)
    opt.step()
    assert int(opt.state[p]["step"]) == 2 and same_bits(p.detach(), before)


def test_shrunk_parameters_are_rounded_too(fused):
    p = Parameter(torch.full((200, 50), 1.0, dtype=torch.bfloat16))
    opt = Tiger(
        [p],
        stochastic_rounding=True,
        nonfinite="shrink",
        shrink_ratio=1 - 2.0**-10,
        rows="nonzero",
        fused=fused,
    )
    p.grad = torch.full_like(p, math.nan)
    opt.step()
    found = p.detach().double()
    assert set(found.unique().tolist()) == {1.0, 1 - 2.0**-8}
    assert abs(float(found.mean()) - (1 - 2.0**-10)) < 4 * 2.0**-8 * math.sqrt(0.1875 / 1e4)


STOCHASTIC = [
    pytest.param(cls, dict(options, stochastic_rounding=True), id=f"{cls.__name__}-{name}")
    for cls in (Tiger, Lion, AdamW)
    for name, options in {
        "frozen": {},
        "decay": {"lazy": "decay"},
        "nonzero": {"rows": "nonzero"},
        "skip": {"nonfinite": "skip"},
    }.items()
] + [
    pytest.param(Tiger, dict(stochastic_rounding=True, accumulation_steps=3), id="accumulation"),
    pytest.param(Tiger, dict(stochastic_rounding=True, lazy="exact"), id="exact"),
    pytest.param(Tiger, dict(stochastic_rounding=True, scale="rms_rows"), id="rms_rows"),
]


@pytest.mark.parametrize("cls,options", STOCHASTIC)
def test_a_saved_run_is_rounded_as_if_uninterrupted(fused, cls, options):
    def make(seed=1):
        params = model_of(torch.bfloat16)
        torch.manual_seed(seed)
        return cls(params, **options, fused=fused)

    check_saved_run(make, lambda: make(2))


def test_the_number_of_threads_does_not_matter(fused):
    runs = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        torch.manual_seed(6)
        params = [parameter(300, 64, dtype=torch.bfloat16), parameter(40000, dtype=torch.float16)]
        opt = Lion(params, stochastic_rounding=True, fused=fused)
        train(opt, 0, 4)
        runs.append(opt)
    for other in runs[1:]:
        assert_same(runs[0], other)


def test_the_seed_is_torchs_unless_the_group_has_one(fused):
    torch.manual_seed(77)
    options = dict(stochastic_rounding=True, fused=fused)
    assert Tiger([parameter(3)], **options).param_groups[0]["rounding_seed"] == 77
    assert "rounding_seed" not in Tiger([parameter(3)]).param_groups[0]
    torch.manual_seed(-1)
    seed = Lion([parameter(3)], **options).param_groups[0]["rounding_seed"]
    assert 0 <= seed < 2**63
    opt = AdamW([{"params": [parameter(3)], "rounding_seed": np.int64(5)}], **options)
    assert type(opt.param_groups[0]["rounding_seed"]) is int
    saved = reloaded(opt.state_dict())
    torch.manual_seed(78)
    other = AdamW([parameter(3)], **options)
    other.load_state_dict(saved)
    assert other.param_groups[0]["rounding_seed"] == 5
    del saved["param_groups"][0]["rounding_seed"]
    other.load_state_dict(saved)
    assert other.param_groups[0]["rounding_seed"] == 78
    late = Tiger([parameter(3)], fused=fused)
    (p,) = late.param_groups[0]["params"]
    late.param_groups[0]["stochastic_rounding"] = True
    p.grad = torch.ones(3)
    late.step()
    assert late.param_groups[0]["rounding_seed"] == 78 and int(late.state[p]["step"]) == 1


@pytest.mark.parametrize("value", [-1, 2**63, 1.0, True, "1", None])
def test_other_seeds_are_refused(value):
    with pytest.raises(ValueError, match=r"^rounding_seed=.*integer >= 0"):
        Tiger([{"params": [parameter(3)], "rounding_seed": value}], stochastic_rounding=True)
    opt = Tiger([parameter(3)], stochastic_rounding=True)
    saved = copy.deepcopy(opt.state_dict())
    saved["param_groups"][0]["rounding_seed"] = value
    with pytest.raises(ValueError, match=r"group 0: rounding_seed=.*integer >= 0"):
        opt.load_state_dict(saved)


@pytest.mark.parametrize("cls", [Tiger, Lion, AdamW])
@pytest.mark.parametrize("value", [1, None, "yes", torch.tensor(True)])
def test_stochastic_rounding_is_a_flag(cls, value):
    with pytest.raises(ValueError, match=r"^stochastic_rounding=.*expected True or False"):
        cls([parameter(3)], stochastic_rounding=value)


# ------------------------------------------------------------------------------- int8 momentum


def check_quantised(q, scale, exact, units, stream, t, position=0):
    """Check int8 numbers ``[units, n]`` and their scales against the float64 values."""
    exact = np.asarray(exact, dtype=np.float64)
    assert q.dtype == torch.int8 and scale.dtype == torch.float32
    certain = 0
    for numbers, s, values, unit in zip(q.tolist(), scale.tolist(), exact, units, strict=True):
        largest = np.abs(values).max()
        assert s == pytest.approx(max(largest / 127, 2.0**-126) if largest > 0 else 0, rel=1e-5)
        for place, (number, value) in enumerate(zip(numbers, values, strict=True)):
            if s == 0:
                assert number == 0
                continue
            draw = (random_bits(stream, t, position, unit, place) + 0.5) / 65536
            y = value / s + draw
            if abs(y - round(y)) > 2e-3:
                certain += 1
                assert number == min(max(math.floor(y), -127), 127), (unit, place, y)
    assert certain > 0.95 * sum(n for s, n in zip(scale.tolist(), [q.shape[1]] * len(q)) if s > 0)


def seeded_int8(cls, params, **options):
    return cls([{"params": params, "rounding_seed": SEED}], momentum_dtype=torch.int8, **options)


@pytest.mark.parametrize("cls,betas", SIGN_RULES, ids=["tiger", "lion"])
@pytest.mark.parametrize("lazy", ["frozen", "decay", "exact"])
@pytest.mark.parametrize("gradients", ["sparse", "nonzero", "strided"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_int8_momentum_has_a_scale_for_each_row(fused, cls, betas, lazy, gradients, dtype):
    p = parameter(12, 9, dtype=dtype)
    rows = "nonzero" if gradients == "nonzero" else None
    options = dict(lr=1e-3, betas=betas, weight_decay=0.5, lazy=lazy, rows=rows, fused=fused)
    opt = seeded_int8(cls, [p], **options)
    model = SignModel(opt, p)
    for t in range(1, 6):
        model.before()
        grad = sparse_grad(p, 7).coalesce()
        touched = rows_of(grad)
        if gradients == "strided" and t > 1:  # after a sparse one it goes by rows, too
            touched = rows_of(grad.to_dense())
        p.grad = grad if gradients == "sparse" or (t == 1 and rows is None) else grad.to_dense()
        before = copy.deepcopy(opt.state[p]) if t > 1 else None
        exact = model.step(touched)
        opt.step()
        state, chosen = opt.state[p], sorted(touched)
        assert state["exp_avg"].shape == p.shape and state["exp_avg_scale"].shape == (12,)
        tolerance = 1e-12 if dtype == torch.float64 else 1e-6
        np.testing.assert_allclose(p.detach().numpy()[chosen], exact[chosen], atol=tolerance)
        q, scale = state["exp_avg"][chosen], state["exp_avg_scale"][chosen]
        check_quantised(q, scale, model.m[chosen], chosen, 1, t)
        others = [row for row in range(12) if row not in touched]
        if before:
            for name in ("exp_avg", "exp_avg_scale"):
                assert same_bits(state[name][others], before[name][others])
        assert int(state["step"]) == t
    model.before()
    model.catch_up(range(12))
    q = opt.state[p]["exp_avg"].clone()
    opt.flush()
    assert same_bits(opt.state[p]["exp_avg"], q)
    np.testing.assert_allclose(momentum(p, opt.state[p]), model.m, rtol=1e-5)
    np.testing.assert_allclose(p.detach().numpy(), model.theta, atol=1e-6)


@pytest.mark.parametrize("cls,betas", SIGN_RULES, ids=["tiger", "lion"])
def test_an_int8_momentum_has_a_scale_for_each_block(fused, cls, betas):
    p = parameter(30, 20)
    opt = seeded_int8(cls, [parameter(2), p], lr=1e-3, betas=betas, weight_decay=0.5, fused=fused)
    model = SignModel(opt, p)
    for t in range(1, 5):
        model.before()
        p.grad = dense_grad(p)
        exact = model.step(rows_of(p.grad))
        opt.step()
        state = opt.state[p]
        np.testing.assert_allclose(p.detach().numpy(), exact, atol=1e-6)
        assert state["exp_avg_scale"].shape == (3, 1)
        scale = state["exp_avg_scale"][:, 0]
        values, q = model.m.reshape(-1), state["exp_avg"].reshape(-1)
        check_quantised(
            q[:512].reshape(2, 256),
            scale[:2],
            values[:512].reshape(2, 256),
            [0, 1],
            1,
            t,
            position=1,
        )
        check_quantised(q[None, 512:], scale[2:], values[None, 512:], [2], 1, t, position=1)


# A parameter of 600 elements that lies in memory in a certain way, and the elements in that order.
LAYOUTS = {
    "transposed": (lambda t: t.reshape(30, 20).t(), lambda t: t.t()),
    "every-second": (
        lambda t: torch.stack([t, t], -1).reshape(30, 40)[:, ::2],
        lambda t: t,
    ),
    "channels-last": (
        lambda t: t.reshape(5, 6, 10, 2).to(memory_format=torch.channels_last),
        lambda t: t.permute(0, 2, 3, 1),
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_blocks_are_of_neighbours_in_memory(fused, layout):
    laid_out, in_order = LAYOUTS[layout]
    p = Parameter(laid_out(torch.randn(600)))
    flat = Parameter(in_order(p.detach()).reshape(-1).clone())
    opt, other = (seeded_int8(Tiger, [x], fused=fused) for x in (p, flat))
    for _ in range(3):
        p.grad = torch.randn(p.shape)
        flat.grad = in_order(p.grad).reshape(-1).clone()
        opt.step()
        other.step()
    expected = other.state[flat]
    assert same_bits(in_order(opt.state[p]["exp_avg"]).reshape(-1), expected["exp_avg"])
    assert same_bits(opt.state[p]["exp_avg_scale"], expected["exp_avg_scale"])
    assert same_bits(in_order(p.detach()).reshape(-1), flat.detach())


def test_a_parameter_that_is_laid_out_anew_keeps_its_int8_momentum(fused):
    p = parameter(5, 7, 4, 4)
    opt = seeded_int8(Tiger, [p], lr=0.0, betas=(0.5,), fused=fused)
    p.grad = dense_grad(p)
    opt.step()
    expected = torch.tensor(momentum(p, opt.state[p]))
    largest = float(opt.state[p]["exp_avg_scale"].max())
    p.data = p.data.to(memory_format=torch.channels_last)
    p.grad = torch.zeros_like(p)
    opt.step()
    state = opt.state[p]
    assert state["exp_avg"].is_contiguous(memory_format=torch.channels_last)
    flat = Parameter(p.detach().permute(0, 2, 3, 1).reshape(-1))
    blocks = {
        "exp_avg": state["exp_avg"].permute(0, 2, 3, 1).reshape(-1),
        "exp_avg_scale": state["exp_avg_scale"],
    }
    found = torch.tensor(momentum(flat, blocks)).reshape(5, 4, 4, 7).permute(0, 3, 1, 2)
    assert float((found - 0.5 * expected).abs().max()) <= 2 * largest


@pytest.mark.parametrize("gradients", ["dense", "sparse"])
def test_a_window_gathers_in_int8(fused, gradients):
    p = parameter(6, 50)
    options = dict(lr=1e-3, betas=(0.9,), weight_decay=0.5, accumulation_steps=2, fused=fused)
    opt = seeded_int8(Tiger, [p], **options)
    theta = p.detach().double().numpy().copy()
    for window in range(2):
        for k in range(2):
            old = momentum(p, opt.state[p]) if opt.state.get(p) else np.zeros((6, 50))
            grad = dense_grad(p)
            touched = range(6)
            if gradients == "sparse":
                touched = range(2 + window)
                grad[2 + window :] = 0
                grad = grad[: 2 + window].clone()
                grad = torch.sparse_coo_tensor([list(touched)], grad, p.shape)
            p.grad = grad
            new = old.copy()
            for row, g in rows_of(grad, touched).items():
                new[row] = (0.9 if k == 0 else 1.0) * old[row] + 0.1 * g / 2
            before = p.detach().clone()
            opt.step()
            t = 3 * window + k + 1
            state, chosen = opt.state[p], list(touched)
            if gradients == "sparse":
                q, scale = state["exp_avg"][chosen], state["exp_avg_scale"][chosen]
                check_quantised(q, scale, new[chosen], chosen, 1, t)
            else:
                q, values = state["exp_avg"].reshape(-1), new.reshape(-1)
                check_quantised(
                    q[None, :256], state["exp_avg_scale"][0], values[None, :256], [0], 1, t
                )
            assert k == 1 or same_bits(p.detach(), before)
        m = momentum(p, opt.state[p])
        theta[chosen] = (1 - 5e-4) * theta[chosen] - 1e-3 * np.sign(m[chosen])
        np.testing.assert_allclose(p.detach().numpy(), theta, atol=1e-6)


def test_adamw_keeps_its_first_moment_in_int8(fused):
    p = parameter(8, 7)
    opt = seeded_int8(AdamW, [p], **HYPER, second_moment="row", fused=fused)
    model = RowWiseAdamW(p.detach().double().numpy(), **HYPER)
    for t in range(1, 4):
        if t > 1:
            model.m = momentum(p, opt.state[p])
        p.grad = sparse_grad(p, 6).coalesce()
        touched = rows_of(p.grad)
        model.step(touched)
        opt.step()
        chosen, state = sorted(touched), opt.state[p]
        check_quantised(
            state["exp_avg"][chosen], state["exp_avg_scale"][chosen], model.m[chosen], chosen, 1, t
        )
        np.testing.assert_allclose(p.detach().numpy(), model.p, atol=1e-5)
    for beta1, names in ((0.5, {"exp_avg", "exp_avg_scale"}), (0.0, set())):
        p = parameter(3, 4, dtype=torch.bfloat16)
        opt = AdamW([p], betas=(beta1, 0.9), momentum_dtype=torch.int8, fused=fused)
        p.grad = dense_grad(p)
        opt.step()
        assert opt.state[p].keys() == {"exp_avg_sq", "step", *names}
        assert opt.state[p]["exp_avg_sq"].dtype == torch.float32


@pytest.mark.parametrize("layout", ["dense", "sparse"])
def test_the_mean_of_an_int8_momentum_is_right(fused, layout):
    rows, dim = 1024, 1024
    p = Parameter(torch.zeros(rows, dim))
    opt = Tiger([p], lr=0.0, betas=(0.0,), momentum_dtype=torch.int8, fused=fused)
    g = torch.full((rows, dim), 12.3)
    g[:, ::256] = 127.0
    p.grad = g if layout == "dense" else coo(list(range(rows)), g, p.shape)
    opt.step()
    m = opt.state[p]["exp_avg"].double()
    assert (opt.state[p]["exp_avg_scale"] == 1).all()
    assert (m[:, ::256] == 127).all()
    drawn = m[g != 127]
    assert set(drawn.unique().tolist()) == {12.0, 13.0}
    share = float(np.float32(12.3)) - 12
    error = math.sqrt(share * (1 - share) / drawn.numel())
    assert drawn.numel() > 1e6 and abs(float(drawn.mean()) - 12 - share) < 4 * error


def test_an_int8_momentum_keeps_what_it_can_hold(fused):
    p = Parameter(torch.zeros(3, 255))
    opt = Tiger([p], lr=0.0, betas=(0.0,), momentum_dtype=torch.int8, rows="nonzero", fused=fused)
    numbers = torch.arange(-127, 128).float()
    p.grad = torch.stack([numbers * 2.0**-20, numbers * 2.0**90, 0 * numbers])
    opt.step()
    state = opt.state[p]
    assert state["exp_avg_scale"].tolist() == [2.0**-20, 2.0**90, 0.0]
    assert torch.equal(state["exp_avg"][0].float(), numbers)
    assert torch.equal(state["exp_avg"][1].float(), numbers)
    assert not state["exp_avg"][2].any()


def test_the_smallest_int8_momenta_are_subnormal_numbers_no_more(fused):
    p = Parameter(torch.zeros(2, 5))
    opt = Tiger([p], lr=0.0, betas=(0.0,), momentum_dtype=torch.int8, rows="nonzero", fused=fused)
    p.grad = torch.tensor([[1e-44] * 5, [2.0**-120] * 5])
    opt.step()
    state = opt.state[p]
    assert float(state["exp_avg_scale"][0]) == 2.0**-126
    assert state["exp_avg"][0].max() <= 1 and float(state["exp_avg_scale"][1]) == 2.0**-126
    assert (state["exp_avg"][1] == 64).all()


@pytest.mark.parametrize("lazy", ["decay", "exact"])
def test_an_int8_momentum_that_decays_keeps_its_signs(fused, lazy):
    p = Parameter(torch.zeros(2, 3))
    opt = Tiger(
        [p],
        lr=1e-3,
        betas=(0.5,),
        weight_decay=0.0,
        lazy=lazy,
        momentum_dtype=torch.int8,
        fused=fused,
    )
    p.grad = coo([0, 1], [[1.0, -1.0, 0.0]] * 2, p.shape)
    opt.step()
    q = opt.state[p]["exp_avg"][0].clone()
    for _ in range(200):
        p.grad = coo([1], torch.ones(1, 3), p.shape)
        opt.step()
    opt.flush()
    state = opt.state[p]
    assert float(state["exp_avg_scale"][0]) == 2.0**-126 and same_bits(state["exp_avg"][0], q)
    expected = 0.001 if lazy == "decay" else 0.201
    torch.testing.assert_close(p.detach()[0], torch.tensor([-expected, expected, 0.0]))


@pytest.mark.parametrize("nonfinite", ["propagate", "skip", "shrink", "raise"])
@pytest.mark.parametrize("layout", ["sparse", "strided"])
def test_nonfinite_rows_of_an_int8_momentum(fused, nonfinite, layout):
    p = parameter(4, 3)
    options = dict(nonfinite=nonfinite, shrink_ratio=0.5, momentum_dtype=torch.int8, fused=fused)
    opt = Tiger([p], rows="nonzero", **options)
    p.grad = dense_grad(p)
    opt.step()
    set_bad_grad(p, layout, math.nan)
    before = copy.deepcopy(opt)
    (old,) = before.param_groups[0]["params"]
    if nonfinite == "raise":
        with pytest.raises(FloatingPointError):
            opt.step()
        assert_same(opt, before)
        return
    opt.step()
    q, scale = opt.state[p]["exp_avg"], opt.state[p]["exp_avg_scale"]
    assert scale[[0, 2, 3]].isfinite().all() and p[[0, 2, 3]].isfinite().all()
    if nonfinite == "propagate":
        assert math.isnan(scale[1]) and not q[1].any()
        assert p[1].isnan().tolist() == [False, False, True]
        p.grad = torch.ones(4, 3)
        opt.step()  # all of the row is NaN: that is never hidden
        assert p[1].isnan().all() and p[[0, 2, 3]].isfinite().all()
    else:
        assert same_bits(q[1], before.state[old]["exp_avg"][1])
        assert same_bits(scale[1], before.state[old]["exp_avg_scale"][1])


def test_the_first_sparse_gradient_gives_each_row_a_scale(fused):
    p = parameter(30, 20)
    opt = seeded_int8(Tiger, [p], lr=0.0, betas=(0.5,), fused=fused)
    p.grad = dense_grad(p)
    opt.step()
    old = momentum(p, opt.state[p])
    p.grad = coo([], torch.zeros(0, 20), p.shape)
    opt.step()
    state = opt.state[p]
    assert state["exp_avg_scale"].shape == (30,)
    check_quantised(state["exp_avg"], state["exp_avg_scale"], old, range(30), 5, 2)
    old = momentum(p, state)
    p.grad = torch.zeros(30, 20)
    opt.step()  # by rows, all of them
    assert state["exp_avg_scale"].shape == (30,)
    check_quantised(state["exp_avg"], state["exp_avg_scale"], 0.5 * old, range(30), 1, 3)


def test_scales_are_divided_anew_with_the_rows(fused):
    p = parameter(4, 5, 6)
    opt = seeded_int8(Tiger, [p], lr=0.0, betas=(0.5,), lazy="decay", fused=fused)
    p.grad = dense_grad(p)
    opt.step()
    m = momentum(p, opt.state[p])
    for t, dims in enumerate((2, 1, 3, 2), start=2):
        none = torch.zeros(dims, 0, dtype=torch.int64)
        values = torch.zeros(0, *p.shape[dims:])
        p.grad = torch.sparse_coo_tensor(none, values, p.shape)
        opt.step()
        state = opt.state[p]
        assert state["exp_avg_scale"].shape == p.shape[:dims] == state["last_step"].shape
        rows = math.prod(p.shape[:dims])
        # All rows have caught up with the steps before this one.
        m = m * (0.5 if t > 2 else 1.0)
        q, scale = state["exp_avg"].reshape(rows, -1), state["exp_avg_scale"].reshape(-1)
        check_quantised(q, scale, m.reshape(rows, -1), range(rows), 5, t)
        m = momentum(p, state)


@pytest.mark.parametrize("cls", [Tiger, Lion, AdamW])
@pytest.mark.parametrize("layout", ["strided", "sparse"])
def test_a_changed_momentum_dtype_keeps_the_momentum(fused, cls, layout):
    p = parameter(6, 40)
    opt = cls([p], lr=0.0, fused=fused)

    def step():
        p.grad = torch.zeros(6, 40) if layout == "strided" else coo([], torch.zeros(0, 40), p.shape)
        opt.step()

    p.grad = dense_grad(p)
    opt.step()
    step()
    old = opt.state[p]["exp_avg"].clone()
    opt.param_groups[0]["momentum_dtype"] = torch.int8
    step()
    state = opt.state[p]
    beta = opt.param_groups[0]["betas"][0 if cls is AdamW else -1]
    factor = beta if layout == "strided" else 1.0
    assert state["exp_avg"].dtype == torch.int8
    found = momentum(p, state)
    np.testing.assert_allclose(
        found, factor * old.double().numpy(), atol=float(old.abs().max()) / 60
    )
    opt.param_groups[0]["momentum_dtype"] = torch.float32
    step()
    assert "exp_avg_scale" not in opt.state[p]
    torch.testing.assert_close(opt.state[p]["exp_avg"].double(), torch.tensor(found) * factor)


INT8 = [
    pytest.param(cls, dict(options, momentum_dtype=torch.int8), id=f"{cls.__name__}-{name}")
    for cls in (Tiger, Lion, AdamW)
    for name, options in {
        "frozen": {},
        "decay": {"lazy": "decay"},
        "nonzero": {"rows": "nonzero"},
        "stochastic": {"stochastic_rounding": True},
    }.items()
] + [
    pytest.param(Tiger, dict(momentum_dtype=torch.int8, accumulation_steps=3), id="accumulation"),
    pytest.param(Tiger, dict(momentum_dtype=torch.int8, lazy="exact"), id="exact"),
    pytest.param(Tiger, dict(momentum_dtype=torch.int8, scale="rms_rows"), id="rms_rows"),
    pytest.param(Tiger, dict(momentum_dtype=torch.int8, scale="rms"), id="rms"),
    pytest.param(
        Tiger,
        dict(momentum_dtype=torch.int8, lazy="decay", accumulation_steps=2),
        id="decay-accumulation",
    ),
    pytest.param(
        AdamW, dict(momentum_dtype=torch.int8, second_moment="row", lazy="decay"), id="row-decay"
    ),
]


@pytest.mark.parametrize("cls,options", INT8)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_run_with_int8_momentum_goes_on_with_the_same_bits(fused, cls, options, dtype):
    check_saved_run(lambda: cls(model_of(dtype), **options, fused=fused))


def test_threads_do_not_matter_to_int8_momenta(fused):
    runs = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        torch.manual_seed(6)
        params = [parameter(100, 64), parameter(40000)]
        opt = Lion(params, momentum_dtype=torch.int8, fused=fused)
        train(opt, 0, 3)
        runs.append(opt)
    assert_same(*runs)


@pytest.mark.parametrize("dim", [64, 256])
@pytest.mark.parametrize("layout", ["dense", "sparse"])
def test_an_int8_momentum_costs_little_more_than_a_byte(fused, dim, layout):
    p = parameter(1000, dim)
    opt = Tiger([p], momentum_dtype=torch.int8, fused=fused)
    p.grad = dense_grad(p) if layout == "dense" else sparse_grad(p, 30)
    opt.step()
    assert sum(t.nbytes for t in opt.state[p].values()) <= 0.28 * p.nbytes


def spoil(saved, **changes):
    state = saved["state"][0]
    for name, value in changes.items():
        if value is None:
            state.pop(name)
        else:
            state[name] = value
    return saved


def int8_optimizer(fused, **options):
    p = parameter(30, 20)
    opt = Tiger([p], momentum_dtype=torch.int8, **options, fused=fused)
    p.grad = dense_grad(p)
    opt.step()
    return opt


BAD_SCALES = {
    "shape": (
        dict(exp_avg_scale=torch.ones(29)),
        r"exp_avg_scale: got \[29\].*\[30, 20\].*\[3, 1\]",
    ),
    "blocks": (dict(exp_avg_scale=torch.ones(4, 1)), r"exp_avg_scale: got \[4, 1\]"),
    "dtype": (dict(exp_avg_scale=torch.ones(30, dtype=torch.int64)), r"got torch.int64, expected"),
    "number": (dict(exp_avg_scale=1.0), r"exp_avg_scale: got 'float'"),
    "missing": (dict(exp_avg_scale=None), r"exp_avg_scale: got None, expected a tensor"),
    "float": (dict(exp_avg=torch.ones(30, 20)), r"exp_avg: got torch.float32, expected torch.int8"),
    "alone": (dict(exp_avg=None), r"exp_avg: got None, expected torch.int8"),
    "size": (dict(exp_avg=torch.ones(30, 21, dtype=torch.int8)), r"exp_avg: got \[30, 21\]"),
    "uint8": (dict(exp_avg=torch.ones(30, 20, dtype=torch.uint8)), r"exp_avg: got torch.uint8"),
}


@pytest.mark.parametrize("case", BAD_SCALES)
def test_loading_refuses_int8_momenta_that_do_not_fit(fused, case):
    changes, said = BAD_SCALES[case]
    opt = int8_optimizer(fused)
    before = copy.deepcopy(opt)
    with pytest.raises(ValueError, match=rf"load_state_dict: parameter .*{said}"):
        opt.load_state_dict(spoil(copy.deepcopy(opt.state_dict()), **changes))
    assert_same(opt, before)


@pytest.mark.parametrize(
    ("cls", "options"),
    [(AdamW, {"second_moment": "row"}), (Lion, {"momentum_dtype": torch.int8})],
)
@pytest.mark.parametrize("fused", [None, False], ids=["native", "reference"])
def test_a_frozen_groups_state_loads_where_its_clocks_had_more_rows(fused, cls, options):
    p = Parameter(torch.ones(3, 2))
    opt = cls([p], lr=0.1, lazy="decay", fused=fused, **options)
    p.grad = torch.sparse_coo_tensor([[0], [1]], [1.0], (3, 2))
    opt.step()
    opt.flush()
    opt.param_groups[0]["lazy"] = "frozen"
    p.grad = torch.sparse_coo_tensor([[0]], [[1.0, 2.0]], (3, 2))
    opt.step()
    assert opt.state[p]["last_step"].shape == (3, 2)
    q = Parameter(p.detach().clone())
    loaded = cls([q], lr=0.1, fused=fused, **options)
    loaded.load_state_dict(copy.deepcopy(opt.state_dict()))
    for each, parameter_ in ((opt, p), (loaded, q)):
        for lazy in ("frozen", "decay", "decay"):
            each.param_groups[0]["lazy"] = lazy
            parameter_.grad = torch.sparse_coo_tensor([[0]], [[1.0, 2.0]], (3, 2))
            each.step()
    assert same_bits(p.detach(), q.detach())
    assert opt.state[p]["last_step"].shape == loaded.state[q]["last_step"].shape == (3,)


def test_loading_refuses_scales_of_fewer_rows_than_clocks(fused):
    opt = int8_optimizer(fused, lazy="decay")
    saved = spoil(copy.deepcopy(opt.state_dict()), exp_avg_scale=torch.ones(3, 1))
    with pytest.raises(ValueError, match=r"exp_avg_scale: got \[3, 1\].*last_step, \[30\]"):
        opt.load_state_dict(saved)


def test_loading_refuses_int8_momenta_of_groups_that_have_none(fused):
    opt = int8_optimizer(fused)
    saved = copy.deepcopy(opt.state_dict())
    saved["param_groups"][0]["momentum_dtype"] = None
    with pytest.raises(ValueError, match=r"exp_avg: got torch.int8.*momentum_dtype=None"):
        opt.load_state_dict(saved)


def test_a_dict_with_float_momenta_may_go_on_in_int8(fused):
    p = parameter(30, 20)
    opt = Tiger([p], fused=fused)
    p.grad = dense_grad(p)
    opt.step()
    saved = copy.deepcopy(opt.state_dict())
    saved["param_groups"][0]["momentum_dtype"] = torch.int8
    opt.load_state_dict(saved)
    opt.step()
    assert opt.state[p]["exp_avg"].dtype == torch.int8
    assert opt.state[p]["exp_avg_scale"].shape == (3, 1)


def test_a_step_refuses_an_int8_momentum_without_its_scales(fused):
    opt = int8_optimizer(fused)
    (p,) = opt.param_groups[0]["params"]
    before = p.detach().clone()
    scale = opt.state[p].pop("exp_avg_scale")
    with pytest.raises(RuntimeError, match=r"exp_avg_scale"):
        opt.step()
    opt.state[p]["exp_avg_scale"] = scale[:2]
    with pytest.raises(RuntimeError, match=r"exp_avg_scale.*\[2, 1\]"):
        opt.step()
    assert same_bits(p.detach(), before)


@pytest.mark.parametrize("cls", [Tiger, Lion, AdamW])
@pytest.mark.parametrize("value", [torch.uint8, torch.int16, torch.float64, "int8"])
def test_other_momentum_dtypes_are_refused(cls, value):
    with pytest.raises(ValueError, match=r"^momentum_dtype=.*torch\.float16 or torch\.int8"):
        cls([parameter(3)], momentum_dtype=value)


# ---------------------------------------------------------------------------------- kernels

SMALL = [
    pytest.param(AdamW, dict(second_moment="row"), id="row"),
    pytest.param(Tiger, dict(stochastic_rounding=True), id="stochastic"),
    pytest.param(Lion, dict(momentum_dtype=torch.int8), id="int8"),
]


@pytest.mark.parametrize("cls,options", SMALL)
def test_there_are_kernels_for_small_state(cls, options):
    p = parameter(4, 3, dtype=torch.bfloat16)
    opt = cls([p], **options, fused=True)
    assert opt._step_supports_amp_scaling
    for grad in (dense_grad(p), sparse_grad(p, 5)):
        p.grad = grad
        opt.step()  # raises where there is none


@pytest.mark.parametrize("cls,options", SMALL)
def test_groups_with_small_state_stand_beside_others(fused, cls, options):
    p, q = parameter(4, 3, dtype=torch.bfloat16), parameter(4, 3)
    opt = cls([{"params": [p], **options}, {"params": [q]}], fused=fused)
    alone = copy.deepcopy(q)
    other = cls([alone], fused=fused)
    for _ in range(3):
        p.grad, q.grad = dense_grad(p), dense_grad(q)
        alone.grad = q.grad.clone()
        opt.step()
        other.step()
    assert same_bits(q.detach(), alone.detach())
    assert opt.state[q].keys() == other.state[alone].keys()


@pytest.mark.parametrize("cls", [Tiger, AdamW])
def test_scales_of_rows_and_of_blocks_are_never_mistaken_for_each_other(fused, cls):
    p = parameter(3, 1, 250)  # as many blocks as rows, of whatever dimensions
    opt = cls([p], lr=0.0, momentum_dtype=torch.int8, fused=fused)
    p.grad = dense_grad(p)
    opt.step()
    state, m = opt.state[p], p.grad * (1 - opt.param_groups[0]["betas"][0])
    scale = state["exp_avg_scale"].flatten()
    blocks = scale.repeat_interleave(256)[:750].reshape(p.shape)
    assert float((state["exp_avg"] * blocks - m).abs().max()) <= float(scale.max()) * 1.001
    p.grad = torch.sparse_coo_tensor(torch.zeros(2, 0).long(), torch.zeros(0, 250), p.shape)
    opt.step()
    assert state["exp_avg_scale"].shape == (3, 1)
    rows = state["exp_avg_scale"][..., None]
    assert float((state["exp_avg"] * rows - m).abs().max()) <= float(scale.max()) * 2.002
    check = copy.deepcopy(state)
    p.grad = torch.sparse_coo_tensor(torch.zeros(2, 0).long(), torch.zeros(0, 250), p.shape)
    opt.step()
    assert all(same_bits(state[name], check[name]) for name in ("exp_avg", "exp_avg_scale"))


def test_a_row_wise_second_moment_has_an_int8_momentum_by_rows(fused):
    p = parameter(4, 300)
    opt = AdamW([p], second_moment="row", momentum_dtype=torch.int8, fused=fused)
    for _ in range(2):
        p.grad = dense_grad(p)
        opt.step()
    assert opt.state[p]["exp_avg_scale"].shape == opt.state[p]["exp_avg_sq"].shape == (4,)


@pytest.mark.parametrize("frozen", [False, True], ids=["trains", "frozen"])
def test_a_dtype_that_is_changed_before_a_flush_or_a_thaw_is_heeded(fused, frozen):
    p = parameter(6, 5)
    opt = Tiger([p], lazy="decay", momentum_dtype=torch.int8, fused=fused)
    p.grad = coo([0, 1], torch.ones(2, 5), p.shape)
    opt.step()
    p.grad = None
    opt.step()
    if frozen:
        p.requires_grad_(False)
        opt.step()
    opt.param_groups[0]["momentum_dtype"] = None
    opt.flush()
    p.requires_grad_(True)
    p.grad = coo([0], torch.zeros(1, 5), p.shape)
    opt.step()
    opt.flush()
    m = opt.state[p]["exp_avg"]
    assert m.dtype == torch.float32 and "exp_avg_scale" not in opt.state[p]
    torch.testing.assert_close(m[:2], torch.full((2, 5), (1 - 0.965) * 0.965**2))


def test_a_window_may_close_after_its_dtype_has_changed(fused):
    p = parameter(6, 5)
    opt = Tiger([p], accumulation_steps=3, momentum_dtype=torch.int8, fused=fused)
    p.grad = dense_grad(p)
    opt.step()
    before = p.detach().clone()
    opt.param_groups[0]["momentum_dtype"] = None
    opt.close_window()
    assert opt.state[p]["exp_avg"].dtype == torch.float32
    moved = before * (1 - 1e-5) - 1e-3 * opt.state[p]["exp_avg"].sign()
    torch.testing.assert_close(p.detach(), moved)


# ------------------------------------------------------- state that steps and reads do not expect


def sparse_rows(rows, shape):
    values = torch.ones(rows.shape[1], *shape[rows.shape[0] :])
    return torch.sparse_coo_tensor(rows, values, shape)


@pytest.mark.parametrize("name", ["exp_avg_scale", "exp_avg_sq"])
def test_numbers_of_fewer_rows_than_the_clock_has_are_never_written_past(fused, name):
    shape, ids = (64, 8, 4), torch.arange(8).repeat(2, 1)
    p = Parameter(torch.randn(shape))
    if name == "exp_avg_scale":
        opt = Tiger([p], lazy="decay", momentum_dtype=torch.int8, fused=fused)
    else:
        opt = AdamW([p], lazy="decay", second_moment="row", fused=fused)
    for k in (8, 8, 1):
        p.grad = sparse_rows(ids[:, :k], shape)
        opt.step()
    numbers = torch.ones(64 * 8)
    opt.state[p][name] = numbers[:64]
    with pytest.raises((RuntimeError, IndexError)):
        opt.flush()
    assert torch.equal(numbers[64:], torch.ones(64 * 7))


@pytest.mark.parametrize("name", ["exp_avg_scale", "exp_avg_sq"])
def test_numbers_of_more_rows_than_the_clock_has_all_decay(fused, name):
    shape = (4, 3, 2)
    p = Parameter(torch.randn(shape))
    if name == "exp_avg_scale":
        opt = Tiger([p], lazy="decay", momentum_dtype=torch.int8, betas=(0.5,), fused=fused)
    else:
        opt = AdamW([p], lazy="decay", second_moment="row", betas=(0.9, 0.5), fused=fused)
    for k in range(3):
        p.grad = sparse_rows(torch.tensor([[k]]), shape)
        opt.step()
    saved = opt.state_dict()
    saved["state"][0][name] = torch.ones(4, 3)
    opt.load_state_dict(saved)
    opt.flush()
    expected = torch.tensor([0.25, 0.5, 1.0, 0.125])[:, None].expand(4, 3)
    torch.testing.assert_close(opt.state[p][name], expected)


def test_a_counter_that_is_none_is_refused(fused):
    p = parameter(6, dtype=torch.bfloat16)
    opt = Tiger([p], accumulation_steps=2, stochastic_rounding=True, fused=fused)
    p.grad = torch.ones_like(p)
    opt.step()
    opt.state[p]["step"] = torch.zeros(0, dtype=torch.int64)
    before = p.detach().clone()
    with pytest.raises(RuntimeError):
        opt.close_window()
    assert same_bits(p.detach(), before)


def test_a_window_without_a_gradient_draws_no_bits(fused):
    p, q = parameter(300, dtype=torch.bfloat16), parameter(10, dtype=torch.bfloat16)
    opt = Tiger([p, q], accumulation_steps=2, stochastic_rounding=True, fused=fused)
    for k in range(6):
        p.grad = torch.ones_like(p) if k not in (2, 3) else None
        q.grad = torch.ones_like(q)
        opt.step()
    assert int(opt.state[p]["step"]) == 6 and int(opt.state[q]["step"]) == 9


@pytest.mark.parametrize("stored", ["int8", "float32"])
def test_momenta_that_are_not_stored_as_the_group_says_are_converted(fused, stored):
    p, other = parameter(6, 4), parameter(6, 4)
    new = torch.int8 if stored == "float32" else None
    opt = Tiger([p, other], momentum_dtype=new, betas=(0.5,), fused=fused)
    q = torch.full((6, 4), 2, dtype=torch.int8)
    state = {"exp_avg": torch.full((6, 4), 2.0)}
    if stored == "int8":
        state = {"exp_avg": q, "exp_avg_scale": torch.ones(1, 1)}
    opt.state[p] = {**state, "step": torch.zeros((), dtype=torch.int64)}
    p.grad, other.grad = torch.zeros(6, 4), torch.zeros(6, 4)
    opt.step()
    found = opt.state[p]["exp_avg"]
    assert found.dtype == (new or torch.float32)
    scale = opt.state[p].get("exp_avg_scale", torch.ones(()))
    torch.testing.assert_close(found * scale.max(), torch.ones(6, 4), atol=0.02, rtol=0)
    assert ("exp_avg_scale" in opt.state[p]) == (stored == "float32")


def test_moments_of_rows_in_a_group_that_has_none_are_expanded(fused):
    p = parameter(6, 4)
    opt = AdamW([p], betas=(0.9, 0.5), fused=fused)
    opt.state[p] = {
        "exp_avg": torch.zeros(6, 4),
        "exp_avg_sq": torch.arange(6.0),
        "step": torch.zeros((), dtype=torch.int64),
    }
    p.grad = torch.zeros(6, 4)
    opt.step()
    expected = (0.5 * torch.arange(6.0))[:, None].expand(6, 4)
    torch.testing.assert_close(opt.state[p]["exp_avg_sq"], expected)


def test_scales_that_are_not_needed_any_more_do_no_harm(fused):
    p = parameter(6, 4)
    opt = AdamW([p], lazy="decay", momentum_dtype=torch.int8, fused=fused)
    p.grad = sparse_rows(torch.tensor([[1, 3]]), (6, 4))
    opt.step()
    opt.param_groups[0]["betas"] = (0.0, 0.999)
    opt.flush()
    p.grad = sparse_rows(torch.tensor([[1, 4]]), (6, 4))
    opt.step()
    opt.flush()
    assert bool(p.isfinite().all())


def test_rows_without_elements_have_no_second_moment(fused):
    p = Parameter(torch.zeros(5, 0))
    opt = AdamW([p], second_moment="row", fused=fused)
    p.grad = torch.sparse_coo_tensor(torch.tensor([[1, 3, 3]]), torch.zeros(3, 0), (5, 0))
    opt.step()
    assert torch.equal(opt.state[p]["exp_avg_sq"], torch.zeros(5))


@pytest.mark.parametrize("option", ["momentum_dtype", "second_moment"])
def test_a_momentum_converted_by_hand_counts_in_the_same_step(fused, option):
    # Of a layout with gaps, which the kernels work on in a copy.
    p = Parameter(torch.randn(4, 9)[:, :6].t())
    changed = {"momentum_dtype": (torch.int8, None), "second_moment": ("row", "element")}[option]
    cls = Tiger if option == "momentum_dtype" else AdamW
    opt = cls([p], lr=0.1, weight_decay=0.0, **{option: changed[0]}, fused=fused)
    p.grad = torch.ones(6, 4)
    opt.step()
    before = p.detach().clone()
    opt.param_groups[0][option] = changed[1]
    p.grad = torch.full((6, 4), 1e-3)
    opt.step()
    moved = (before - p.detach()) / 0.1
    expected = 1.0 if cls is Tiger else 0.669
    torch.testing.assert_close(moved, torch.full((6, 4), expected), atol=0.02, rtol=0)


def test_a_relative_rate_sees_the_momentum_that_was_converted_by_hand():
    outcomes = []
    for fused in (None, False):
        torch.manual_seed(0)
        p = parameter(600)
        options = dict(direction="clip", direction_scale=0.5, scale="rms", fused=fused)
        opt = Lion([p], lr=1e-2, momentum_dtype=torch.int8, **options)
        for step in range(4):
            if step == 2:
                opt.param_groups[0]["momentum_dtype"] = None
            p.grad = torch.randn(600) + 2
            opt.step()
        outcomes.append(p.detach())
    torch.testing.assert_close(*outcomes)


SMALL_STATE = {
    "int8": (Tiger, dict(momentum_dtype=torch.int8), torch.float32),
    "int8, rounded": (
        Tiger,
        dict(momentum_dtype=torch.int8, stochastic_rounding=True),
        torch.bfloat16,
    ),
    "row": (AdamW, dict(second_moment="row"), torch.float32),
    "row only": (AdamW, dict(second_moment="row", betas=(0.0, 0.99)), torch.float32),
}


@pytest.mark.parametrize("case", SMALL_STATE)
def test_state_in_few_bytes_is_restored_bit_by_bit(tmp_path, case):
    cls, options, dtype = SMALL_STATE[case]
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(40, (1, 3), generator=generator) for _ in range(13)]
    values = [torch.randn(3, 8, generator=generator).to(dtype) for _ in range(13)]

    def train(p, optimizer, steps):
        for k in steps:
            p.grad = torch.sparse_coo_tensor(ids[k], values[k], (40, 8))
            optimizer.step()

    p = Parameter(torch.randn(40, 8).to(dtype))
    optimizer = cls([p], lazy="decay", **options)
    train(p, optimizer, range(5))
    full, q = copy.deepcopy(optimizer.state_dict()), Parameter(p.detach().clone())
    since = position(optimizer)
    train(p, optimizer, range(5, 9))
    save_changes(optimizer, tmp_path / "delta", since)
    restored = cls([q], lazy="decay", **options)
    restored.load_state_dict(full)
    apply_changes(restored, tmp_path / "delta")
    for each, own in ((p, optimizer), (q, restored)):
        train(each, own, range(9, 13))
        own.flush()
    assert torch.equal(p, q)
    assert optimizer.state[p].keys() == restored.state[q].keys()
    for name, value in optimizer.state[p].items():
        assert torch.equal(value, restored.state[q][name]), name
