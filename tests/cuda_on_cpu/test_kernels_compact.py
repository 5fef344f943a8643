# SPDX-License-Identifier: Apache-2.0
"""State that costs little: the CUDA kernels give the CPU's bits, and write nothing else.

The lazy modes of the same rules are in test_kernels_lazy.py.
"""

import contextlib
import functools
import math

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
    assert_close,
    compare,
    cpu_kernels,
    device_step,
    entries,
    poisoned_memory,
    problem,
    repeat,
    shifted,
)
from cases import COMPACT_RULES, FLOATS, clock_of, dense_grad, floats, parameter, views
from oracle import same_bits
from torch.nn import Parameter

F32, F64, BF16, F16 = FLOATS.values()
every_rule = pytest.mark.parametrize("rule", COMPACT_RULES, ids=lambda r: r.name)
# Tiger and Lion: they have directions, relative rates and (Tiger) windows.
SIGNED = [rule for rule in COMPACT_RULES if not rule.name.startswith("adamw")]


def skewed(count, rows):
    """Make indices of which a few make up most."""
    return (torch.rand(count) ** 6 * rows).long()


def some_rows(p, *rows):
    """Make a strided gradient that is zero but for these rows."""
    grad = torch.zeros_like(p)
    grad[list(rows)] = dense_grad(p)[list(rows)]
    return grad


# ------------------------------------------------------------------------------------------ rows


@every_rule
@pytest.mark.parametrize("dim", [1, 3, 8, 64, 100, 128, 255, 256, 264, 300, 512, 1000, 2056])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["float32", "bfloat16"])
def test_sparse_rows(rule, dim, dtype):
    p = parameter(40, dim, dtype=dtype)
    few = skewed(max(20_000 // dim, 60), 40)
    hot = torch.cat([few, torch.full((300,), 17)])[torch.randperm(len(few) + 300)]
    compare(problem(rule, [p], [[entries(p, ids)] for ids in (hot, [39], few, torch.arange(40))]))


@every_rule
@floats("param")
@floats("grad")
@pytest.mark.parametrize("layout", ["sparse", "dense"])
def test_mixtures_of_dtypes(rule, param, grad, layout):
    params = [parameter(30, 19, dtype=param), shifted(parameter(30, 64, dtype=param), 3)]

    def make(p):
        if layout == "dense":
            return dense_grad(p, grad)
        return entries(p, skewed(90, 30), dtype=grad)

    compare(problem(rule, params, repeat(make, params, 2)))


@every_rule
@pytest.mark.parametrize("rows", ["nonzero", None])
@pytest.mark.parametrize("dtype", [F32, F16], ids=["float32", "float16"])
@pytest.mark.parametrize("dim", [1, 3, 72, 300])
def test_rows_of_strided_gradients(rule, rows, dtype, dim):
    p = parameter(14, dim, dtype=dtype)
    grads = [[entries(p, [1, 5, 5])], *[[some_rows(p, n, 7, 13 - n)] for n in range(3)]]
    compare(problem(rule, [p], grads, rows=rows))


@every_rule
def test_tracked_rows(rule):
    start, factors = torch.randn(12, 40).to(BF16), torch.randn(3, 40)
    weights = []
    for device, kernels in ((CPU, cpu_kernels()), (DEVICE, contextlib.nullcontext())):
        with kernels:
            table = torch.nn.Embedding(12, 40, _weight=start.clone()).to(device)
            opt = rule([table.weight], rows="tracked", fused=True)
            opt.track(table)
            for n in range(3):
                opt.zero_grad()
                used = table(torch.tensor([n, 7, 9], device=device)).float()
                (used * factors.to(device) * (n > 0)).sum().backward()  # at first a zero gradient
                opt.step()
            weights.append(table.weight)
    if ON_GPU:
        assert_close(weights[1], weights[0], 3, "weight")
    else:
        assert_agree(weights[1], weights[0], "weight")
    assert same_bits(weights[1].detach().cpu()[10], start[10])
    assert not same_bits(weights[1].detach().cpu()[0], start[0])  # it was used


@every_rule
@views("view", 3)
@pytest.mark.parametrize("layout", ["sparse", "dense"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["float32", "bfloat16"])
def test_views(rule, view, layout, dtype):
    p = Parameter(view.make(torch.randn(7, 12, 40).to(dtype)))

    def make(p):
        return dense_grad(p) if layout == "dense" else entries(p, skewed(30, 7))

    compare(problem(rule, [p], repeat(make, [p])))


@every_rule
@pytest.mark.parametrize("sparse_dim", [1, 2, 3])
def test_every_sparse_dim(rule, sparse_dim):
    p = parameter(4, 3, 5, dtype=BF16)
    grads = []
    for n in range(4):
        g = torch.zeros(4, 3, 5)
        g[n % 4, n % 3] = torch.randn(5)
        grads.append([g.to(BF16).to_sparse(sparse_dim)])
    compare(problem(rule, [p], grads))


@every_rule
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (1, 1), (1,), ()], ids=str)
def test_parameters_of_few_elements(rule, shape):
    p, other = parameter(*shape), parameter(3, 2)
    steps = [[dense_grad(p), dense_grad(other)]]
    if shape:
        steps.append([entries(p, [0, 0] if shape[0] else []), entries(other, [2, 0])])
    compare(problem(rule, [p, other], steps))


def test_several_tables_in_a_step():
    groups = [
        Group(rule, [parameter(50, 24, dtype=d), parameter(600, dtype=d)])
        for rule in COMPACT_RULES
        for d in (F32, BF16, F16)
    ]
    params = [p for g in groups for p in g.params]
    steps = [
        [entries(p, skewed(100, 50)) if p.dim() == 2 else dense_grad(p) for p in params]
        for _ in range(3)
    ]
    with poisoned_memory():
        compare(Problem(groups, steps))


# ---------------------------------------------------------------------------------------- blocks


@every_rule
@pytest.mark.parametrize(
    "shape",
    [(1,), (7,), (8,), (255,), (256,), (257,), (264,), (511,), (70_000,), (3, 1000), (40, 64)],
    ids=str,
)
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=["float32", "bfloat16", "float16"])
def test_blocks_of_strided_gradients(rule, shape, dtype):
    p = parameter(*shape, dtype=dtype)
    compare(problem(rule, [p], repeat(dense_grad, [p])))


