# SPDX-License-Identifier: Apache-2.0
"""What only a real GPU can show: streams, graphs, no waiting for the host, large tables."""

import contextlib
import copy
import functools
import gc

import pytest
import torch
from both import (
    DEVICE,
    ON_GPU,
    Side,
    assert_agree,
    assert_same,
    device_step,
    entries,
    moved,
    problem,
)
from cases import COMPACT_RULES, RULES, clock_of, dense_grad, every_rule, parameter, sparse_grad
from oracle import same_bits, unchanged
from torch.nn import Parameter

import tiger_ext

pytestmark = pytest.mark.skipif(not ON_GPU, reason="needs a GPU")

all_rules = pytest.mark.parametrize("rule", [*RULES, *COMPACT_RULES], ids=lambda r: r.name)
# Long enough to notice whether something waited for it; about a second.
LONG = 2_000_000_000


def mixed(rule, steps=3, **options):
    """Make a problem with dense and sparse gradients that keep their sizes from step to step."""
    dtype = torch.bfloat16 if rule in COMPACT_RULES else torch.float32
    params = [parameter(*shape, dtype=dtype) for shape in ((5000,), (30, 20), (300, 20), (50, 64))]
    params[1] = params[1].T

    def grads():
        ids = (torch.rand(2000) ** 6 * 300).long()
        return [
            *map(dense_grad, params[:2]),
            entries(params[2], ids),
            entries(params[3], torch.arange(0, 50, 2), coalesced=True),
        ]

    return problem(rule, params, [grads() for _ in range(steps)], **options)


def copy_grads(side, grads):
    """Write gradients into the memory of those that the parameters have."""
    for p, grad in zip(side.params, grads):
        if grad.layout == torch.sparse_coo:
            p.grad._indices().copy_(grad._indices())
            p.grad._values().copy_(grad._values())
        else:
            p.grad.copy_(grad)


# ---------------------------------------------------------------------------------------- streams


@all_rules
def test_the_current_stream_does_the_work(rule):
    task = mixed(rule)
    expected, side = Side(task, DEVICE), Side(task, DEVICE)
    for number in (0, 1, 2):
        expected.step(number)
    side.step(0)
    torch.cuda.synchronize()
    late = [moved(g, DEVICE) for g in task.steps[1]]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(LONG)
        # On any other stream the step would run before the gradients are there.
        copy_grads(side, late)
        side.opt.step()
    torch.cuda.current_stream().wait_stream(stream)
    side.step(2)
    assert_same(side, expected)


@all_rules
@pytest.mark.parametrize("amp", [False, True], ids=["plain", "amp"])
def test_a_step_never_waits_for_the_gpu(rule, amp):
    task = mixed(rule, steps=4)
    side = Side(task, DEVICE)
    side.opt.param_groups[0]["lr"] = torch.tensor(0.02, device=DEVICE)
    tensors = {}
    if amp:
        tensors["grad_scale"] = torch.tensor(2.0, device=DEVICE)
        tensors["found_inf"] = torch.tensor(0.0, device=DEVICE)
    advance = functools.partial(device_step, **tensors)
    for number in range(3):  # until torch has allocated all that a step needs
        side.step(number, advance)
    copy_grads(side, task.steps[3])
    torch.cuda.synchronize()
    torch.cuda._sleep(LONG)
    torch.cuda.set_sync_debug_mode("error")
    try:
        advance(side.opt)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not torch.cuda.current_stream().query(), "the step waited for the GPU"
    torch.cuda.synchronize()


@all_rules
def test_the_first_step_does_not_synchronize(rule):
    side = Side(mixed(rule), DEVICE)
    for p, grad in zip(side.params, side.task.steps[0]):
        p.grad = moved(grad, DEVICE)
    torch.cuda.set_sync_debug_mode("error")
    try:
        side.opt.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_scale_in_pinned_memory_is_read_in_the_step():
    first, second = (Parameter(torch.ones(5000, device=DEVICE)) for _ in range(2))
    grad = torch.randn(5000, device=DEVICE)
    scale = torch.tensor(2.0).pin_memory()
    opts = [RULES[0]([p]) for p in (first, second)]
    for p, opt in zip((first, second), opts):
        p.grad = grad.clone()
        opt.grad_scale = torch.tensor(2.0, device=DEVICE)
        opt.step()
    torch.cuda.synchronize()
    opts[0].grad_scale = scale
    torch.cuda._sleep(LONG)
    for opt in opts:
        opt.step()
    scale.fill_(1000.0)  # as GradScaler.update might, long before the kernels run
    torch.cuda.synchronize()
    assert same_bits(opts[0].state[first]["exp_avg"], opts[1].state[second]["exp_avg"])


