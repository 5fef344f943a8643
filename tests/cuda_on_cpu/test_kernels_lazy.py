# SPDX-License-Identifier: Apache-2.0
"""Lazy modes on a device: rows that catch up there, against the CPU's kernels."""

import contextlib
import copy
import functools
import math
import pickle

import emulation
import pytest
import torch
from both import (
    CPU,
    DEVICE,
    ON_GPU,
    Group,
    Problem,
    Side,
    assert_agree,
    cpu_kernels,
    device_step,
    entries,
    moved,
    synchronize,
)
from cases import COMPACT_RULES, FLOATS, RULES, clock_of, dense_grad, parameter, views
from torch.nn import Parameter

from tiger_ext.reading import Reader

F32, F64, BF16, F16 = FLOATS.values()
MODES = [(rule, mode) for rule in RULES[:2] for mode in ("decay", "exact")]
MODES += [(rule, "decay") for rule in RULES[2:]]
MODES += [(COMPACT_RULES[0], "exact"), *((rule, "decay") for rule in COMPACT_RULES[1:])]
every_mode = pytest.mark.parametrize(
    "rule,lazy", MODES, ids=[f"{rule.name}-{mode}" for rule, mode in MODES]
)


def read(opt, p, ids):
    """Do what a tracked module does before it reads rows."""
    Reader(opt, p)(ids, False)


def rate(number):
    """The learning rate of a step: it changes at some, and not at others."""
    return 0.02 * (1 + number // 3)


def table(rule, lazy, params, grads, **options):
    """Make a problem with rows that are behind."""
    return Problem([Group(rule, params, {"lazy": lazy, **options})], grads)


def touches(p, number, count=5, **options):
    """Make a gradient of some rows; of none in every fourth step."""
    generator = torch.Generator().manual_seed(number)
    if number % 4 == 3:
        return None
    return entries(p, torch.randint(len(p), (count,), generator=generator), **options)


def agree(found, expected, label, steps):
    """Compare snapshots: on a GPU exp and log may differ from the host's in the last bit."""
    assert found.keys() == expected.keys()
    for name, t in found.items():
        if ON_GPU and t.dtype == torch.int8:  # rounded at random: to the other neighbour
            assert bool(((t.int() - expected[name].int()).abs() <= steps).all())
            continue
        if not (ON_GPU and t.is_floating_point()):
            assert_agree(t, expected[name], f"{label}: {name}")
            continue
        eps = torch.finfo(torch.promote_types(t.dtype, F32)).eps
        if t.dtype in (BF16, F16):
            eps = torch.finfo(t.dtype).eps
        torch.testing.assert_close(
            t, expected[name], rtol=4 * steps * eps, atol=4 * steps * eps, equal_nan=True
        )


def advance(side, number, step=None, lr=None):
    group = side.opt.param_groups[0]
    group["lr"] = rate(number) if lr is None else lr
    side.step(number, step)


def taken(side, flush=()):
    """Take a problem's steps; return a snapshot after each, and after each flush."""
    snapshots = []
    for number in range(len(side.task.steps)):
        advance(side, number)
        snapshots.append(side.snapshot())
        if number in flush:
            side.opt.flush()
            snapshots.append(side.snapshot())
    side.opt.flush()
    return [*snapshots, side.snapshot()]


def compare(task, flush=()):
    """Take a problem's steps on both sides, which must agree throughout."""
    with cpu_kernels():
        expected = taken(Side(task, CPU), flush)
    device = Side(task, DEVICE)
    for k, (found, wanted) in enumerate(zip(taken(device, flush), expected, strict=True)):
        agree(found, wanted, f"snapshot {k}", k + 1)
    assert clock_of(device.opt).history.on_devices


# ------------------------------------------------------------------------------------------ rows


@every_mode
@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=list(FLOATS))
@pytest.mark.parametrize("dim", [1, 7, 64, 200])
def test_rows_catch_up(rule, lazy, dtype, dim):
    p = parameter(30, dim, dtype=dtype)
    compare(table(rule, lazy, [p], [[touches(p, n)] for n in range(9)]), flush=(6,))


