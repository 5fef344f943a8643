# SPDX-License-Identifier: Apache-2.0
"""Several processes, each with an optimizer of its own, step on one table without locks."""

import os
import signal
import time

import pytest
import torch
import torch.multiprocessing
from pages import existing_bytes
from torch.nn import Parameter

from tiger_ext import AdamW, Lion, Tiger, empty_table

ROWS, DIM, STEPS, LR = 2000, 16, 60, 0.01
RULES = {
    "tiger": lambda ps: Tiger(ps, lr=LR),
    "lion": lambda ps: Lion(ps, lr=LR, weight_decay=0.1),
    "tiger, bf16 momentum": lambda ps: Tiger(ps, lr=LR, momentum_dtype=torch.bfloat16),
    "tiger, reference": lambda ps: Tiger(ps, lr=LR, fused=False),
    "adamw": lambda ps: AdamW(ps, lr=LR),
    "rmsprop": lambda ps: AdamW(ps, lr=LR, betas=(0.0, 0.99)),
}


def train(opt, rows, seed):
    """Take steps on gradients of rows in the range; some of them twice in a step."""
    (p,) = opt.param_groups[0]["params"]
    generator = torch.Generator().manual_seed(seed)
    for _ in range(STEPS):
        ids = torch.randint(rows.start, rows.stop, (1, 300), generator=generator)
        values = torch.randn(300, DIM, generator=generator)
        p.grad = torch.sparse_coo_tensor(ids, values, p.shape, check_invariants=True)
        opt.step()


def in_process(rule, table, state, rows, seed, times):
    """What a process does: returns whether its state is the one that it was given."""
    if isinstance(table, str):
        table = empty_table(ROWS, DIM, path=table)
    opt = RULES[rule]([Parameter(table)])
    opt.load_state_dict(state, assign=True)
    (own,) = opt.state.values()
    given = all(own[name] is value for name, value in state["state"][0].items())
    for _ in range(times):
        train(opt, rows, seed)
    return given


def work(tasks, results):
    torch.set_num_threads(1)
    for task in iter(tasks.get, None):
        results.put("started")
        results.put(in_process(*task))


class Worker:
    def __init__(self):
        context = torch.multiprocessing.get_context("spawn")
        self.tasks, self.results = context.Queue(), context.Queue()
        self.process = context.Process(target=work, args=(self.tasks, self.results), daemon=True)
        self.process.start()

    def begin(self, *task):
        self.tasks.put(task)

    def started(self):
        assert self.results.get(timeout=60) == "started"

    def done(self):
        return self.results.get(timeout=60)


@pytest.fixture(scope="module")
def workers():
    started = [Worker(), Worker()]
    yield started
    for worker in started:
        worker.tasks.put(None)
        worker.process.join(5)
        worker.process.kill()


def start():
    return torch.randn(ROWS, DIM, generator=torch.Generator().manual_seed(1))


def shared_table(kind, tmp_path):
    """Return a table, and what processes get to find it."""
    if kind == "file":
        path = str(tmp_path / "table")
        return empty_table(ROWS, DIM, path=path).copy_(start()), path
    table = empty_table(ROWS, DIM, shared=True).copy_(start())
    return table, table


def together(workers, rule, table, place, ranges):
    """Let each worker train its rows; return the shared optimizer."""
    opt = RULES[rule]([Parameter(table)])
    opt.share_memory()
    state = opt.state_dict()
    for seed, (worker, rows) in enumerate(zip(workers, ranges, strict=True)):
        worker.begin(rule, place, state, rows, seed, 1)
    for worker in workers:
        worker.started()
    assert [worker.done() for worker in workers] == [True, True]
    return opt


