# SPDX-License-Identifier: Apache-2.0
"""What state costs: a second moment of one number a row; parameters that are rounded at random.

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
    bad = dense_grad(p)
    bad[1, 2] = math.inf
    good = {row: g for row, g in rows_of(bad).items() if row != 1}
    p.grad = bad if layout == "strided" else bad.to_sparse(1)
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
    x = (of_unit + place * 0x9E3779B9) % 2**32
    x = ((x ^ (x >> 16)) * 0x7FEB352D) % 2**32
    x ^= of_unit >> 32
    x = ((x ^ (x >> 15)) * 0x846CA68B) % 2**32
    return x ^ (x >> 16)


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
    draw = (bits >> (16 if dtype == torch.bfloat16 else 19)) + (0.5 if size < least else 0)
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
    assert [random_bits(s, 1, 0, 2, 3) for s in range(3)] == [0xEE0087A6, 0x5FB8B2E, 0x1B21F7A]


class SignModel:
    """Steps of Lion, or of Tiger with one beta, each from what the optimizer has before it."""

    def __init__(self, opt, p):
        self.opt, self.p, self.group = opt, p, opt.param_groups[0]
        self.last = np.zeros(len(p), dtype=int)
        self.steps = 0
        self.beta1, self.beta2 = self.group["betas"][0], self.group["betas"][-1]

    def before(self):
        m = self.opt.state.get(self.p, {}).get("exp_avg")
        shape = self.p.shape
        self.m = np.zeros(shape) if m is None else m.double().numpy().copy()
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
