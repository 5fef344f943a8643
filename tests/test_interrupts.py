# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C at any moment of a step: it has happened wholly, or not at all."""

import contextlib
import copy
import random
import signal
import statistics
import sys
import threading
import time

import pytest
import torch
from oracle import same_bits
from torch import nn
from torch.nn import Parameter

from tiger_ext import AdamW, Tiger
from tiger_ext.finish import finish

MODES = {
    "frozen": (Tiger, {}),
    "exact": (Tiger, {"lazy": "exact"}),
    "decay": (AdamW, {"lazy": "decay"}),
    "window": (Tiger, {"lazy": "exact", "accumulation_steps": 2}),
    "skip": (Tiger, {"nonfinite": "skip", "accumulation_steps": 2}),
    "row": (AdamW, {"lazy": "decay", "second_moment": "row"}),
    "int8": (Tiger, {"lazy": "exact", "momentum_dtype": torch.int8}),
}


class Interrupt(BaseException):
    """What the tests' signal handler raises."""


class Run:
    """Two parameters, with and without a sparse gradient, and an optimizer."""

    def __init__(self, cls, options):
        torch.manual_seed(0)
        self.table = nn.Embedding(50, 4, sparse=True)
        self.bias = Parameter(torch.randn(4))
        self.late = Parameter(torch.randn(3))  # its state comes in the third step
        self.optimizer = cls(
            [self.table.weight, self.bias, self.late], lr=0.01, weight_decay=0.1, **options
        )
        self.number = 0

    def next_gradients(self):
        generator = torch.Generator().manual_seed(self.number)
        rows = torch.randint(50, (1, 6), generator=generator)
        values = torch.randn(6, 4, generator=generator)
        if self.number >= 4:  # of elements: the rows are divided anew
            rows = torch.cat([rows, rows % 4])
            values = values[:, 0]
        self.table.weight.grad = torch.sparse_coo_tensor(rows, values, (50, 4))
        self.bias.grad = torch.randn(4, generator=generator)
        self.late.grad = torch.ones(3) if self.number >= 2 else None

    def step(self):
        self.next_gradients()
        self.optimizer.step()
        self.number += 1

    def everything(self):
        saved = copy.deepcopy(self.optimizer.state_dict())
        params = [p.detach().clone() for p in (self.table.weight, self.bias, self.late)]
        return (
            params,
            saved["state"],
            [
                (g.get("history", ""), g.get("windows"), g.get("micro_steps"))
                for g in saved["param_groups"]
            ],
        )


def same(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and same_bits(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))
    return a == b


def states_after_each_step(cls, options, steps):
    run = Run(cls, options)
    found = [run.everything()]
    for _ in range(steps):
        run.step()
        found.append(run.everything())
    return found


@contextlib.contextmanager
def interrupt_at(count):
    """Raise Interrupt before the count-th line that the package executes; yield what was found."""
    seen = {"lines": 0, "raised": False}

    def trace(frame, event, arg):
        name = frame.f_code.co_filename
        if "tiger_ext" not in name or "tests" in name:
            return None
        if event == "line" and not seen["raised"]:
            seen["lines"] += 1
            if seen["lines"] == count:
                seen["raised"] = True
                raise Interrupt
        return trace

    sys.settrace(trace)
    try:
        yield seen
    finally:
        sys.settrace(None)
        # Nothing but a line of Python can come between a step's end and this.
        torch.set_grad_enabled(True)


