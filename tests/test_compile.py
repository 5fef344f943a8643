# SPDX-License-Identifier: Apache-2.0
"""torch.compile around models with tracked tables and around whole training steps."""

import copy
import shutil

import pytest
import torch
from table_model import DIM, HYPER, ROWS, Model, assert_alike, batch, train
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from tiger_ext import AdamW, Lion, Tiger


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=True):  # as in a fresh process
        yield
    torch._dynamo.reset()


def pair(cls, lazy, sparse, rows=None):
    """Return twice a model and its optimizer, which tracks the table."""
    made = []
    for _ in range(2):
        model = Model(sparse)
        groups = [
            {"params": [model.table.weight], "rows": rows},
            {"params": list(model.head.parameters())},
        ]
        optimizer = cls(groups, lazy=lazy, **HYPER)
        optimizer.track(model.table)
        made.append((model, optimizer))
    return made


def whole_step(model, optimizer, ids):
    optimizer.zero_grad()
    loss = model(ids)
    loss.backward()
    optimizer.step()
    return loss


SOME_MODES = pytest.mark.parametrize(
    "cls,lazy",
    [(Tiger, "frozen"), (Tiger, "exact"), (Lion, "decay"), (AdamW, "decay")],
    ids=lambda x: x if isinstance(x, str) else x.__name__,
)
LAYOUTS = pytest.mark.parametrize(
    "sparse,rows",
    [(True, None), (False, None), (False, "nonzero"), (False, "tracked")],
    ids=["sparse", "dense", "nonzero", "tracked"],
)


@SOME_MODES
@LAYOUTS
def test_a_compiled_model_with_an_eager_step(cls, lazy, sparse, rows):
    (model, optimizer), (twin, other) = pair(cls, lazy, sparse, rows)
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(twin, backend=backend)
    train(model, optimizer, range(3))
    train(twin, other, range(3), compiled)
    graphs = backend.frame_count
    assert graphs > 0
    train(model, optimizer, range(3, 8))
    train(twin, other, range(3, 8), compiled)
    assert backend.frame_count == graphs  # growing histories and other rows compile nothing anew
    assert twin.table.weight.grad.is_sparse == sparse
    assert_alike(optimizer, other)
    optimizer.flush()
    other.flush()
    assert_alike(optimizer, other)


@SOME_MODES
@LAYOUTS
def test_a_compiled_training_step(cls, lazy, sparse, rows):
    (model, optimizer), (twin, other) = pair(cls, lazy, sparse, rows)
    step = torch.compile(whole_step, backend="aot_eager")
    for k in range(6):
        if k == 4:
            for o in (optimizer, other):
                o.param_groups[0]["lr"] = 0.03
        expected = whole_step(model, optimizer, batch(k))
        assert torch.equal(step(twin, other, batch(k)), expected)
    assert_alike(optimizer, other)
    optimizer.flush()
    other.flush()
    assert_alike(optimizer, other)


@pytest.mark.parametrize("lazy", ["decay", "exact"])
def test_a_compiled_model_reads_current_rows(lazy):
    (model, optimizer), (twin, other) = pair(Tiger, lazy, True)
    train(model, optimizer, range(5))
    train(twin, other, range(5))
    stale = int(twin.table.weight._version)
    compiled = torch.compile(twin.table, backend="aot_eager")
    for training in (True, False):
        twin.train(training)
        with torch.no_grad():
            read = compiled(torch.arange(ROWS))
        optimizer.flush()
        assert torch.equal(read, model.table.weight)
    assert twin.table.weight._version > stale


def test_several_forward_passes_a_step_are_all_tracked():
    (model, optimizer), (twin, other) = pair(Tiger, "frozen", False, "tracked")
    backend = CompileCounterWithBackend("eager")
    compiled = torch.compile(twin, backend=backend)
    graphs = []
    for step, passes in enumerate((1, 3, 2, 5, 4)):
        for o, call in ((optimizer, model), (other, compiled)):
            o.zero_grad()
            sum(call(batch(10 * step + i)) for i in range(passes)).backward()
            o.step()
        graphs.append(backend.frame_count)
    assert len(set(graphs)) == 1
    assert_alike(optimizer, other)


def test_a_tracked_bag_of_changing_sizes():
    results = []
    for compiled in (False, True):
        torch.manual_seed(0)
        bag = nn.EmbeddingBag(ROWS, DIM, mode="sum", sparse=True)
        optimizer = Tiger(bag.parameters(), lazy="exact", **HYPER)
        optimizer.track(bag)
        call = torch.compile(bag, backend="aot_eager") if compiled else bag
        for step in range(8):
            ids = batch(step)[: 2 + step % 4]
            optimizer.zero_grad()
            call(ids, torch.tensor([0, 1 + step % 2])).square().sum().backward()
            optimizer.step()
        assert bag.weight.grad.is_sparse
        results.append(optimizer)
    assert_alike(*results)


