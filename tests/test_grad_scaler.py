# SPDX-License-Identifier: Apache-2.0
"""torch.amp.GradScaler: dense and sparse gradients in every lazy mode."""

import copy
import io

import pytest
import torch
from cases import clock_of
from oracle import same_bits, unchanged
from table_model import HYPER, MODES, Model, assert_alike, batch, every_mode

from tiger_ext import Tiger

BAD = 3  # the step whose gradients overflow
SCALE = 256.0


def bits_of(optimizer):
    file = io.BytesIO()
    state = [[p.detach() for g in optimizer.param_groups for p in g["params"]]]
    torch.save([*state, optimizer.state_dict()], file)
    return file.getvalue()


@every_mode
@pytest.mark.parametrize("unscale", [False, True], ids=["step-unscales", "unscaled-before"])
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_a_scaled_run_equals_an_unscaled_one(cls, lazy, sparse, unscale):
    model, plain = Model(sparse), Model(sparse)
    optimizer = cls(model.parameters(), lazy=lazy, **HYPER)
    other = cls(plain.parameters(), lazy=lazy, **HYPER)
    optimizer.track(model.table)
    other.track(plain.table)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE, growth_interval=10**6)
    for step in range(8):
        optimizer.zero_grad()
        loss = model(batch(step))
        scaler.scale(loss * torch.inf if step == BAD else loss).backward()
        if unscale:
            scaler.unscale_(optimizer)
        before = bits_of(optimizer)
        scaler.step(optimizer)
        scaler.update()
        other.zero_grad()
        loss = plain(batch(step))  # reads the same rows, so that they catch up together
        if step == BAD:
            assert bits_of(optimizer) == before  # parameters, moments, last_step, history, clocks
            continue
        loss.backward()
        other.step()
        assert_alike(optimizer, other)
    assert scaler.get_scale() == SCALE / 2
    assert not hasattr(optimizer, "grad_scale") and not hasattr(optimizer, "found_inf")
    if lazy != "frozen":
        assert clock_of(optimizer).history.steps == 7


@every_mode
@pytest.mark.parametrize("fused", [None, False], ids=["native", "reference"])
def test_a_first_step_that_overflows_begins_nothing(cls, lazy, fused):
    model = Model()
    optimizer = cls(model.parameters(), lazy=lazy, fused=fused, **HYPER)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    scaler.scale(model(batch(0)) * torch.inf).backward()
    with unchanged(optimizer):
        scaler.step(optimizer)
    history = clock_of(optimizer).history
    assert history is None or not (history.started or history.settings)


@every_mode
@pytest.mark.parametrize("fused", [None, False], ids=["native", "reference"])
def test_attributes_as_fused_optimizers_get_them(cls, lazy, fused):
    model, plain = Model(), Model()
    optimizer = cls(model.parameters(), lazy=lazy, fused=fused, **HYPER)
    other = cls(plain.parameters(), lazy=lazy, fused=fused, **HYPER)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(SCALE), torch.tensor(0.0)
    for step in range(8):
        optimizer.found_inf.fill_(float(step == BAD))
        optimizer.zero_grad()
        (model(batch(step)) * SCALE).backward()
        given = [p.grad.clone() for p in model.parameters()]
        before = bits_of(optimizer)
        optimizer.step()
        for p, g in zip(model.parameters(), given):
            same = p.grad._values() if p.grad.is_sparse else p.grad
            assert same_bits(same, g._values() if g.is_sparse else g)
        if step == BAD:
            assert bits_of(optimizer) == before
            continue
        other.zero_grad()
        plain(batch(step)).backward()
        other.step()
        assert_alike(optimizer, other)


