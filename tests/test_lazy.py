# SPDX-License-Identifier: Apache-2.0
"""The lazy modes against the dense rule in float64, which updates every row at every step."""

import copy
import math
import pickle

import pytest
import torch
from cases import clock_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tiger_ext import AdamW, Lion, Tiger
from tiger_ext.nn import TiedEmbedding

FUSED = pytest.mark.parametrize("fused", [None, False])
ROWS, DIM = 11, 5


class Dense:
    """The rules as published, for all rows of a table at once, in float64.

    ``follow`` is what an untouched row does: "exact": a step with a zero gradient; "decay": such a
    step without its direction.
    """

    def __init__(self, table, algorithm, follow):
        self.p = table.detach().double().clone()
        self.m, self.v = torch.zeros_like(self.p), torch.zeros_like(self.p)
        self.algorithm, self.follow = algorithm, follow
        self.t = 0

    def step(self, grad, touched, *, lr, wd, betas, eps=1e-8):
        self.t += 1
        b1, b2 = betas[0], betas[-1]
        grad = grad.double()
        if self.algorithm == "adamw":
            m, v = b1 * self.m + (1 - b1) * grad, b2 * self.v + (1 - b2) * grad**2
            root = (v / (1 - b2**self.t)).sqrt() + eps
            move = m / (1 - b1**self.t) / root
            self.m, self.v = m, v
        else:
            move = (b1 * self.m + (1 - b1) * grad).sign()
            self.m = b2 * self.m + (1 - b2) * grad
        if self.follow == "decay":
            move = torch.where(touched.reshape(-1, *[1] * (grad.dim() - 1)), move, 0.0)
        self.p = (1 - lr * wd) * self.p - lr * move


def check(optimizer, p, dense, dtype):
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    scale = 1 + dense.p.abs().max().item()
    torch.testing.assert_close(p.detach().double(), dense.p, rtol=0, atol=tolerance * scale)
    m = optimizer.state[p]["exp_avg"].double()
    torch.testing.assert_close(m, dense.m, rtol=0, atol=tolerance * (1 + dense.m.abs().max()))


def sparse(generator, count, dtype, coalesce=False, dim=DIM):
    ids = torch.randint(ROWS, (1, count), generator=generator)
    values = torch.randn(count, dim, generator=generator, dtype=torch.float64).to(dtype)
    g = torch.sparse_coo_tensor(ids, values, (ROWS, dim), check_invariants=True)
    return g.coalesce() if coalesce else g


CASES = [
    (Tiger, "exact"),
    (Lion, "exact"),
    (Tiger, "decay"),
    (Lion, "decay"),
    (AdamW, "decay"),
]


