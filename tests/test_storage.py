# SPDX-License-Identifier: Apache-2.0
"""What state costs: a second moment of one number a row.

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

from tiger_ext import AdamW, Tiger, health_report


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
        assert a.dtype == b.dtype and same_bits(a, b)


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


def check_saved_run(make):
    whole, first = make(), make()
    train(whole, 0, 7)
    train(first, 0, 4)
    second = make()
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