@pytest.mark.parametrize("kind", ["shared", "file"])
@pytest.mark.parametrize("rule", [name for name in RULES if name not in ("adamw", "rmsprop")])
def test_disjoint_rows_end_bit_by_bit_as_in_one_process(workers, rule, kind, tmp_path):
    table, place = shared_table(kind, tmp_path)
    ranges = [range(ROWS // 2), range(ROWS // 2, ROWS)]
    opt = together(workers, rule, table, place, ranges)

    alone = RULES[rule]([Parameter(start())])
    for seed, rows in enumerate(ranges):
        train(alone, rows, seed)
    (p,), (q,) = (o.param_groups[0]["params"] for o in (opt, alone))
    assert torch.equal(p, q) and not torch.equal(p, start())
    assert torch.equal(opt.state[p]["exp_avg"], alone.state[q]["exp_avg"])


@pytest.mark.parametrize("rule", RULES)
def test_rows_that_both_write_get_updates_and_no_others_change(workers, rule, tmp_path):
    table, place = shared_table("shared", tmp_path)
    opt = together(workers, rule, table, place, [range(100, 160), range(130, 190)])
    (p,) = opt.param_groups[0]["params"]
    moved = (p.detach() - start()).abs()
    assert torch.equal(p[:100], start()[:100]) and torch.equal(p[190:], start()[190:])
    assert moved[100:190].gt(0).all()
    # Each step of each of the two moves an element by about lr at most, and decays it.
    assert moved.max() < 2 * STEPS * LR * (4.0 if "adamw" in rule or rule == "rmsprop" else 1.6)
    for value in opt.state[p].values():
        assert value.isfinite().all()
    if "step" in opt.state[p]:
        assert STEPS <= int(opt.state[p]["step"]) <= 2 * STEPS


def test_a_killed_process_leaves_the_others_training(workers, tmp_path):
    table, place = shared_table("shared", tmp_path)
    opt = RULES["tiger"]([Parameter(table)])
    opt.share_memory()
    (p,) = opt.param_groups[0]["params"]
    victim, other = workers
    victim.begin("tiger", place, opt.state_dict(), range(50), 0, 10_000)
    victim.started()
    end = time.monotonic() + 30
    while torch.equal(p[:50], start()[:50]) and time.monotonic() < end:
        time.sleep(0.01)
    os.kill(victim.process.pid, signal.SIGKILL)  # amid its steps
    victim.process.join(10)
    assert victim.process.exitcode == -signal.SIGKILL
    other.begin("tiger", place, opt.state_dict(), range(1000, 1200), 1, 1)
    other.started()
    assert other.done()
    train(opt, range(1200, 1300), 2)  # and here
    changed = (p.detach() != start()).any(1)
    assert changed[:50].any() and changed[1000:1300].all() and not changed[50:1000].any()
    assert p.isfinite().all()


# ------------------------------------------------------------------------- share_memory


@pytest.mark.parametrize("rule", RULES)
def test_shared_state_is_what_it_was(rule):
    opt, same = (RULES[rule]([Parameter(start())]) for _ in range(2))
    for each in (opt, same):
        train(each, range(ROWS), 3)
    (state,), (other,) = opt.state.values(), same.state.values()
    tensors = dict(state)
    saved = opt.state_dict()["state"][0]
    opt.share_memory()
    for name, value in state.items():
        assert value is tensors[name] and value.is_shared() and torch.equal(value, other[name])
        assert saved[name].data_ptr() == value.data_ptr()  # who has them has the shared ones
    pointers = [value.data_ptr() for value in state.values()]
    opt.share_memory()
    assert [value.data_ptr() for value in state.values()] == pointers
    for each in (opt, same):
        train(each, range(ROWS), 4)
    (p,), (q,) = (o.param_groups[0]["params"] for o in (opt, same))
    assert torch.equal(p, q)


def test_state_is_created_and_zero_pages_stay_unwritten():
    p = Parameter(empty_table(1_000_000, DIM, shared=True))
    opt = Tiger([p])
    opt.share_memory()
    momentum = opt.state[p]["exp_avg"]
    assert momentum.is_shared() and momentum.shape == p.shape
    assert existing_bytes(momentum) <= 4096
    momentum[5] = 1.0
    opt.share_memory()
    assert momentum[5].eq(1).all() and not momentum[6].any()


def test_the_memory_format_of_shared_state_stays():
    p = Parameter(torch.zeros(8, 6).T)
    opt = Tiger([p])
    p.grad = torch.ones(6, 8)
    opt.step()
    before = opt.state[p]["exp_avg"].clone()
    opt.share_memory()
    assert opt.state[p]["exp_avg"].stride() == p.stride()
    assert torch.equal(opt.state[p]["exp_avg"], before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lazy": "decay"}, r"group 1: lazy='decay': expected 'frozen'"),
        ({"lazy": "exact"}, r"group 1: lazy='exact': expected 'frozen'"),
        ({"accumulation_steps": 2}, r"group 1: accumulation_steps=2: expected 1"),
    ],
)
def test_what_processes_would_count_together_is_refused(options, message):
    ps = [Parameter(torch.zeros(3, 2)) for _ in range(2)]
    opt = Tiger([{"params": [ps[0]]}, {"params": [ps[1]], **options}])
    with pytest.raises(ValueError, match=message):
        opt.share_memory()
    assert not opt.state