# ----------------------------------------------------------------------------------------- graphs


def capture(side, advance):
    """Take step 0 as warm-up, then capture a step over static gradients."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        side.step(0, advance)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        advance(side.opt)
    return graph


@all_rules
def test_a_captured_step_is_replayed(rule):
    rates = (0.02, 0.3, 1e-3, 0.05)
    task = mixed(rule, steps=4, capturable=True)
    eager, side = Side(task, DEVICE), Side(task, DEVICE)
    side.opt.param_groups[0]["lr"] = lr = torch.tensor(rates[0], device=DEVICE)
    graph = capture(side, type(side.opt).step)
    for number, rate in enumerate(rates):
        lr.fill_(rate)
        eager.opt.param_groups[0]["lr"] = float(lr)
        eager.step(number)
        if number > 0:
            copy_grads(side, task.steps[number])
            graph.replay()
        assert_same(side, eager)


@all_rules
def test_a_captured_step_reads_the_amp_tensors(rule):
    task = mixed(rule, steps=5, capturable=True)
    eager, side = Side(task, DEVICE), Side(task, DEVICE)
    scale, found_inf = torch.tensor(1.0, device=DEVICE), torch.tensor(0.0, device=DEVICE)
    advance = functools.partial(device_step, grad_scale=scale, found_inf=found_inf)
    graph = capture(side, advance)
    eager.step(0)
    for number, (factor, cancel) in enumerate([(1, 0), (64, 0), (1, 1), (1024, 0)], 1):
        copy_grads(side, task.steps[number])
        for p in side.params:
            (p.grad._values() if p.grad.is_sparse else p.grad).mul_(factor)
        scale.fill_(factor)
        found_inf.fill_(cancel)
        graph.replay()
        if not cancel:
            eager.step(number)
        assert_same(side, eager)


def test_a_bad_index_in_a_replayed_step_is_reported():
    p = Parameter(torch.randn(30, 4, device=DEVICE))
    opt = RULES[0]([("table", p)], capturable=True)
    p.grad = entries(torch.randn(30, 4), [1, 2, 3]).to(DEVICE)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        opt.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        opt.step()
    p.grad._indices()[0, 1] = 30
    before = p.detach().clone()
    graph.replay()
    torch.cuda.synchronize()
    assert same_bits(p[2], before[2]) and not same_bits(p[1], before[1])
    with unchanged(opt), pytest.raises(IndexError, match=r"'table'.* 30\b.*\b30 rows"):
        opt.step()


REFUSED = {
    "accumulation": (dict(accumulation_steps=2), "accumulation_steps=2"),
    "raise": (dict(nonfinite="raise"), "nonfinite='raise'"),
    "lr on the CPU": (dict(lr=torch.tensor(0.1)), "tensor on the CPU"),
    "not capturable": (dict(capturable=False), "capturable=True"),
    "reference": (dict(fused=False, rows="nonzero"), "runs on the reference"),
    "scaler": (dict(fused=False), "runs on the reference"),
    "flush": (dict(lazy="decay"), "flush is being captured"),
    "state_dict": (dict(lazy="decay"), "cannot be read while a CUDA graph"),
}


@pytest.mark.filterwarnings("ignore:.*CUDA Graph is empty")
@pytest.mark.parametrize("options,match", REFUSED.values(), ids=REFUSED)
def test_what_replays_could_not_do_is_refused(options, match, request):
    table = torch.nn.Embedding(30, 4, device=DEVICE)
    opt = tiger_ext.Tiger(table.parameters(), **{"capturable": True, **options})
    opt.track(table)
    ids = torch.arange(7, device=DEVICE)
    case = request.node.callspec.id
    if case == "scaler":
        opt.grad_scale = torch.ones((), device=DEVICE)
        opt.found_inf = torch.zeros((), device=DEVICE)
    if case == "state_dict":  # the GPU alone knows the rates
        opt.param_groups[0]["lr"] = torch.tensor(0.1, device=DEVICE)
    act = {"flush": opt.flush, "state_dict": opt.state_dict}.get(case, opt.step)

    def forward_and_backward():
        opt.zero_grad()
        table(ids).sum().backward()

    for _ in range(2):
        forward_and_backward()
        opt.step()
    forward_and_backward()
    graph = torch.cuda.CUDAGraph()
    with unchanged(opt), torch.cuda.graph(graph), pytest.raises(RuntimeError, match=match):
        act()
    opt.step()  # the capture was not spoilt for what follows


@pytest.mark.parametrize("rows", ["tracked", "nonzero"])
def test_replays_find_their_touched_rows(rows):
    table = torch.nn.Embedding(30, 4, device=DEVICE)
    copied = copy.deepcopy(table)
    opt = tiger_ext.Tiger(table.parameters(), rows=rows)
    other = tiger_ext.Tiger(copied.parameters(), rows=rows, capturable=True)
    ids, factors = torch.arange(7, device=DEVICE), torch.randn(7, 4, device=DEVICE)
    for each, o in ((table, opt), (copied, other)):
        o.track(each)
    graph = captured(copied, other, ids, factors)
    train(table, opt, ids, factors)
    for _ in range(3):
        ids.add_(5)
        graph.replay()
        train(table, opt, ids, factors)
        assert_agree(copied.weight, table.weight, "after a replay")


@every_rule
def test_a_late_report_does_not_reach_the_next_optimizer(rule):
    first, second = (Parameter(torch.randn(30, 4, device=DEVICE)) for _ in range(2))
    opt = rule([("first", first)])
    good = entries(torch.randn(30, 4), [1, 2]).to(DEVICE)
    first.grad = second.grad = good
    opt.step()
    first.grad = entries(torch.randn(30, 4), [1, 30]).to(DEVICE)
    torch.cuda.synchronize()
    torch.cuda._sleep(LONG)
    opt.step()
    del opt
    gc.collect()
    opt = rule([("second", second)])
    opt.step()  # which takes a place for reports while the other kernel still waits
    torch.cuda.synchronize()
    opt.step()
    torch.cuda.synchronize()
    opt.step()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_each_of_two_gpus_reports():
    params = [Parameter(torch.randn(30, 4, device=f"cuda:{k}")) for k in range(2)]
    opt = RULES[0]([(f"table{k}", p) for k, p in enumerate(params)])
    for k, p in enumerate(params):
        p.grad = entries(torch.randn(30, 4), [1, 40 + k]).to(p.device)
    opt.step()
    for k in range(2):
        torch.cuda.synchronize(k)
    for k in range(2):
        with unchanged(opt), pytest.raises(IndexError, match=rf"'table{k}'.* 4{k}\b"):
            opt.step()


LAZY = [(rule, mode) for rule in RULES[:2] for mode in ("decay", "exact")]
LAZY += [(rule, "decay") for rule in RULES[2:]]
every_lazy = pytest.mark.parametrize("rule,lazy", LAZY, ids=[f"{r.name}-{m}" for r, m in LAZY])


def lazy_tables(rule, lazy, **options):
    """Make an embedding and its optimizer, and one that gets the same values by eager steps."""
    pair = []
    for capturable in (False, True):
        torch.manual_seed(5)
        table = torch.nn.Embedding(300, 20, sparse=True, device=DEVICE)
        opt = rule(table.parameters(), lazy=lazy, capturable=capturable, **options)
        opt.track(table)
        pair.append((table, opt))
    return pair


def train(table, opt, ids, factors):
    opt.zero_grad()
    (table(ids) * factors).sum().backward()
    opt.step()


def captured(table, opt, ids, factors):
    """Train once as warm-up, then capture an iteration."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        train(table, opt, ids, factors)
    torch.cuda.current_stream().wait_stream(stream)
    opt.zero_grad()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        train(table, opt, ids, factors)
    return graph