@every_mode
@pytest.mark.parametrize("dim", [1024, 1025, 1500])
def test_long_rows(rule, lazy, dim):
    p = parameter(6, dim)
    compare(table(rule, lazy, [p], [[touches(p, n, 2)] for n in range(6)]))


@every_mode
def test_mixed_storage(rule, lazy):
    p = parameter(20, 24, dtype=BF16)
    grads = [[touches(p, n, dtype=F32)] for n in range(6)]
    compare(table(rule, lazy, [p], grads, momentum_dtype=F32))


@every_mode
@views("view", 2)
def test_views(rule, lazy, view):
    p = Parameter(view.make(torch.randn(12, 10)))
    compare(table(rule, lazy, [p], [[touches(p, n)] for n in range(6)]), flush=(3,))


@every_mode
def test_many_entries_of_a_row_and_several_tables(rule, lazy):
    params = [parameter(50, 20), parameter(300, 8), parameter(5, 6, 2, dtype=F64)]
    grads = []
    for n in range(5):
        hot = torch.cat([torch.randint(50, (200,)), torch.full((600,), n % 2)])
        grads.append(
            [
                entries(params[0], hot) if n != 2 else None,
                touches(params[1], n, 40, coalesced=False),
                entries(params[2], torch.tensor([[n % 5, 4, 4], [0, n % 6, n % 6]])),
            ]
        )
    compare(table(rule, lazy, params, grads))


@every_mode
def test_coalesced_gradients_and_empty_ones(rule, lazy):
    p = parameter(40, 12)
    rows = [torch.arange(n, 40, 3) for n in range(5)]
    grads = [[entries(p, r, coalesced=True)] for r in rows]
    grads.insert(2, [entries(p, [])])
    compare(table(rule, lazy, [p], grads))


# ------------------------------------------------------------------------------ strided gradients


@every_mode
@views("view", 2)
def test_strided_gradients_after_sparse_ones(rule, lazy, view):
    p = Parameter(view.make(torch.randn(14, 6)))
    grads = [[dense_grad(p) if n in (3, 4, 6) else touches(p, n)] for n in range(9)]
    compare(table(rule, lazy, [p], grads))


@every_mode
def test_parameters_that_are_one_row(rule, lazy):
    params = [parameter(3000), parameter(1), parameter(0), Parameter(torch.tensor(0.5))]
    grads = [[None if (n + k) % 3 == 0 else dense_grad(p) for k, p in enumerate(params)]
             for n in range(7)]  # fmt: skip
    compare(table(rule, lazy, params, grads))


@every_mode
@pytest.mark.parametrize("dim", [5, 64, 1100])
def test_rows_nonzero(rule, lazy, dim):
    p = parameter(20, dim)
    grads = []
    for n in range(6):
        g = torch.zeros(20, dim)
        g[torch.tensor([n, 7, 19 - n])] = torch.randn(3, dim)
        grads.append([g])
    compare(table(rule, lazy, [p], grads, rows="nonzero"))


# ---------------------------------------------------------------------------- options beside them


@every_mode
@pytest.mark.parametrize("nonfinite", ["skip", "shrink"])
@pytest.mark.parametrize("layout", ["sparse", "rows", "dense"])
def test_nonfinite_rows(rule, lazy, nonfinite, layout):
    p = parameter(12, 9)
    grads = []
    for n in range(8):
        g = touches(p, n)
        if g is not None and layout == "sparse" and n % 2 == 0:
            g._values()[0, 3] = math.nan
        elif g is not None and layout != "sparse":
            g = g.to_dense() if layout == "rows" else dense_grad(p)
            if n % 2 == 0:
                g[n, 0] = math.inf
        grads.append([g])
    options = {"rows": "nonzero"} if layout == "rows" else {}
    compare(table(rule, lazy, [p], grads, nonfinite=nonfinite, **options))


@pytest.mark.parametrize("lazy", ["decay", "exact"])
@pytest.mark.parametrize("layout", ["sparse", "dense", "rows"])
@pytest.mark.parametrize("rule", [RULES[0], COMPACT_RULES[0]], ids=lambda r: r.name)
def test_accumulation_windows(lazy, layout, rule):
    p = parameter(15, 9)
    grads = []
    for n in range(12):
        g = touches(p, n)
        grads.append([g if layout == "sparse" or g is None else g.to_dense()])
    options = {"rows": "nonzero"} if layout == "rows" else {}
    compare(table(rule, lazy, [p], grads, accumulation_steps=3, **options), flush=(4,))