@pytest.mark.parametrize("fused", [None, False], ids=["native", "reference"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("step", [0, 2, 3, 4])
def test_interrupted_before_any_line_a_step_is_whole_or_nothing(mode, step, fused):
    cls, options = MODES[mode]
    options = {**options, "fused": fused}
    expected = states_after_each_step(cls, options, step + 3)
    line, raised = step, True
    start = Run(cls, options)
    for _ in range(step):
        start.step()
    while raised:
        line += 3 if fused is None else 17  # the reference has more lines, and is slower
        run = copy.deepcopy(start)
        run.next_gradients()
        with interrupt_at(line) as seen, contextlib.suppress(Interrupt):
            run.optimizer.step()
        raised = seen["raised"]
        found = run.everything()
        happened = not same(found, expected[step])
        assert not happened or same(found, expected[step + 1]), f"torn before line {line}"
        # And it goes on as if nothing had been.
        run.number = step + happened
        while run.number < step + 3:
            run.step()
        assert same(run.everything(), expected[-1]), f"astray after line {line}"
    assert line > 30


def time_of_a_step(cls, options):
    """Return the median of some steps' seconds."""
    run, seconds = Run(cls, options), []
    for _ in range(40):
        run.next_gradients()
        begin = time.perf_counter()
        run.optimizer.step()
        seconds.append(time.perf_counter() - begin)
        run.number += 1
    return statistics.median(seconds)


def take_interrupted_steps(mode, steps, seed):
    """Take steps that a timer interrupts at random moments, each until it has happened.

    The moments are spread over half a step, one, two and four. A step that is interrupted again and
    again is given more time.

    Returns:
        How many steps were interrupted, had happened nevertheless, and were found torn, neither
        happened nor not: with the first of these it ends.

    Raises:
        AssertionError: a step did not happen in 1,000 attempts.
    """
    cls, options = MODES[mode]
    expected = states_after_each_step(cls, options, steps)
    run, typical = Run(cls, options), time_of_a_step(cls, options)
    chance = random.Random(seed)
    found = {"steps": steps, "interrupts": 0, "happened": 0, "torn": 0}

    def handler(*_):
        raise Interrupt

    before = signal.signal(signal.SIGALRM, handler)
    fruitless = 0
    try:
        while run.number < steps:
            assert fruitless < 1000, f"step {run.number} of mode {mode} never happens"
            run.next_gradients()
            most = typical * chance.choice([0.5, 1, 2, 4]) * (1 + fruitless / 10)
            try:
                try:
                    signal.setitimer(signal.ITIMER_REAL, chance.random() * most + 1e-6)
                    run.optimizer.step()
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
                run.number += 1
                fruitless = 0
            except Interrupt:
                signal.setitimer(signal.ITIMER_REAL, 0)
                found["interrupts"] += 1
                fruitless += 1
                now = run.everything()
                if same(now, expected[run.number + 1]):
                    found["happened"] += 1
                    run.number += 1
                    fruitless = 0
                elif not same(now, expected[run.number]):
                    found["torn"] += 1
                    break
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert found["torn"] or same(run.everything(), expected[steps])
    return found


@pytest.mark.parametrize("mode", MODES)
def test_signals_at_random_moments(mode):
    found = take_interrupted_steps(mode, 400, seed=3)
    assert found["torn"] == 0
    assert found["interrupts"] > 40 and found["happened"] > 0


def test_a_flush_that_is_interrupted_goes_on_later():
    expected = Run(Tiger, {"lazy": "exact"})
    for _ in range(5):
        expected.step()
    start = copy.deepcopy(expected)
    expected.optimizer.flush()
    expected.step()
    line, raised = 0, True
    while raised:
        line += 2
        run = copy.deepcopy(start)
        with interrupt_at(line) as seen, contextlib.suppress(Interrupt):
            run.optimizer.flush()
        raised = seen["raised"]
        run.optimizer.flush()
        run.step()
        assert same(run.everything(), expected.everything()), f"astray after line {line}"


@pytest.mark.parametrize("fused", [None, False], ids=["native", "reference"])
@pytest.mark.parametrize("how", ["read", "flush"])
def test_state_that_begins_with_a_read_begins_wholly(how, fused):
    def read(run):
        if how == "read":
            run.table(torch.arange(7))
        else:
            run.optimizer.flush()

    def end(run):
        read(run)
        run.step()
        run.optimizer.flush()
        return run.everything()

    start = Run(AdamW, {"lazy": "decay", "fused": fused})
    for _ in range(2):  # its rows decay, without a state
        start.bias.grad = torch.ones(4)
        start.optimizer.step()
    start.number = 2
    expected = end(tracked(copy.deepcopy(start)))
    line, raised = 0, True
    while raised:
        line += 2
        run = tracked(copy.deepcopy(start))
        with interrupt_at(line) as seen, contextlib.suppress(Interrupt):
            read(run)
        raised = seen["raised"]
        keys = run.optimizer.state.get(run.table.weight, {}).keys()
        assert len(keys) in (0, 4), f"half a state after line {line}: {keys}"
        assert same(end(run), expected), f"astray after line {line}"


def tracked(run):
    run.optimizer.track(run.table)
    return run


@pytest.mark.parametrize("mode", MODES)
def test_a_state_dict_is_loaded_wholly_or_not_at_all(mode):
    cls, options = MODES[mode]
    start = Run(cls, options)
    start.step()
    before = start.everything()
    for _ in range(4):
        start.step()
    saved = copy.deepcopy(start.optimizer.state_dict())
    after = start.everything()
    start = Run(cls, options)
    start.step()
    line, raised, loaded = 0, True, 0
    while raised:
        line += 7
        run = copy.deepcopy(start)
        with interrupt_at(line) as seen, contextlib.suppress(Interrupt):
            run.optimizer.load_state_dict(saved)
        raised = seen["raised"]
        found = run.everything()
        loaded += same(found[1:], after[1:])
        assert same(found[0], before[0])
        assert same(found[1:], after[1:]) or same(found, before), f"torn before line {line}"
        run.number = 5 if same(found[1:], after[1:]) else 1
        run.step()
    assert loaded > 1 and line > 100


def test_work_is_repeated_until_it_is_done_and_the_interrupt_comes_after():
    done = []

    def work():
        if len(done) < 2:
            done.append(len(done))
            raise KeyboardInterrupt
        done.append("end")

    with pytest.raises(KeyboardInterrupt):
        finish(work)
    assert done == [0, 1, "end"]
    with pytest.raises(ZeroDivisionError):
        finish(lambda: 1 / 0)  # type: ignore[arg-type, func-returns-value]


def test_a_ctrl_c_from_another_thread():
    run = Run(Tiger, {"lazy": "exact"})
    expected = states_after_each_step(Tiger, {"lazy": "exact"}, 3)

    def press():
        time.sleep(0.05)
        signal.raise_signal(signal.SIGINT)

    thread = threading.Thread(target=press)
    interrupted = False
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        thread.start()
        until = time.monotonic() + 20
        while time.monotonic() < until:
            run = Run(Tiger, {"lazy": "exact"})
            for _ in range(3):
                run.step()
    except KeyboardInterrupt:
        interrupted = True
    finally:
        signal.signal(signal.SIGINT, before)
    thread.join()
    assert interrupted
    found = run.everything()
    assert any(same(found, each) for each in expected)
