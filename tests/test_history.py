# SPDX-License-Identifier: Apache-2.0
"""Long gaps and long histories of the lazy modes, against closed forms in float64."""

import copy
import math
import pickle
import random
import subprocess
import sys

import pytest
import torch
from cases import clock_of

from tiger_ext import AdamW, Lion, Tiger
from tiger_ext.history import History

GAPS = [1, 2, 10, 1000, 10**5, 10**7, 2**31 - 4]
FUSED = [None, False]


def table(rows=6, dim=5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(rows)
    values = torch.randn(rows, dim, generator=generator, dtype=torch.float64)
    return torch.nn.Parameter(values.to(dtype))


def touch(p, rows, seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(len(rows), p.shape[1], generator=generator, dtype=torch.float64)
    p.grad = torch.sparse_coo_tensor([rows], values.to(p.dtype), p.shape, check_invariants=True)


def let_pass(optimizer, steps):
    """As many steps without gradients: they only lengthen a stretch of equal hyperparameters."""
    optimizer.step()
    clock = clock_of(optimizer)
    taken, *rest = clock.history.saved()
    clock.history = History((taken + steps - 1, *rest))


@pytest.mark.parametrize("fused", FUSED)
@pytest.mark.parametrize("gap", GAPS)
@pytest.mark.parametrize("weight_decay", [0.0, 0.01, 0.5])
@pytest.mark.parametrize("cls", [Tiger, Lion])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_gap_of_any_length(cls, gap, weight_decay, fused, dtype):
    lr = 1e-5
    p = table(dtype=dtype)
    optimizer = cls([p], lr=lr, weight_decay=weight_decay, lazy="exact", fused=fused)
    touch(p, [1, 3])
    optimizer.step()
    optimizer.flush()
    p.grad = None
    before, m = p.detach().double().clone(), optimizer.state[p]["exp_avg"].double().clone()
    let_pass(optimizer, gap)
    optimizer.flush()

    a = math.exp(gap * math.log1p(-lr * weight_decay))
    b = lr * gap if weight_decay == 0 else -math.expm1(gap * math.log1p(-lr * weight_decay))
    if weight_decay > 0:
        b /= weight_decay
    expected = a * before - b * torch.sign(m)
    relative = 1e-12 if dtype == torch.float64 else 1e-6
    scale = 1 + b
    torch.testing.assert_close(p.detach().double(), expected, rtol=0, atol=relative * scale)
    after = optimizer.state[p]["exp_avg"].double()
    decayed = m * math.exp(gap * math.log(optimizer.param_groups[0]["betas"][-1]))
    torch.testing.assert_close(after, decayed, rtol=1e-5, atol=2.3e-38)
    assert torch.equal(after.sign(), m.sign())
    last = optimizer.state[p]["last_step"]
    assert last.dtype == torch.int32
    t = gap + 1
    assert last.tolist() == [-1 - t, t, -1 - t, t, -1 - t, -1 - t]


@pytest.mark.parametrize("fused", FUSED)
def test_clocks_do_not_overflow(fused):
    p = table()
    optimizer = Tiger([p], lazy="decay", fused=fused)
    touch(p, [0])
    optimizer.step()
    clock = clock_of(optimizer)
    clock.history = History((2**31 - 1, *clock.history.saved()[1:]))
    before = p.detach().clone()
    with pytest.raises(OverflowError, match="2147483647"):
        optimizer.step()
    assert torch.equal(p.detach(), before)


@pytest.mark.parametrize("fused", FUSED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cls", [Tiger, Lion, AdamW])
def test_momentum_never_underflows_to_zero(cls, dtype, fused):
    p = table()
    optimizer = cls([p], lr=1e-6, lazy="decay", momentum_dtype=dtype, fused=fused)
    touch(p, [1])
    optimizer.step()
    m = optimizer.state[p]["exp_avg"].clone()
    p.grad = None
    let_pass(optimizer, 10**6)
    optimizer.flush()
    assert torch.equal(optimizer.state[p]["exp_avg"].sign(), m.sign())
    assert optimizer.state[p]["exp_avg"].abs().max() < 1e-6
    assert m[1].count_nonzero() == 5


@pytest.mark.parametrize("fused", FUSED)
@pytest.mark.parametrize("lazy", ["decay", "exact"])
def test_infinite_and_nan_momentum_stay(lazy, fused):
    p = table()
    optimizer = Tiger([p], lazy=lazy, fused=fused)
    touch(p, [1])
    optimizer.step()
    p.grad = None
    optimizer.state[p]["exp_avg"][1] = torch.tensor([math.inf, -math.inf, math.nan, 1.0, 0.0])
    let_pass(optimizer, 10**6)
    optimizer.flush()
    m = optimizer.state[p]["exp_avg"][1]
    assert m[:2].tolist() == [math.inf, -math.inf] and m[2].isnan() and m[3] > 0 and m[4] == 0
    finite = p.detach()[1].isfinite().tolist()
    assert finite == [True, True, lazy == "decay", True, True]


@pytest.mark.parametrize("fused", FUSED)
def test_a_beta_of_zero_forgets_the_momentum(fused):
    p = table()
    optimizer = Lion([p], betas=(0.9, 0.0), lazy="decay", fused=fused)
    touch(p, [1])
    optimizer.step()
    p.grad = None
    optimizer.step()
    optimizer.flush()
    assert optimizer.state[p]["exp_avg"][1].abs().max() == 0


def test_constant_hyperparameters_take_one_setting_and_flush_none():
    p = table()
    optimizer = Tiger([p], lr=torch.tensor(1e-3), lazy="exact")
    history = None
    for step in range(60):
        touch(p, [step % 6], step)
        if step == 40:
            optimizer.param_groups[0]["lr"].mul_(0.5)  # in place
        optimizer.step()
    history = clock_of(optimizer).history
    assert [s[0] for s in history.settings] == [1, 41]
    optimizer.flush()
    assert history.settings == [] and (history.steps, history.begin) == (60, 60)
    assert len(repr(optimizer)) < 2000


def test_history_survives_copies_and_plain_numbers():
    history = History()
    for step in range(20):
        history.advance(1e-3 / (1 + step // 7), 0.1, (0.9, 0.99))
    for other in (
        History(history.saved()),
        copy.deepcopy(history),
        pickle.loads(pickle.dumps(history)),
    ):
        assert (other.steps, other.begin, other.settings) == (20, 0, history.settings)
    assert all(type(x) is float for x in history.saved())


def test_the_definition_equals_steps_one_by_one():
    history = History()
    a, b, p1, p2 = [1.0], [0.0], [1.0], [1.0]
    for step in range(200):
        lr, wd = 1e-2 * (1 + math.sin(step / 9)), 0.3 * (step // 50)
        betas = (0.9, 0.99) if step % 30 else (0.8, 0.95)
        history.advance(lr, wd, betas)
        a = [x * (1 - lr * wd) for x in a] + [1.0]
        b = [x * (1 - lr * wd) + lr for x in b] + [0.0]
        p1 = [x * betas[0] for x in p1] + [1.0]
        p2 = [x * betas[1] for x in p2] + [1.0]
    missed = history.missed(torch.arange(201))
    for got, expected in (
        (missed.decay, a),
        (missed.drift, b),
        (missed.betas[0], p1),
        (missed.betas[1], p2),
    ):
        torch.testing.assert_close(got, torch.tensor(expected).double(), rtol=1e-6, atol=0)


RUN = """
import sys, torch, math
from tiger_ext import AdamW, Lion, Tiger

def train(optimizer, p, steps):
    for step in steps:
        g = torch.Generator().manual_seed(step)
        optimizer.param_groups[0]["lr"] = 1e-2 * (1.1 + math.cos(step / 5))
        p.grad = None
        if step % 4:
            rows = torch.randint(40, (1, 6), generator=g)
            p.grad = torch.sparse_coo_tensor(
                rows, torch.randn(6, 8, generator=g), p.shape, check_invariants=True)
        optimizer.step()

if __name__ == "__main__":
    cls, lazy, source, target, interrupted = sys.argv[1:]
    saved = torch.load(source, weights_only=True)
    p = torch.nn.Parameter(saved["p"])
    optimizer = {"Tiger": Tiger, "Lion": Lion, "AdamW": AdamW}[cls]([p], lazy=lazy)
    optimizer.load_state_dict(saved["optimizer"])
    train(optimizer, p, range(int(interrupted), 40))
    torch.save({"p": p.detach(), "optimizer": optimizer.state_dict()}, target)
"""


@pytest.mark.parametrize(
    "cls,lazy",
    [(c, m) for c in (Tiger, Lion) for m in ("frozen", "decay", "exact")]
    + [(AdamW, "frozen"), (AdamW, "decay")],
)
def test_a_run_continued_in_a_fresh_process_is_the_same_bit_by_bit(cls, lazy, tmp_path):
    script = tmp_path / "run.py"
    script.write_text(RUN)
    scope: dict = {"__name__": "run"}
    exec(RUN, scope)
    p = torch.nn.Parameter(torch.randn(40, 8, generator=torch.Generator().manual_seed(0)))
    optimizer = cls([p], lazy=lazy)
    interrupted = random.Random(cls.__name__ + lazy).randrange(1, 39)
    scope["train"](optimizer, p, range(interrupted))
    torch.save({"p": p.detach(), "optimizer": optimizer.state_dict()}, tmp_path / "a.pt")
    scope["train"](optimizer, p, range(interrupted, 40))
    arguments = [cls.__name__, lazy, str(tmp_path / "a.pt"), str(tmp_path / "b.pt")]
    arguments.append(str(interrupted))
    subprocess.run([sys.executable, str(script), *arguments], check=True)
    other = torch.load(tmp_path / "b.pt", weights_only=True)
    assert torch.equal(other["p"], p.detach())
    ours, theirs = optimizer.state_dict(), other["optimizer"]
    assert ours["param_groups"] == theirs["param_groups"]
    for name, value in ours["state"][0].items():
        assert value.dtype == theirs["state"][0][name].dtype
        assert torch.equal(value, theirs["state"][0][name])
    if lazy != "frozen":
        assert ours["state"][0]["last_step"].dtype == torch.int32