@FUSED
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("cls,lazy", CASES)
@settings(max_examples=12, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_every_read_is_what_the_dense_rule_gives(cls, lazy, dtype, fused, data):
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    embedding = nn.Embedding(ROWS, DIM, sparse=True, dtype=dtype)
    p = embedding.weight
    maximize = data.draw(st.booleans())
    tensor_lr = data.draw(st.booleans())
    lr = torch.tensor(1e-2, dtype=torch.float64) if tensor_lr else 1e-2
    optimizer = cls([p], lr=lr, weight_decay=0.3, lazy=lazy, fused=fused, maximize=maximize)
    group = optimizer.param_groups[0]
    optimizer.track(embedding)
    dense = Dense(p, group["algorithm"], lazy)
    for step in range(data.draw(st.integers(1, 30))):
        change = data.draw(st.sampled_from(["", "", "lr", "weight_decay", "betas"]))
        new_lr = 1e-2 * (1.1 + math.sin(step))
        if change == "lr" and tensor_lr:
            group["lr"].fill_(new_lr)
        elif change == "lr":
            group["lr"] = new_lr
        elif change == "weight_decay":
            group["weight_decay"] = data.draw(st.sampled_from([0.0, 0.01, 3.0]))
        elif change == "betas":
            group["betas"] = tuple(0.5 + 0.9 * (b - 0.5) for b in group["betas"])
        kind = data.draw(st.sampled_from(["sparse", "sparse", "coalesced", "none", "empty", "all"]))
        touched = torch.zeros(ROWS, dtype=torch.bool)
        if kind in ("sparse", "coalesced"):
            p.grad = sparse(generator, data.draw(st.integers(1, 9)), dtype, kind == "coalesced")
            touched[p.grad._indices()[0]] = True
        elif kind == "none":
            p.grad = None
        elif kind == "empty":
            p.grad = sparse(generator, 0, dtype)
        else:
            p.grad = torch.randn(ROWS, DIM, generator=generator, dtype=torch.float64).to(dtype)
            touched[:] = True
        full = torch.zeros(ROWS, DIM) if p.grad is None else p.grad.to_dense()
        optimizer.step()
        dense.step(
            -full if maximize else full,
            touched,
            lr=float(group["lr"]),
            wd=group["weight_decay"],
            betas=group["betas"],
        )
        if data.draw(st.booleans()):
            embedding.train(data.draw(st.booleans()))
            ids = torch.randint(ROWS, (2, 3), generator=generator)
            read = embedding(ids).detach().double()
            tolerance = 1e-12 if dtype == torch.float64 else 1e-6
            scale = 1 + dense.p.abs().max().item()
            torch.testing.assert_close(read, dense.p[ids], rtol=0, atol=tolerance * scale)
    optimizer.flush()
    if "exp_avg" in optimizer.state[p]:
        check(optimizer, p, dense, dtype)
        assert optimizer.state[p]["last_step"].shape == (ROWS,)


@FUSED
@pytest.mark.parametrize("rows", ["nonzero", "tracked"])
@pytest.mark.parametrize("cls,lazy", CASES)
def test_strided_gradients_by_rows(cls, lazy, rows, fused):
    embedding = nn.Embedding(ROWS, DIM, dtype=torch.float64)
    p = embedding.weight
    optimizer = cls([p], lr=1e-2, weight_decay=0.3, lazy=lazy, rows=rows, fused=fused)
    dense = Dense(p, optimizer.param_groups[0]["algorithm"], lazy)
    optimizer.track(embedding)
    generator = torch.Generator().manual_seed(3)
    for _ in range(25):
        ids = torch.randint(ROWS, (3,), generator=generator)
        optimizer.zero_grad()
        out = embedding(ids)
        torch.testing.assert_close(out.detach(), dense.p[ids], rtol=0, atol=1e-12)
        (out * torch.randn(3, DIM, generator=generator, dtype=torch.float64)).sum().backward()
        touched = torch.zeros(ROWS, dtype=torch.bool)
        touched[ids] = True
        optimizer.step()
        dense.step(p.grad, touched, lr=1e-2, wd=0.3, betas=optimizer.param_groups[0]["betas"])
    optimizer.flush()
    check(optimizer, p, dense, torch.float64)


@FUSED
@pytest.mark.parametrize("lazy", ["decay", "exact"])
def test_accumulation_windows(lazy, fused):
    p = nn.Parameter(torch.randn(ROWS, DIM, dtype=torch.float64))
    optimizer = Tiger([p], lr=1e-2, weight_decay=0.3, lazy=lazy, accumulation_steps=3, fused=fused)
    dense = Dense(p, "tiger", lazy)
    generator = torch.Generator().manual_seed(3)
    for window in range(12):
        mean, touched = torch.zeros(ROWS, DIM).double(), torch.zeros(ROWS, dtype=torch.bool)
        for micro in range(3):
            p.grad = None if (window + micro) % 4 == 0 else sparse(generator, 3, torch.float64)
            if p.grad is not None:
                mean += p.grad.to_dense() / 3
                touched[p.grad._indices()[0]] = True
            optimizer.step()
            if window == 7 and micro == 1:
                optimizer.flush()
        dense.step(mean, touched, lr=1e-2, wd=0.3, betas=(0.965,))
    optimizer.flush()
    check(optimizer, p, dense, torch.float64)
    assert clock_of(optimizer).history.steps == 12


@FUSED
@pytest.mark.parametrize("nonfinite", ["skip", "shrink"])
def test_a_row_that_is_not_finite_counts_as_untouched(nonfinite, fused):
    p = nn.Parameter(torch.randn(ROWS, DIM, dtype=torch.float64))
    optimizer = Tiger(
        [p], lr=1e-2, weight_decay=0.3, lazy="exact", nonfinite=nonfinite, fused=fused
    )
    dense = Dense(p, "tiger", "exact")
    generator = torch.Generator().manual_seed(3)
    for step in range(20):
        p.grad = sparse(generator, 4, torch.float64, coalesce=True)
        full = p.grad.to_dense()
        if step % 3 == 0:
            bad = p.grad._indices()[0, 0]
            p.grad._values()[0, 1] = math.nan
            full[bad] = 0
            if nonfinite == "shrink":
                dense.p[bad] *= 0.99
        optimizer.step()
        dense.step(full, torch.ones(ROWS, dtype=torch.bool), lr=1e-2, wd=0.3, betas=(0.965,))
    optimizer.flush()
    check(optimizer, p, dense, torch.float64)


@FUSED
@pytest.mark.parametrize("strides", ["contiguous", "transposed"])
def test_a_changing_sparse_dim_divides_the_rows_anew(strides, fused):
    base = torch.randn(4, 3, DIM, dtype=torch.float64)
    if strides == "transposed":
        base = base.permute(1, 0, 2).contiguous().permute(1, 0, 2)
    p = nn.Parameter(base)
    optimizer = Lion([p], lr=1e-2, weight_decay=0.3, lazy="exact", fused=fused)
    dense = Dense(p, "lion", "exact")
    generator = torch.Generator().manual_seed(3)
    for step in range(24):
        g = torch.zeros(4, 3, DIM, dtype=torch.float64)
        g[step % 4, step % 3] = torch.randn(DIM, generator=generator, dtype=torch.float64)
        dims = 1 + (step // 4) % 3
        p.grad = g.to_sparse(dims)
        optimizer.step()
        assert optimizer.state[p]["last_step"].shape == p.shape[:dims]
        dense.step(g, torch.ones(4, dtype=torch.bool), lr=1e-2, wd=0.3, betas=(0.9, 0.99))
    optimizer.flush()
    check(optimizer, p, dense, torch.float64)


@FUSED
def test_parameters_without_rows_and_several_groups(fused):
    parameters = [
        nn.Parameter(torch.randn(s, dtype=torch.float64)) for s in ((), (3,), (0, 4), (4, 2))
    ]
    optimizer = Tiger(
        [{"params": parameters[:2], "lr": 2e-2}, {"params": parameters[2:], "lazy": "decay"}],
        lr=1e-2,
        weight_decay=0.3,
        lazy="exact",
        fused=fused,
    )
    models = [Dense(p, "tiger", "exact" if i < 2 else "decay") for i, p in enumerate(parameters)]
    for step in range(9):
        for i, (p, dense) in enumerate(zip(parameters, models)):
            p.grad = torch.randn_like(p) if (step + i) % 3 == 0 else None
            g = torch.zeros_like(p) if p.grad is None else p.grad
            touched = torch.full((len(p) if p.dim() else 1,), p.grad is not None)
            if p.dim() == 0:
                touched = touched.reshape(-1)
                dense.p, dense.m, g = dense.p.reshape(1), dense.m.reshape(1), g.reshape(1)
            dense.step(g, touched, lr=2e-2 if i < 2 else 1e-2, wd=0.3, betas=(0.965,))
        optimizer.step()
        if step == 4:  # a late one: its history begins with it
            late = nn.Parameter(torch.randn(5, 2, dtype=torch.float64))
            optimizer.add_param_group({"params": [late], "lazy": "exact"})
            parameters.append(late)
            models.append(Dense(late, "tiger", "exact"))
    optimizer.flush()
    for i, (p, dense) in enumerate(zip(parameters, models)):
        if i != 4:
            torch.testing.assert_close(p.detach(), dense.p.reshape(p.shape), rtol=0, atol=1e-12)


@FUSED
def test_two_tracked_modules_removal_and_versions(fused):
    one, two = (nn.Embedding(ROWS, DIM, sparse=True) for _ in range(2))
    two.weight = one.weight
    p = one.weight
    optimizer = Tiger([p], lr=1e-2, weight_decay=0.3, lazy="exact", fused=fused)
    first, second = optimizer.track(one), optimizer.track(two)
    p.grad = sparse(torch.Generator().manual_seed(0), 5, torch.float32)
    optimizer.step()
    p.grad = None
    optimizer.step()
    last = optimizer.state[p]["last_step"]
    two(torch.tensor([3, 3, 7]))
    assert [i for i in range(ROWS) if abs(int(last[i] + 0.5)) >= 2] == [3, 7]
    version = p._version
    with torch.no_grad():
        one.eval()(torch.tensor([4]))
    assert p._version > version and int(last[4]) in (2, -3)
    copied = copy.deepcopy(one)
    before = p.detach().clone()
    copied(torch.tensor([5]))
    first.remove()
    one(torch.tensor([5]))
    assert torch.equal(p.detach(), before)
    second.remove()


@FUSED
@pytest.mark.indices_checked_at_once
def test_a_read_without_stale_rows_writes_nothing_and_a_bad_id_raises(fused):
    embedding = nn.Embedding(ROWS, DIM, sparse=True)
    p = embedding.weight
    optimizer = Tiger([p], lr=1e-2, weight_decay=0.3, lazy="exact", fused=fused)
    optimizer.track(embedding)
    p.grad = sparse(torch.Generator().manual_seed(0), 5, torch.float32)
    optimizer.step()
    embedding(torch.tensor([3, 7]))
    version = p._version
    embedding(torch.tensor([[7, 3]]))
    assert p._version == version
    with pytest.raises(IndexError, match="11"):
        embedding(torch.tensor([ROWS]))


@FUSED
@pytest.mark.parametrize("lazy", ["decay", "exact"])
def test_two_reads_of_a_tied_table_before_a_backward_pass(lazy, fused):
    """Its gradients are dense: no row is ever behind, and nothing of a graph is changed."""
    tied = TiedEmbedding(ROWS, 6)
    optimizer = Tiger(tied.parameters(), lr=1e-2, lazy=lazy, fused=fused)
    optimizer.track(tied)
    for _ in range(3):
        optimizer.zero_grad()
        loss = sum(tied.logits(tied(torch.tensor([k, k + 1]))).square().sum() for k in range(3))
        loss.backward()
        optimizer.step()
    assert optimizer.state[tied.weight]["last_step"].tolist() == [3] * ROWS
    # Sparse steps and lost ones leave rows behind again.
    tied.weight.grad = sparse(torch.Generator().manual_seed(0), 1, torch.float32, dim=6)
    optimizer.step()
    tied(torch.arange(ROWS))
    assert optimizer.state[tied.weight]["last_step"].tolist() == [4] * ROWS


@FUSED
def test_a_first_read_in_inference_mode(fused):
    embedding = nn.Embedding(ROWS, DIM, sparse=True)
    optimizer = Tiger(embedding.parameters(), lr=1e-2, weight_decay=0.3, lazy="exact", fused=fused)
    optimizer.track(embedding)
    optimizer.step()  # without a gradient: the rows age
    before = embedding.weight.detach().clone()
    with torch.inference_mode():
        read = embedding(torch.tensor([3, 3]))
    torch.testing.assert_close(read.clone()[0], before[3] * (1 - 1e-2 * 0.3))
    embedding(torch.tensor([1, 3])).sum().backward()
    optimizer.step()
    optimizer.flush()
    assert not any(t.is_inference() for t in optimizer.state[embedding.weight].values())


def test_a_saved_table_that_changes_is_noticed_by_autograd():
    embedding = nn.Embedding(ROWS, DIM, sparse=True)
    optimizer = Tiger(embedding.parameters(), lazy="exact")
    optimizer.track(embedding)
    embedding.weight.grad = sparse(torch.Generator().manual_seed(0), 5, torch.float32)
    optimizer.step()
    product = embedding.weight * embedding.weight  # saves the table for its backward pass
    embedding.weight.grad = None
    optimizer.step()
    embedding(torch.arange(ROWS))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


@FUSED
@pytest.mark.indices_checked_at_once
@pytest.mark.parametrize("lazy", ["decay", "exact"])
def test_failed_and_cancelled_steps_do_not_count(lazy, fused):
    p, q = (nn.Parameter(torch.randn(ROWS, DIM)) for _ in range(2))
    optimizer = Tiger([p, q], lr=1e-2, weight_decay=0.3, lazy=lazy, fused=fused)
    generator = torch.Generator().manual_seed(0)
    p.grad, q.grad = (sparse(generator, 5, torch.float32) for _ in range(2))
    optimizer.step()
    optimizer.step()

    def snapshot():
        return pickle.dumps([p.detach(), q.detach(), optimizer.state_dict()])

    before = snapshot()
    bad = torch.sparse_coo_tensor([[ROWS]], torch.ones(1, DIM), (ROWS, DIM), check_invariants=False)
    p.grad, q.grad = sparse(generator, 5, torch.float32), bad
    with pytest.raises(IndexError, match="out of range for 11 rows"):
        optimizer.step()
    assert snapshot() == before
    q.grad = None
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(1.0)
    optimizer.step()
    assert snapshot() == before
    optimizer.found_inf = torch.tensor(0.0)
    optimizer.step()
    assert snapshot() != before
    del optimizer.grad_scale, optimizer.found_inf
    before = snapshot()
    optimizer.param_groups[0]["lr"] = 4.0
    with pytest.raises(ValueError, match="lr \\* weight_decay < 1"):
        optimizer.step()
    optimizer.param_groups[0]["lr"] = 1e-2
    assert snapshot() == before


@FUSED
@pytest.mark.parametrize("cls,lazy", CASES)
def test_copies_go_on_bit_by_bit(cls, lazy, fused):
    p = nn.Parameter(torch.randn(ROWS, DIM))
    optimizer = cls([p], lr=1e-2, weight_decay=0.3, lazy=lazy, fused=fused)
    q = nn.Parameter(p.detach().clone())
    other = cls([q], lazy="frozen", fused=fused)
    generator = torch.Generator().manual_seed(0)
    for step in range(30):
        optimizer.param_groups[0]["lr"] = 1e-2 / (1 + step // 3)
        p.grad = sparse(generator, 3, torch.float32)
        if step == 12:
            other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            q.data.copy_(p.detach())
            pair = copy.deepcopy((optimizer, p))
            pickled = pickle.loads(pickle.dumps((optimizer, p)))
        optimizer.step()
        if step >= 12:
            for o, r in ((other, q), pair, pickled):
                o.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"]
                r.grad = p.grad
                o.step()
    for o, _ in ((other, q), pair, pickled):
        o.flush()
    optimizer.flush()
    for o, r in ((other, q), pair, pickled):
        assert torch.equal(r, p)
        assert torch.equal(o.state[r]["last_step"], optimizer.state[p]["last_step"])


@pytest.mark.parametrize(
    "cls,options,match",
    [
        (AdamW, dict(lazy="exact"), "adamw"),
        (Tiger, dict(lazy="exact", direction="clip"), "direction"),
        (Tiger, dict(lazy="exact", betas=(0.0,)), "betas"),
        (Lion, dict(lazy="exact", betas=(0.9, 0.0)), "betas"),
        (Lion, dict(lazy="exact", betas=(0.0, 0.9)), "betas"),
        (Tiger, dict(lazy="exact", scale="rms"), "scale"),
        (Lion, dict(lazy="decay", scale="rms_rows"), "scale"),
        (Tiger, dict(lazy="decay", lr=2.0, weight_decay=0.5), "lr \\* weight_decay < 1"),
        (AdamW, dict(lazy="decay", lr=2.0, weight_decay=0.5), "lr \\* weight_decay < 1"),
        (Tiger, dict(lazy="sometimes"), "lazy"),
    ],
)
def test_options_that_do_not_go_together(cls, options, match):
    p = nn.Parameter(torch.zeros(3, 2))
    with pytest.raises(ValueError, match=match):
        cls([p], **options)
    optimizer = cls([nn.Parameter(torch.zeros(2))])
    with pytest.raises(ValueError, match=match):
        optimizer.add_param_group({"params": [p], **options})
    assert len(optimizer.param_groups) == 1


@FUSED
def test_flush_reaches_rows_without_any_gradient_and_leaves_frozen_parameters(fused):
    p, fixed = (nn.Parameter(torch.ones(3, 2, dtype=torch.float64)) for _ in range(2))
    fixed.requires_grad_(False)
    optimizer = Tiger([p, fixed], lr=0.1, weight_decay=0.5, lazy="exact", fused=fused)
    optimizer.step()
    optimizer.step()
    optimizer.flush(progress=False)
    torch.testing.assert_close(p.detach(), torch.full((3, 2), 0.95**2, dtype=torch.float64))
    assert torch.equal(fixed, torch.ones_like(fixed)) and fixed not in optimizer.state


@FUSED
@pytest.mark.parametrize("lazy,every", [("exact", False), ("frozen", True)])
def test_sparse_rosenbrock(lazy, every, fused):
    """torch's case: gradients that hold only one of the two coordinates, as a sparse tensor."""
    start = torch.tensor([1.5, 1.5], dtype=torch.float64)
    p, q = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    ours = Tiger([p], lr=1e-3, lazy=lazy, fused=fused)
    dense = Tiger([q], lr=1e-3, fused=False)

    def gradient(x, which):
        grad = torch.tensor(
            [-400 * x[0] * (x[1] - x[0] ** 2) - 2 * (1 - x[0]), 200 * (x[1] - x[0] ** 2)],
            dtype=torch.float64,
        )
        return grad if every else grad * torch.tensor([which == 0, which == 1])

    for step in range(200):
        grad = gradient(q.detach(), step % 2)
        q.grad = grad
        rows = [0, 1] if every else [step % 2]
        p.grad = torch.sparse_coo_tensor([rows], grad[rows], (2,), check_invariants=True)
        ours.step()
        dense.step()
        ours.flush()
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12)