@every_lazy
@pytest.mark.parametrize("amp", [False, True], ids=["plain", "amp"])
def test_a_lazy_step_with_tracked_reads_never_waits(rule, lazy, amp):
    table, opt = lazy_tables(rule, lazy)[0]
    opt.param_groups[0]["lr"] = torch.tensor(0.02, device=DEVICE)
    if amp:
        opt.grad_scale = torch.tensor(1.0, device=DEVICE)
        opt.found_inf = torch.tensor(0.0, device=DEVICE)
    ids = torch.randint(300, (40,), device=DEVICE)
    factors = torch.randn(40, 20, device=DEVICE)
    for _ in range(3):
        train(table, opt, ids, factors)
    torch.cuda.synchronize()
    torch.cuda._sleep(LONG)
    torch.cuda.set_sync_debug_mode("error")
    try:
        train(table, opt, ids, factors)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not torch.cuda.current_stream().query(), "the step waited for the GPU"
    torch.cuda.synchronize()
    assert clock_of(opt).history.steps == 4


@every_lazy
def test_a_captured_iteration_of_a_lazy_table_is_replayed(rule, lazy):
    """The forward pass with its catch-up, the backward pass and the step, under a schedule."""
    (table, eager), (copied, opt) = lazy_tables(rule, lazy)
    generator = torch.Generator().manual_seed(3)
    batches = [torch.randint(300, (40,), generator=generator).to(DEVICE) for _ in range(9)]
    factors = torch.randn(40, 20, generator=generator).to(DEVICE)
    lr = torch.tensor(0.02, device=DEVICE)
    opt.param_groups[0]["lr"] = lr
    ids = batches[0].clone()

    def rate(number):
        return 0.02 / (1 + number // 2)

    graph = captured(copied, opt, ids, factors)
    for number, batch in enumerate(batches):
        lr.fill_(rate(number))
        eager.param_groups[0]["lr"] = float(lr)
        train(table, eager, batch, factors)
        if number > 0:
            ids.copy_(batch)
            graph.replay()
        assert_agree(copied.weight, table.weight, f"step {number}")
    for each in (eager, opt):
        each.flush()
    assert_agree(copied.weight, table.weight, "after the flush")
    last = [o.state[t.weight]["last_step"] for t, o in ((table, eager), (copied, opt))]
    assert torch.equal(*last) and clock_of(opt).history.steps == len(batches)


@every_lazy
def test_a_captured_lazy_step_that_is_cancelled_did_not_happen(rule, lazy):
    (table, eager), (copied, opt) = lazy_tables(rule, lazy)
    opt.grad_scale = torch.tensor(1.0, device=DEVICE)
    opt.found_inf = found_inf = torch.tensor(0.0, device=DEVICE)
    ids, factors = torch.arange(40, device=DEVICE), torch.randn(40, 20, device=DEVICE)
    graph = captured(copied, opt, ids, factors)
    train(table, eager, ids, factors)
    for number in range(6):
        found_inf.fill_(number in (1, 4))
        ids.add_(30)
        graph.replay()
        if number not in (1, 4):
            train(table, eager, ids, factors)
    for each in (eager, opt):
        each.flush()
    assert_agree(copied.weight, table.weight, "after the flush")
    assert clock_of(opt).history.steps == 5


@every_lazy
def test_ids_repeat_in_many_blocks(rule, lazy):
    (table, opt), (other, unique) = lazy_tables(rule, lazy)
    for each, o in ((table, opt), (other, unique)):
        train(each, o, torch.arange(250, device=DEVICE), torch.ones(250, 20, device=DEVICE))
        o.zero_grad()
        o.step()
    ids = torch.randint(300, (200_000,), device=DEVICE)
    table(ids)
    other(ids.unique())
    assert_agree(table.weight, other.weight, "rows that were read")


# --------------------------------------------------------------------------------- a model's step


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(300, 20, sparse=True)
        self.bag = torch.nn.EmbeddingBag(40, 20, sparse=True, mode="sum")
        self.weight = Parameter(torch.randn(20))

    def forward(self, ids, factors):
        return ((self.table(ids) + self.bag(ids % 40)[:, None]) * self.weight * factors).sum()


def twins():
    model = Model().to(DEVICE)
    twin = Model().to(DEVICE)
    twin.load_state_dict(model.state_dict())
    return model, twin


@every_rule
def test_grad_scaler(rule):
    model, twin = twins()
    opt, other = (rule(m.named_parameters(), fused=True) for m in (model, twin))
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0, growth_interval=10**6)
    for number in range(5):
        ids = torch.randint(300, (8, 3)).to(DEVICE)
        factors = torch.randn(8, 3, 20).to(DEVICE)
        cancelled = number == 2
        if cancelled:
            factors[0, 0, 0] = torch.inf
        opt.zero_grad()
        scaler.scale(model(ids, factors)).backward()
        with unchanged(opt) if cancelled else contextlib.nullcontext():
            scaler.step(opt)
        scaler.update()
        assert scaler.get_scale() == (512.0 if number >= 2 else 1024.0)
        if not cancelled:
            other.zero_grad()
            twin(ids, factors).backward()
            other.step()
        for (name, p), q in zip(model.named_parameters(), twin.parameters()):
            assert_agree(p, q, f"step {number}: {name}")