@every_mode
def test_a_changing_sparse_dim(rule, lazy):
    p = parameter(4, 3, 5)
    grads = []
    for n in range(12):
        g = torch.zeros(4, 3, 5)
        g[n % 4, n % 3] = torch.randn(5)
        grads.append([g.to_sparse(1 + n // 2 % 3)])
    compare(table(rule, lazy, [p], grads))


# ------------------------------------------------------------------------- what the device counts


@every_mode
def test_cancelled_steps_did_not_happen(rule, lazy):
    """The clock is the device's: the host is never told which steps were cancelled."""
    params = [parameter(30, 6), parameter(9, 4), parameter(50)]
    grads = [[touches(params[0], n), touches(params[1], n + 1),
              dense_grad(params[2]) if n % 2 else None] for n in range(10)]  # fmt: skip
    task = table(rule, lazy, params, grads)
    amp, plain = Side(task, DEVICE), Side(task, DEVICE)
    found_inf = torch.zeros((), device=DEVICE)
    cancelled = (0, 3, 4, 8)
    for number in range(10):
        found_inf.fill_(number in cancelled)
        advance(amp, number, functools.partial(device_step, found_inf=found_inf))
        if number not in cancelled:
            advance(plain, number)
    history = clock_of(amp.opt).history
    assert history._behind
    for name, t in plain.snapshot().items():
        assert_agree(amp.snapshot()[name], t, name)
    assert history.saved() == clock_of(plain.opt).history.saved()
    assert not history._behind and history.steps == 6
    for side in (amp, plain):
        side.opt.flush()
    for name, t in plain.snapshot().items():
        assert_agree(amp.snapshot()[name], t, f"{name} after the flush")


@every_mode
@pytest.mark.parametrize("dtype", [F32, F64], ids=["float32", "float64"])
def test_the_learning_rate_is_read_there(rule, lazy, dtype):
    p = parameter(30, 6)
    task = table(rule, lazy, [p], [[touches(p, n)] for n in range(9)])
    by_tensor, by_float = Side(task, DEVICE), Side(task, DEVICE)
    lr = torch.zeros((), dtype=dtype, device=DEVICE)
    for number in range(9):
        lr.fill_(rate(number))
        advance(by_tensor, number, device_step, lr)
        advance(by_float, number, None, float(lr))
    for side in (by_tensor, by_float):
        side.opt.flush()
    for name, t in by_float.snapshot().items():
        assert_agree(by_tensor.snapshot()[name], t, name)


@pytest.mark.parametrize("lazy", ["decay", "exact"])
@pytest.mark.parametrize("by", ["float", "tensor"])
def test_a_history_that_outgrows_its_memory(lazy, by):
    p = parameter(40, 4, dtype=F64)
    grads = [[entries(p, [n % 40]) if n < 40 else None] for n in range(2100)]
    grads += [[entries(p, [5, 6])]]
    task = table(RULES[0], lazy, [p], grads)
    with cpu_kernels():
        cpu = Side(task, CPU)
    device = Side(task, DEVICE)
    lr = torch.zeros((), dtype=F64, device=DEVICE)
    for number, (grad,) in enumerate(grads):
        value = 1e-3 * (1 + number % 5)
        lr.fill_(value)
        for side, own in ((cpu, value), (device, lr if by == "tensor" else value)):
            side.params[0].grad = None if grad is None else moved(grad, side.device)
            side.opt.param_groups[0]["lr"] = own
        with cpu_kernels():
            cpu.opt.step()
        if by == "tensor":
            device_step(device.opt)
        else:
            device.opt.step()
    agree(device.snapshot(), cpu.snapshot(), "at the end", 50)
    device.opt.flush()
    with cpu_kernels():
        cpu.opt.flush()
    agree(device.snapshot(), cpu.snapshot(), "after the flush", 50)


@every_mode
@pytest.mark.parametrize("how", ["state_dict", "deepcopy", "pickle"])
def test_copies_go_on_alike(rule, lazy, how):
    p = parameter(30, 6)
    task = table(rule, lazy, [p], [[touches(p, n)] for n in range(12)])
    side, twin = Side(task, DEVICE), Side(task, DEVICE)
    found_inf = torch.zeros((), device=DEVICE)
    step = functools.partial(device_step, found_inf=found_inf)
    for number in range(6):
        found_inf.fill_(number == 2)
        advance(side, number, step)
    if how == "state_dict":
        twin.params[0].data.copy_(side.params[0])
        twin.opt.load_state_dict(side.opt.state_dict())
    else:
        copied = copy.deepcopy if how == "deepcopy" else lambda x: pickle.loads(pickle.dumps(x))
        twin.opt = copied(side.opt)
        twin.params = twin.opt.param_groups[0]["params"]
    for number in range(6, 12):
        found_inf.fill_(number == 8)
        for each in (side, twin):
            advance(each, number, step)
        for name, t in side.snapshot().items():
            assert_agree(twin.snapshot()[name], t, name)


@every_mode
def test_a_state_dict_travels_from_the_cpu_and_back(rule, lazy):
    p = parameter(30, 6)
    task = table(rule, lazy, [p], [[touches(p, n)] for n in range(12)])
    with cpu_kernels():
        expected = taken(Side(task, CPU))[-1]
        there = Side(task, CPU)
        for number in range(4):
            advance(there, number)
    for device, kernels, numbers in (
        (DEVICE, contextlib.nullcontext(), range(4, 8)),
        (CPU, cpu_kernels(), range(8, 12)),
    ):
        saved = there.opt.state_dict()
        traveller = Side(task, device)
        traveller.params[0].data.copy_(there.params[0])
        there = traveller
        with kernels:
            there.opt.load_state_dict(saved)
            for number in numbers:
                advance(there, number)
    with cpu_kernels():
        there.opt.flush()
    agree(there.snapshot(), expected, "after the journey", 12)


@pytest.mark.parametrize("rates", [(0.02, 4.0), (4.0,)], ids=["later", "first"])
def test_a_rate_that_is_too_large_is_reported_later(rates):
    p = Parameter(torch.randn(30, 4, device=DEVICE))
    opt = RULES[0]([p], lazy="exact")
    for value in rates:
        opt.param_groups[0]["lr"] = torch.tensor(value, device=DEVICE)
        p.grad = moved(entries(torch.randn(30, 4), [1, 2]), DEVICE)
        device_step(opt)
    synchronize()
    with pytest.raises(ValueError, match="lr \\* weight_decay >= 1"):
        opt.step()
    opt.param_groups[0]["lr"] = 0.02
    opt.step()
    read(opt, p, torch.arange(30, device=DEVICE))
    opt.flush()
    assert bool(p.isfinite().all())


def test_a_counter_without_gradients_counts_what_happened():
    """AdamW counts every step of its group in a lazy mode."""
    params = [parameter(20, 4), parameter(7, 3)]
    grads = [[touches(params[0], 0), touches(params[1], 0)]]
    grads += [[touches(params[0], n), None] for n in (1, 2, 4, 5)]
    side = Side(table(RULES[2], "decay", params, grads), DEVICE)
    found_inf = torch.zeros((), device=DEVICE)
    for number in range(5):
        found_inf.fill_(number == 3)
        advance(side, number, functools.partial(device_step, found_inf=found_inf))
    assert [int(side.opt.state[p]["step"]) for p in side.params] == [4, 4]


def test_a_parameter_that_joins_when_only_the_device_knows_the_step():
    params = [parameter(20, 4), parameter(7, 3)]
    grads = [[touches(params[0], n), touches(params[1], n) if n > 3 else None] for n in range(8)]
    task = table(RULES[2], "decay", params, grads)
    amp, plain = Side(task, DEVICE), Side(task, DEVICE)
    found_inf = torch.zeros((), device=DEVICE)
    for number in range(8):
        found_inf.fill_(number in (1, 2))
        advance(amp, number, functools.partial(device_step, found_inf=found_inf))
        if number not in (1, 2):
            advance(plain, number)
    for name, t in plain.snapshot().items():
        assert_agree(amp.snapshot()[name], t, name)


# ------------------------------------------------------------------------------------------ reads


@every_mode
@pytest.mark.parametrize("dim", [3, 64, 1100])
def test_tracked_reads(rule, lazy, dim):
    """Ids repeat, within a block and far apart; those that are no row are dropped."""
    p = parameter(50, dim)
    task = table(rule, lazy, [p], [[touches(p, n, 20)] for n in range(6)])

    def reads(side):
        for number in range(6):
            advance(side, number)
            ids = torch.randint(50, (40, 30), generator=torch.Generator().manual_seed(number))
            ids = ids.clamp(max=20).to(torch.int32 if number % 2 else torch.int64)
            read(side.opt, side.params[0], ids.to(side.device))
            yield side.snapshot()

    with cpu_kernels():
        expected = list(reads(Side(task, CPU)))
    side = Side(task, DEVICE)
    for k, found in enumerate(reads(side)):
        agree(found, expected[k], f"read {k}", k + 1)
    before = side.snapshot()
    read(side.opt, side.params[0], torch.tensor([-1, 50, 2**40], device=DEVICE))
    synchronize()
    for name, t in side.snapshot().items():
        assert_agree(t, before[name], name)


def test_tables_with_dense_gradients_are_not_looked_at():
    """Nor written, so that graphs which saved them stay valid; with AMP, too."""
    p = parameter(9, 4)
    grads = [[dense_grad(p)], [dense_grad(p)], [touches(p, 0)], [dense_grad(p)], [dense_grad(p)]]
    side = Side(table(RULES[0], "exact", [p], grads), DEVICE)
    module = torch.nn.Embedding(9, 4)
    module.weight = side.params[0]
    side.opt.track(module)
    found_inf = torch.zeros((), device=DEVICE)
    looked = []
    for number in range(5):
        found_inf.fill_(number == 1)
        advance(side, number, functools.partial(device_step, found_inf=found_inf))
        version = side.params[0]._version
        module(torch.arange(9, device=DEVICE))
        looked.append(side.params[0]._version > version)
        if number == 3:
            side.opt.flush()
    assert looked == [False, False, True, True, False]


# -------------------------------------------------------------------------------- captured graphs


needs_emulation = pytest.mark.skipif(ON_GPU, reason="test_contract_gpu.py captures graphs")


@needs_emulation
def test_a_captured_history_does_not_move_and_says_when_it_is_full():
    p = Parameter(torch.randn(8, 4))
    opt = RULES[0]([p], lazy="exact")
    lr = torch.tensor(0.02)
    opt.param_groups[0]["lr"] = lr
    p.grad = entries(p.detach(), [1])
    for _ in range(1500):  # as long as it does not change it takes no room
        device_step(opt)
    with emulation.capturing():
        for number in range(1023):
            lr.fill_(0.01 + 1e-5 * number)
            device_step(opt)
        opt.step()  # no change: no fault
        lr.fill_(0.5)
        device_step(opt)
        with pytest.raises(RuntimeError, match="more often"):
            opt.state_dict()
        with pytest.raises(RuntimeError, match=r"flush\(\).*1024 times"):
            opt.step()
        opt.flush()
        assert clock_of(opt).history.settings == []
        lr.fill_(0.25)
        device_step(opt)
        assert clock_of(opt).history.settings[0][1] == 0.25
    for number in range(1500):  # between replays it may move
        lr.fill_(0.01 + 1e-5 * number)
        device_step(opt)
    opt.step()
    assert len(clock_of(opt).history.settings) >= 1500


@needs_emulation
def test_a_history_cannot_begin_within_a_capture():
    p = Parameter(torch.randn(8, 4))
    opt = RULES[0]([p], lazy="exact")
    p.grad = entries(p.detach(), [1])
    before = p.detach().clone()
    with emulation.capturing(), pytest.raises(RuntimeError, match="before the capture"):
        opt.step()
    assert torch.equal(p.detach(), before)
    opt.step()
    assert clock_of(opt).history.steps == 1
