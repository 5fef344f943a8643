# SPDX-License-Identifier: Apache-2.0
"""The tests' own oracle accepts the rules and notices the mistakes that shipped elsewhere."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from cases import RULES, every_rule, parameter, sparse_grad
from oracle import sum_rows, verified
from torch.nn import Parameter

from tiger_ext import reference


def steps(rule, grads, **options):
    p = parameter(40, 3)
    p.data[:2] = 0.0
    opt = rule([p], fused=False, **options)
    for make in grads:
        p.grad = make(p)
        with verified(opt):
            opt.step()


def dense(p):
    grad = torch.randn(p.shape)
    grad[0] = 0.0
    return grad


def rows(p):
    return sparse_grad(p, 30)


@every_rule
@pytest.mark.parametrize("maximize", [False, True])
def test_accepts_the_reference(rule, maximize):
    steps(rule, [dense, rows, rows, dense], maximize=maximize)


def drift_at_zero(p, g, m, *, lr, beta1, beta2, weight_decay, **_):
    c = beta1 * m + (1 - beta1) * g
    return (1 - lr * weight_decay) * p - lr * torch.where(c > 0, 1.0, -1.0), beta2 * m + (
        1 - beta2
    ) * g


def signed_zero(p, g, m, *, lr, beta1, beta2, weight_decay, **_):
    c = beta1 * m + (1 - beta1) * g
    step = torch.copysign(torch.full_like(c, lr), c)
    return (1 - lr * weight_decay) * p - step, beta2 * m + (1 - beta2) * g


def coupled_decay(p, g, m, *, lr, beta1, beta2, weight_decay, **_):
    g = g + weight_decay * p
    c = beta1 * m + (1 - beta1) * g
    return p - lr * torch.sign(c), beta2 * m + (1 - beta2) * g


def no_decay(p, g, m, *, lr, beta1, beta2, weight_decay, **_):
    c = beta1 * m + (1 - beta1) * g
    return p - lr * torch.sign(c), beta2 * m + (1 - beta2) * g


def decay_of_the_new_value(p, g, m, *, lr, beta1, beta2, weight_decay, **_):
    c = beta1 * m + (1 - beta1) * g
    return (1 - lr * weight_decay) * (p - lr * torch.sign(c)), beta2 * m + (1 - beta2) * g


def betas_exchanged(p, g, m, *, lr, beta1, beta2, weight_decay, **_):
    c = beta2 * m + (1 - beta2) * g
    return (1 - lr * weight_decay) * p - lr * torch.sign(c), beta1 * m + (1 - beta1) * g


def ascent(p, g, m, *, lr, beta1, beta2, weight_decay, **_):
    c = beta1 * m + (1 - beta1) * g
    return (1 - lr * weight_decay) * p + lr * torch.sign(c), beta2 * m + (1 - beta2) * g


def half_precision(p, g, m, *, lr, beta1, beta2, weight_decay, **_):
    c = beta1 * m + (1 - beta1) * g
    new = (1 - lr * weight_decay) * p - lr * torch.sign(c)
    return new, (beta2 * m + (1 - beta2) * g).bfloat16().float()


@pytest.mark.parametrize(
    "mistake",
    [
        drift_at_zero,
        signed_zero,
        coupled_decay,
        no_decay,
        decay_of_the_new_value,
        betas_exchanged,
        ascent,
        half_precision,
    ],
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize("grad", [dense, rows], ids=["dense", "rows"])
def test_notices_a_wrong_rule(monkeypatch, mistake, grad):
    def zero_row(p):
        g = grad(p)
        if g.is_sparse:
            g._values()[0] = 0.0
            g._indices()[0, 0] = 1
            g._indices()[0, 1:] = 5
        return g

    steps(RULES[1], [zero_row, zero_row])

    def wrong(p, g, moments, use):
        betas = dict(beta1=use.betas[0], beta2=use.betas[-1])
        new, m = mistake(p, g, moments[0], lr=use.lr, weight_decay=use.weight_decay, **betas)
        return new, [m]

    monkeypatch.setattr(reference, "sign_momentum", wrong)
    with pytest.raises(AssertionError, match="out of band"):
        steps(RULES[1], [zero_row, zero_row])


@pytest.mark.parametrize("what", ["sign of a sum", "touched rows only", "grad"])
def test_notices_a_wrong_road(monkeypatch, what):
    def unsummed(indices, values, shape, dtype):
        return indices, values.to(dtype)

    def one_row_more(indices, values, shape, dtype):
        indices = torch.cat([indices, torch.tensor([[39]])], 1)
        return indices, torch.cat([values, torch.ones(1, 3)]).to(dtype)

    def scratch(indices, values, shape, dtype):
        rows, sums = original(indices, values, shape, dtype)
        values.neg_()
        return rows, sums

    original = reference.sum_duplicates
    wrong = {"sign of a sum": unsummed, "touched rows only": one_row_more, "grad": scratch}[what]
    monkeypatch.setattr(reference, "sum_duplicates", wrong)
    with pytest.raises(AssertionError):
        steps(RULES[1], [lambda p: sparse_grad(p, 60, rows=20)])


@pytest.mark.parametrize("mistake", ["no correction", "float step", "eps inside"])
def test_notices_a_wrong_adamw(monkeypatch, mistake):
    original = reference.adamw

    def wrong(p, g, moments, use):
        if mistake == "no correction":
            use = replace(use, step=10**6)
        elif mistake == "float step":
            use = replace(use, step=use.step + 1)
        else:
            use = replace(use, eps=use.eps * 1e4)
        return original(p, g, moments, use)

    monkeypatch.setattr(reference, "adamw", wrong)
    with pytest.raises(AssertionError, match="out of band"):
        steps(RULES[2], [dense])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_sum_rows_is_the_plain_loop(dtype):
    generator = np.random.default_rng(5)
    rows = np.concatenate([generator.integers(0, 9, 300), np.full(2000, 4), [7] * 256, [8] * 257])
    values = generator.standard_normal((len(rows), 2)).astype(dtype)
    touched, sums = sum_rows(rows, values)
    assert touched.tolist() == sorted(set(rows.tolist()))
    for row, total in zip(touched, sums):
        mine = values[rows == row]
        pieces = []
        for start in range(0, len(mine), 256):
            piece = mine[start]
            for entry in mine[start + 1 : start + 256]:
                piece = piece + entry
            pieces.append(piece)
        expected = pieces[0]
        for piece in pieces[1:]:
            expected = expected + piece
        assert expected.dtype == dtype
        assert expected.tobytes() == total.tobytes()


def test_verified_notices_a_step_that_did_not_happen():
    p = Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    opt = RULES[0]([p])
    with pytest.raises(AssertionError), verified(opt):
        pass