# ------------------------------------------------------------------------------- several devices


@every_rule
def test_cpu_and_gpu_parameters_in_one_step(rule):
    here, there = parameter(40, 5), parameter(40, 5)
    both = [Parameter(here.detach().clone()), Parameter(there.detach().to(DEVICE))]
    opt = rule([("here", both[0]), ("there", both[1])], fused=True)
    alone = Side(problem(rule, [there], [[sparse_grad(there, 60)] for _ in range(3)]), DEVICE)
    cpu = Side(
        problem(rule, [here], [[sparse_grad(here, 60)] for _ in range(3)]), torch.device("cpu")
    )
    for number in range(3):
        alone.step(number)
        cpu.step(number)
        both[0].grad, both[1].grad = cpu.params[0].grad, alone.params[0].grad
        opt.step()
    assert same_bits(both[0], cpu.params[0]) and same_bits(both[1], alone.params[0])
    # A bad index on the CPU is found before anything is written, on the GPU either.
    both[0].grad = entries(here, [3, 40])
    with unchanged(opt), pytest.raises(IndexError, match=r"'here'.* 40\b"):
        opt.step()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@every_rule
def test_two_gpus(rule):
    task = mixed(rule)
    sides = [Side(task, torch.device("cuda", k)) for k in range(2)]
    alone = Side(task, torch.device("cuda", 0))
    params = [p for side in sides for p in side.params]
    opt = rule([{"params": side.params} for side in sides], fused=True)
    for number, grads in enumerate(task.steps):
        alone.step(number)
        for p, grad in zip(params, grads * 2):
            p.grad = moved(grad, p.device)
        opt.step()
    for side in sides:
        side.opt = opt
        assert_same(side, alone)