@pytest.mark.parametrize("lazy", ["frozen", "decay", "exact"])
@pytest.mark.parametrize("steps", [1, 2], ids=["steps", "windows"])
def test_tracked_rows_of_a_cancelled_step_are_forgotten(lazy, steps):
    def make(model):
        return Tiger(
            [
                {"params": [model.table.weight], "rows": "tracked"},
                {"params": list(model.head.parameters())},
            ],
            lazy=lazy,
            accumulation_steps=steps,
            **HYPER,
        )

    model, plain = Model(False).double(), Model(False).double()
    optimizer, other = make(model), make(plain)
    optimizer.track(model.table)
    other.track(plain.table)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    for step in range(8):
        optimizer.zero_grad()
        loss = model(batch(step))
        scaler.scale(loss * torch.inf if step == BAD else loss).backward()
        scaler.step(optimizer)
        scaler.update()
        if step != BAD:  # as if that batch had never been
            other.zero_grad()
            plain(batch(step)).backward()
            other.step()
    optimizer.flush()
    other.flush()
    for p, q in zip(model.parameters(), plain.parameters()):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-13)


@pytest.mark.parametrize("cls,lazy", [m for m in MODES if m[1] != "frozen"])
def test_half_precision(cls, lazy):
    model = Model().half()
    plain = copy.deepcopy(model)
    optimizer = cls(model.parameters(), lazy=lazy, momentum_dtype=torch.float32, **HYPER)
    other = cls(plain.parameters(), lazy=lazy, momentum_dtype=torch.float32, **HYPER)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for step in range(8):
        optimizer.zero_grad()
        other.zero_grad()
        loss = model(batch(step)) * 2.0**-8
        scaler.scale(loss * torch.inf if step == BAD else loss).backward()
        scaler.step(optimizer)
        scaler.update()
        if step == BAD:
            continue
        (plain(batch(step)) * 2.0**-8).backward()
        plain.table.weight.grad = plain.table.weight.grad.coalesce()  # as torch's scaler does
        other.step()
    optimizer.flush()
    other.flush()
    for p, q in zip(model.parameters(), plain.parameters()):
        torch.testing.assert_close(p.float(), q.float(), rtol=2e-3, atol=2e-3)
    assert clock_of(optimizer).history.steps == 7


@pytest.mark.parametrize("fused", [None, False], ids=["native", "reference"])
@pytest.mark.parametrize("found", [0, 0.0, 1, True], ids=repr)
def test_found_inf_may_be_a_plain_number(found, fused):
    # As GradScaler's sum over no gradient is.
    model = Model()
    optimizer = Tiger(model.parameters(), lazy="exact", fused=fused, **HYPER)
    model(batch(0)).backward()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.grad_scale, optimizer.found_inf = None, found
    optimizer.step()
    moved = any(not torch.equal(p, q) for p, q in zip(model.parameters(), before))
    assert moved != bool(found)
    assert clock_of(optimizer).history.steps == (not found)


@pytest.mark.parametrize("fused", [None, False], ids=["native", "reference"])
@pytest.mark.parametrize("error", ["of the gradient", "of the closure"])
def test_a_step_that_raised_leaves_no_scale_behind(fused, error):
    p = torch.nn.Parameter(torch.ones(4, 2))
    optimizer = Tiger([p], betas=(0.9,), nonfinite="raise", fused=fused)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(65536.0), torch.tensor(0.0)

    def closure():
        if error == "of the closure":
            raise FloatingPointError
        p.grad = torch.full((4, 2), torch.nan)

    with pytest.raises(FloatingPointError):
        optimizer.step(closure)
    p.grad = torch.ones(4, 2)
    optimizer.step()
    torch.testing.assert_close(optimizer.state[p]["exp_avg"], torch.full((4, 2), 0.1))


def test_only_the_kernels_take_the_scale():
    model = Model()
    assert Tiger(model.parameters())._step_supports_amp_scaling
    assert not Tiger(model.parameters(), fused=False)._step_supports_amp_scaling
    mixed = Tiger([{"params": [p], "fused": f} for p, f in zip(model.parameters(), (None, False))])
    assert not mixed._step_supports_amp_scaling
    optimizer = Tiger(model.parameters(), fused=False, **HYPER)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    scaler.scale(model(batch(0))).backward()
    scaler.step(optimizer)
    plain = Model()
    plain(batch(0)).backward()
    for p, q in zip(model.parameters(), plain.parameters()):
        grads = (g.grad.to_dense() if g.grad.is_sparse else g.grad for g in (p, q))
        torch.testing.assert_close(*grads)  # torch has unscaled them