def test_the_hook_of_a_tracked_module_is_one_graph_break():
    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(ROWS, DIM)

        def forward(self, ids):
            return self.table(ids + 0) * 2

    module = Table()
    optimizer = Tiger(module.parameters(), rows="tracked", lazy="exact", **HYPER)
    whole = torch._dynamo.explain(module)(batch(0))
    optimizer.track(module.table)
    torch._dynamo.reset()
    tracked = torch._dynamo.explain(module)(batch(0))
    assert whole.graph_break_count == 0
    assert not any("item()" in str(reason) for reason in tracked.break_reasons)
    assert tracked.graph_count <= 3  # before the hook, the look-up, after it


def untracked(count, fused, sparse=True):
    made = []
    for _ in range(count):
        model = Model(sparse)
        rows = None if sparse else "tracked"
        groups = [
            {"params": [model.table.weight], "rows": rows},
            {"params": list(model.head.parameters())},
        ]
        made.append((model, Tiger(groups, lazy="exact", fused=fused, **HYPER)))
    return made


FUSED = pytest.mark.parametrize("fused", [None, False], ids=["native", "reference"])


@FUSED
@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "tracked"])
def test_a_model_that_is_tracked_after_it_was_compiled(sparse, fused):
    (model, optimizer), (twin, other) = untracked(2, fused, sparse)
    backend = CompileCounterWithBackend("eager")
    compiled = torch.compile(twin, backend=backend)
    for k in range(3):
        compiled(batch(k))
    optimizer.track(model.table)
    handle = other.track(twin.table)
    train(model, optimizer, range(8))
    train(twin, other, range(2), compiled)
    graphs = backend.frame_count
    train(twin, other, range(2, 8), compiled)
    assert backend.frame_count == graphs
    assert_alike(optimizer, other)
    # And when the tracking ends.
    handle.remove()
    clock = other.state[twin.table.weight]["last_step"].clone()
    with torch.no_grad():
        compiled(torch.arange(ROWS))
    assert torch.equal(clock, other.state[twin.table.weight]["last_step"])
    other.track(twin.table)
    train(model, optimizer, range(8, 12))
    train(twin, other, range(8, 12), compiled)
    assert_alike(optimizer, other)


@FUSED
@pytest.mark.parametrize("copied", [False, True], ids=["alike", "copied"])
def test_a_model_compiled_after_another_of_its_class_that_is_not_tracked(copied, fused):
    (model, optimizer), (twin, other), (second, third) = untracked(3, fused)
    optimizer.track(model.table)
    other.track(twin.table)
    if copied:
        second = copy.deepcopy(twin)  # whose hook does nothing
        third = Tiger(second.parameters(), lazy="exact", fused=fused, **HYPER)
    compiled, compiled_second = (torch.compile(m, backend="eager") for m in (twin, second))
    train(second, third, range(4), compiled_second)
    train(model, optimizer, range(8))
    train(twin, other, range(8), compiled)
    assert_alike(optimizer, other)
    # Now that one too.
    third.track(second.table)
    train(second, third, range(4, 8), compiled_second)
    clock = third.state[second.table.weight]["last_step"].clone()
    with torch.no_grad():
        compiled_second(torch.arange(ROWS))
    assert not torch.equal(clock, third.state[second.table.weight]["last_step"])
    third.flush()


def test_what_was_compiled_is_dropped_once(monkeypatch):
    (model, optimizer), (twin, other) = untracked(2, None)
    resets = []
    monkeypatch.setattr(torch._dynamo, "reset", lambda: resets.append(1))
    for _ in range(2):
        other.track(twin.table).remove()
        optimizer.track(model.table).remove()
    assert len(resets) == 1
    assert not torch._dynamo.config.skip_nnmodule_hook_guards


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("rows", [None, "tracked"])
def test_a_tracked_model_can_be_exported(strict, training, rows):
    (model, optimizer), (twin, other) = pair(Tiger, "exact", rows is None, rows)
    train(model, optimizer, range(5))
    train(twin, other, range(5))
    other.flush()
    program = torch.export.export(twin.train(training), (batch(0),), strict=strict)
    assert not [n for n in program.graph.nodes if "tiger_ext" in str(n.target)]
    optimizer.flush()
    assert_alike(optimizer, other)
    with torch.no_grad():
        assert torch.equal(program.module()(batch(7)), model(batch(7)))
    train(model.train(training), optimizer, range(5, 8))  # the tracking has not ended
    train(twin, other, range(5, 8))
    assert_alike(optimizer, other)


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor():
    (model, optimizer), (twin, other) = pair(Tiger, "exact", True)
    step = torch.compile(whole_step, backend="inductor")
    for k in range(4):
        whole_step(model, optimizer, batch(k))
        step(twin, other, batch(k))
    optimizer.flush()
    other.flush()
    for p, q in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(p, q)