@pytest.mark.parametrize("rule", RULES[:3], ids=lambda r: r.name)
def test_state_on_another_device_is_refused(rule):
    good, bad = (Parameter(torch.ones(6, 4, device=DEVICE)) for _ in range(2))
    opt = rule([("good", good), ("bad", bad)], fused=True)
    for p in (good, bad):
        p.grad = torch.ones(6, 4, device=DEVICE)
    opt.step()
    opt.state[bad]["exp_avg"] = opt.state[bad]["exp_avg"].cpu()
    with unchanged(opt), pytest.raises(RuntimeError, match=r"'bad'.*cpu"):
        opt.step()


# ----------------------------------------------------------------------------------- large tables


@every_rule
def test_a_table_of_more_than_2_31_elements(rule):
    rows, dim = 2**31 // 128 + 10, 128
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of free memory on the GPU")
    small = parameter(4, dim)
    at = torch.tensor([0, rows // 2, rows - 2, rows - 1], device=DEVICE)
    big = Parameter(torch.zeros(rows, dim, device=DEVICE))
    big.data[at] = small.detach().to(DEVICE)
    task = problem(
        rule,
        [small],
        [[entries(small, torch.randint(4, (700,)))] for _ in range(2)],
        momentum_dtype=torch.bfloat16,
    )
    side = Side(task, DEVICE)
    opt = rule([big], momentum_dtype=torch.bfloat16, fused=True)
    for number in range(2):
        side.step(number)
        grad = side.params[0].grad
        big.grad = torch.sparse_coo_tensor(at[grad._indices()[0]][None], grad._values(), big.shape)
        opt.step()
    assert same_bits(big.detach()[at], side.params[0])
    for name, t in side.opt.state[side.params[0]].items():
        own = opt.state[big][name]
        assert same_bits(own if name == "step" else own[at], t)
    big.data[at] = 0.0
    assert int(big.detach().count_nonzero()) == 0, "other rows were written"