@every_rule
@pytest.mark.parametrize("start", [1, 2, 4, 8])
def test_blocks_that_begin_anywhere(rule, start):
    p = shifted(parameter(2048, dtype=BF16), start)
    compare(problem(rule, [p], repeat(dense_grad, [p])))


# --------------------------------------------------------------------------------------- options


@every_rule
@pytest.mark.parametrize("nonfinite", ["propagate", "skip", "shrink", "raise"])
@pytest.mark.parametrize("layout", ["sparse", "rows", "dense"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("value", [math.nan, -math.inf], ids=str)
def test_nonfinite_gradients(rule, nonfinite, layout, dtype, value):
    p = parameter(9, 300, dtype=dtype)
    grads = []
    for n in range(4):
        g = entries(p, [3, 3, n, 8]) if layout == "sparse" else some_rows(p, 3, n, 8)
        if n % 2 == 0 and nonfinite != "raise":
            (g._values() if g.is_sparse else g)[n, 290 - n] = value
        grads.append([g])
    options = {"rows": "nonzero"} if layout == "rows" else {}
    task = problem(rule, [p], grads, nonfinite=nonfinite, **options)
    if nonfinite != "raise":
        compare(task)
        return
    side = Side(task, DEVICE)
    for number in range(2):
        side.step(number)
    before = side.snapshot()
    g = side.task.steps[2][0]
    (g._values() if g.is_sparse else g)[-1, 7] = value
    with pytest.raises(FloatingPointError):
        side.step(2)
    for name, t in side.snapshot().items():
        assert_agree(t, before[name], name)


@pytest.mark.parametrize("rule", SIGNED, ids=lambda r: r.name)
@pytest.mark.parametrize("direction", ["clip", "power", "atan"])
@pytest.mark.parametrize("layout", ["sparse", "dense"])
def test_directions(rule, direction, layout):
    p = parameter(9, 64, dtype=BF16)

    def make(p):
        return dense_grad(p) if layout == "dense" else entries(p, [3, 3, 8])

    compare(problem(rule, [p], repeat(make, [p]), direction=direction))


@pytest.mark.parametrize("rule", SIGNED, ids=lambda r: r.name)
@pytest.mark.parametrize("scale", ["rms", "rms_rows"])
@pytest.mark.parametrize("direction", ["sign", "clip"])
@pytest.mark.parametrize("layout", ["sparse", "dense"])
def test_relative_rates(rule, scale, direction, layout):
    """The sums of squares have another order than the CPU's: the values are close."""
    p = parameter(9, 300)
    options = {"scale": scale, "direction": direction}
    if direction == "clip":
        options["direction_scale"] = 0.5  # nothing is cut off

    def make(p):
        return dense_grad(p) if layout == "dense" else entries(p, [3, 3, 8])

    task = problem(rule, [p], repeat(make, [p]), **options)
    with cpu_kernels():
        cpu = Side(task, CPU)
        for number in range(3):
            cpu.step(number)
        expected = cpu.snapshot()
    device = Side(task, DEVICE)
    for number in range(3):
        device.step(number)
    for name, t in device.snapshot().items():
        if name == "parameter 0":
            torch.testing.assert_close(t, expected[name], rtol=1e-5, atol=1e-6)
        else:
            assert_agree(t, expected[name], name)


@pytest.mark.parametrize(
    "rule", [r for r in SIGNED if r.name.startswith("tiger")], ids=lambda r: r.name
)
@pytest.mark.parametrize("layout", ["sparse", "rows", "dense"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["float32", "bfloat16"])
def test_accumulation_windows(rule, layout, dtype):
    params = [parameter(12, 300, dtype=dtype), parameter(12, 3, dtype=dtype)]
    grads = []
    for n in range(7):
        if layout == "sparse":
            grads.append([entries(p, [n, n, 7, 11 - n]) if n != 3 else None for p in params])
        else:
            grads.append([some_rows(p, n, 7, 11 - n) if n != 3 else None for p in params])
    options = {"rows": "nonzero"} if layout == "rows" else {}
    compare(problem(rule, params, grads, accumulation_steps=3, **options))


@every_rule
def test_maximize(rule):
    p = parameter(9, 300, dtype=BF16)
    compare(problem(rule, [p], [[entries(p, [1, 1, 4])], [dense_grad(p)]], maximize=True))


# ------------------------------------------------------------------------- what the device knows


@every_rule
@pytest.mark.parametrize("lazy", ["frozen", "decay"])
def test_cancelled_steps_are_not_counted(rule, lazy):
    """The counter is the device's, and with it the random bits."""
    params = [parameter(20, 40, dtype=BF16), parameter(700, dtype=BF16)]
    steps = [[entries(params[0], skewed(30, 20)), dense_grad(params[1])] for _ in range(6)]
    task = problem(rule, params, steps, lazy=lazy)
    amp, plain = Side(task, DEVICE), Side(task, DEVICE)
    found_inf = torch.zeros((), device=DEVICE)
    scale = torch.ones((), device=DEVICE)
    for number in range(6):
        found_inf.fill_(number in (0, 3))
        amp.step(number, functools.partial(device_step, found_inf=found_inf, grad_scale=scale))
        if number not in (0, 3):
            plain.step(number)
    found, wanted = amp.snapshot(), plain.snapshot()
    assert found.keys() == wanted.keys()
    for name, t in found.items():
        assert_agree(t, wanted[name], name)
    counters = [t for name, t in found.items() if name.endswith("'s step")]
    assert [int(t) for t in counters] == [4, 4]


@every_rule
def test_scaled_gradients_and_a_learning_rate_on_the_device(rule):
    params = [parameter(20, 40, dtype=BF16), parameter(700, dtype=BF16)]
    steps = [[entries(params[0], skewed(30, 20)), dense_grad(params[1])] for _ in range(3)]
    task = problem(rule, params, steps)
    there, here = Side(task, DEVICE), Side(task, DEVICE)
    scale = torch.tensor(4.0, device=DEVICE)
    there.opt.param_groups[0]["lr"] = torch.tensor(0.02, dtype=F64, device=DEVICE)
    for number in range(3):
        there.step(number, functools.partial(device_step, grad_scale=scale))
        here.opt.grad_scale, here.opt.found_inf = scale, torch.zeros((), device=DEVICE)
        here.step(number)
    for name, t in there.snapshot().items():
        assert_agree(t, here.snapshot()[name], name)


@every_rule
def test_bits_do_not_depend_on_the_order_in_which_blocks_run(rule):
    p, q = parameter(60, 100, dtype=BF16), parameter(3000, dtype=F16)
    task = problem(rule, [p, q], [[entries(p, skewed(500, 60)), dense_grad(q)] for _ in range(2)])
    sides = []
    for seed in (1, 2):
        if not ON_GPU:  # which takes an order of its own each time
            emulation.seed(seed)
        side = Side(task, DEVICE)
        for number in range(2):
            side.step(number)
        sides.append(side.snapshot())
    for name, t in sides[0].items():
        assert_agree(t, sides[1][name], name)


@every_rule
def test_a_flush_brings_all_rows_up_to_date(rule):
    params = [parameter(300, 40, dtype=BF16), parameter(900, dtype=BF16)]
    steps = [[entries(params[0], [2, 299]), dense_grad(params[1])], [None, None], [None, None]]
    task = problem(rule, params, steps, lazy="decay")
    with cpu_kernels():
        cpu = Side(task, CPU)
        for number in range(3):
            cpu.step(number)
        cpu.opt.flush()
    device = Side(task, DEVICE)
    for number in range(3):
        device.step(number)
    before = device.snapshot()
    device.opt.flush()
    assert not torch.equal(device.snapshot()["parameter 0"], before["parameter 0"])
    if not ON_GPU:
        for name, t in device.snapshot().items():
            assert_agree(t, cpu.snapshot()[name], name)
    assert clock_of(device.opt).history.on_devices
