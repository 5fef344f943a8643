# SPDX-License-Identifier: Apache-2.0
"""torch's contract for optimizers in the lazy modes: hooks, conversions, threads and the rest."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cases import clock_of
from oracle import same_bits
from table_model import DIM, HYPER, ROWS, Model, assert_alike, batch, every_lazy, every_mode, train
from test_lazy import Dense
from torch import nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from tiger_ext import AdamW, Lion, Tiger


def made(cls, lazy, model=None, **options):
    model = model or Model()
    optimizer = cls(model.parameters(), lazy=lazy, **HYPER, **options)
    optimizer.track(model.table)
    return model, optimizer


# ------------------------------------------------------------------------------ hooks and closures


def order_of_hooks(make):
    p = nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    optimizer = make([p])
    seen = []

    def note(name, value=None):
        return lambda *args: seen.append(name) or value

    def closure():
        seen.append("closure")

    everywhere = [
        register_optimizer_step_pre_hook(note("any before")),
        register_optimizer_step_post_hook(note("any after")),
    ]
    for i in range(2):
        optimizer.register_step_pre_hook(note(f"before {i}"))
        optimizer.register_step_post_hook(note(f"after {i}"))
        for prepend in (False, True):
            optimizer.register_state_dict_pre_hook(note(f"save {i} {prepend}"), prepend)
            optimizer.register_state_dict_post_hook(note(f"saved {i} {prepend}"), prepend)
            optimizer.register_load_state_dict_pre_hook(note(f"load {i} {prepend}"), prepend)
            optimizer.register_load_state_dict_post_hook(note(f"loaded {i} {prepend}"), prepend)
    optimizer.step(closure)
    optimizer.load_state_dict(optimizer.state_dict())
    for handle in everywhere:
        handle.remove()
    optimizer.step()
    return seen


@every_mode
def test_hooks_run_in_the_order_of_sgd(cls, lazy):
    expected = order_of_hooks(lambda params: torch.optim.SGD(params, lr=0.1))
    assert len(expected) == 7 + 16 + 4
    assert order_of_hooks(lambda params: cls(params, lazy=lazy)) == expected


@every_mode
def test_what_hooks_see_and_may_change(cls, lazy):
    model, optimizer = made(cls, lazy)
    train(model, optimizer, range(3))
    p = model.table.weight
    seen = {}

    def saved(_, state_dict):
        seen["history"] = state_dict["param_groups"][0].get("history")
        state_dict["extra"] = 1

    def loaded(o):
        seen["loaded"] = {name: value.dtype for name, value in o.state[p].items()}
        seen["steps"] = clock_of(o).history.steps if lazy != "frozen" else 3

    optimizer.register_state_dict_post_hook(saved)
    optimizer.register_load_state_dict_post_hook(loaded)
    # A pre-hook may replace the closure; the arguments begin with the optimizer.
    optimizer.register_step_pre_hook(lambda o, args, kwargs: ((args[0], lambda: "other"), {}))
    state_dict = optimizer.state_dict()
    assert state_dict["extra"] == 1 and type(seen["history"]) is (
        type(None) if lazy == "frozen" else str
    )
    optimizer.load_state_dict(state_dict)
    assert seen["loaded"] == {name: value.dtype for name, value in optimizer.state[p].items()}
    assert seen["steps"] == 3
    assert optimizer.step(lambda: "mine") == "other"


@every_mode
def test_closures(cls, lazy):
    (model, optimizer), (twin, other) = made(cls, lazy), made(cls, lazy)
    for step in range(6):
        losses = []

        def closure(step=step, losses=losses):
            assert torch.is_grad_enabled()
            optimizer.zero_grad()
            losses.append(model(batch(step)))
            losses[-1].backward()
            return losses[-1]

        with torch.no_grad():
            assert optimizer.step(closure) is losses[0]
        assert len(losses) == 1
        other.zero_grad()
        twin(batch(step)).backward()
        other.step()
    assert_alike(optimizer, other)


@every_mode
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_a_step_within_the_backward_pass(cls, lazy, sparse):
    model, optimizer = made(cls, lazy, Model(sparse))
    twin = Model(sparse)
    each = {p: cls([p], lazy=lazy, **HYPER) for p in twin.parameters()}
    each[twin.table.weight].track(twin.table)

    def step(p):
        each[p].step()
        each[p].zero_grad()

    for p in twin.parameters():
        p.register_post_accumulate_grad_hook(step)
    for k in range(8):
        optimizer.zero_grad()
        model(batch(k)).backward()
        optimizer.step()
        twin(batch(k)).backward()
        assert all(p.grad is None for p in twin.parameters())
    for other in (optimizer, *each.values()):
        other.flush()
    for p, q in zip(model.parameters(), twin.parameters()):
        assert same_bits(p, q)


# ------------------------------------------------------------------------------------- conversions


@pytest.mark.parametrize("cls,follow", [(Tiger, "exact"), (Lion, "exact")])
def test_a_model_converted_during_the_run(cls, follow):
    sparse, dense = Model(True), Model(False)
    _, lazy = made(cls, follow, sparse)
    full = cls(dense.parameters(), **HYPER)
    table = sparse.table.weight
    for k, dtype in enumerate((torch.float32, torch.float64, torch.float32, torch.float64)):
        for model in (sparse, dense):
            model.to(dtype).to(device="cpu")
        train(sparse, lazy, range(6 * k, 6 * k + 6))
        train(dense, full, range(6 * k, 6 * k + 6))
        assert sparse.table.weight is table and table.dtype == dtype
    lazy.flush()
    assert clock_of(lazy).history.steps == 24
    for p, q in zip(sparse.parameters(), dense.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-5)


@every_mode
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_swapped_parameters_go_on_as_converted_ones(cls, lazy, dtype):
    results = []
    for swap in (False, True):
        model, optimizer = made(cls, lazy)
        train(model, optimizer, range(5))
        model.zero_grad()
        table, before = model.table.weight, model.table.weight.data_ptr()
        torch.__future__.set_swap_module_params_on_conversion(swap)
        try:
            model.to(dtype)
        finally:
            torch.__future__.set_swap_module_params_on_conversion(False)
        assert model.table.weight is table and table.data_ptr() != before
        train(model, optimizer, range(5, 12))
        optimizer.flush()
        assert table.dtype == dtype and optimizer.state[table]
        results.append(optimizer)
    assert_alike(*results)


# --------------------------------------------------------------------------- threads and processes


def long_run(seed, cls, lazy):
    model = Model(seed=seed)
    model.table = nn.Embedding(500, DIM, sparse=True)
    generator = torch.Generator().manual_seed(seed)
    model.table.weight.data = torch.randn(500, DIM, generator=generator)
    optimizer = cls(model.parameters(), lazy=lazy, **HYPER)
    optimizer.track(model.table)
    ids = torch.randint(500, (60, 40), generator=generator)
    for step in range(60):
        optimizer.zero_grad()
        model(ids[step]).backward()
        optimizer.step()
        if step == 30:
            optimizer.flush(progress=False)
    optimizer.flush(progress=False)
    return optimizer


def test_threads_with_an_optimizer_each():
    runs = [(1, Tiger, "exact"), (2, Lion, "decay"), (3, AdamW, "decay"), (4, Tiger, "frozen")]
    expected = [long_run(*run) for run in runs]
    with ThreadPoolExecutor(4) as pool:
        for one, other in zip(expected, pool.map(lambda run: long_run(*run), runs)):
            assert_alike(one, other)


def in_child(model, optimizer, path):
    optimizer.track(model.table)
    train(model, optimizer, range(5, 10))
    optimizer.flush()
    torch.save([dict(model.state_dict()), optimizer.state_dict()], path)


@every_lazy
def test_a_spawned_child_goes_on(lazy, tmp_path):
    model, optimizer = made(Tiger, lazy)
    train(model, optimizer, range(5))
    model.zero_grad()
    twin, other = copy.deepcopy((model, optimizer))  # a child shares the memory of what it is sent
    context = torch.multiprocessing.get_context("spawn")
    child = context.Process(target=in_child, args=(twin, other, tmp_path / "child.pt"))
    child.start()
    train(model, optimizer, range(5, 10))
    optimizer.flush()
    child.join(120)
    assert child.exitcode == 0
    state, saved = torch.load(tmp_path / "child.pt", weights_only=True)
    for name, value in model.state_dict().items():
        assert same_bits(value, state[name])
    mine = optimizer.state_dict()
    assert mine["param_groups"] == saved["param_groups"]
    for i in mine["state"]:
        for name, value in mine["state"][i].items():
            assert same_bits(value, saved["state"][i][name])


# ---------------------------------------------------------------------------------- odd parameters


@every_mode
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_parameters_of_no_dimension_and_of_no_element(cls, lazy, dtype):
    shapes = [(), (0,), (3, 0), (0, 4), (1,)]
    params = [nn.Parameter(torch.ones(s, dtype=dtype)) for s in shapes]
    optimizer = cls(params, lazy=lazy, **HYPER)
    for step in range(4):
        for p in params:
            p.grad = torch.ones_like(p) if step % 2 == 0 else None
        optimizer.step()
    optimizer.flush()
    assert params[0] < 1 and params[4] < 1 and same_bits(params[0].reshape(1), params[4])
    for p in params:
        assert optimizer.state[p]["exp_avg"].shape == p.shape
    other = cls([nn.Parameter(p.detach().clone()) for p in params])
    other.load_state_dict(optimizer.state_dict())
    assert_alike(optimizer, other)


@every_mode
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_parameters_are_refused(cls, lazy, dtype):
    with pytest.raises(ValueError, match=f"complex parameters are not supported.*{dtype}"):
        cls([("c", nn.Parameter(torch.ones(2, dtype=dtype)))], lazy=lazy)


@every_mode
@pytest.mark.parametrize("nonfinite", ["propagate", "skip", "shrink", "raise"])
@pytest.mark.parametrize("layout", ["dense", "rows", "sparse"])
def test_meta_parameters_and_those_beside_them(cls, lazy, nonfinite, layout):
    with torch.device("meta"):
        module = nn.Embedding(ROWS, DIM)
    p, q = module.weight, nn.Parameter(torch.ones(3))
    options = dict(lazy=lazy, nonfinite=nonfinite, rows="nonzero" if layout == "rows" else None)
    optimizer = cls([p, q], **options, **HYPER)
    optimizer.track(module)
    module(torch.empty(2, dtype=torch.int64, device="meta"))
    twin = nn.Parameter(torch.ones(3))
    other = cls([twin], **options, **HYPER)
    for _ in range(3):
        p.grad = torch.empty(ROWS, DIM, device="meta")
        if layout == "sparse":
            ids = torch.empty(1, 2, dtype=torch.int64, device="meta")
            values = torch.empty(2, DIM, device="meta")
            p.grad = torch.sparse_coo_tensor(ids, values, p.shape, check_invariants=False)
        q.grad = twin.grad = torch.ones(3)
        optimizer.step()
        other.step()
    optimizer.flush()
    other.flush()
    assert same_bits(q, twin)
    optimizer.load_state_dict(optimizer.state_dict())
    state = optimizer.state[p]
    assert state["exp_avg"].is_meta and state["exp_avg"].shape == p.shape
    assert ("last_step" in state) == (lazy != "frozen")


# -------------------------------------------------------------------------------- tables of bags


@pytest.mark.parametrize(
    "mode,sparse",  # torch has no sparse gradient of "max"
    [("sum", True), ("mean", True), ("sum", False), ("mean", False), ("max", False)],
)
@pytest.mark.parametrize("cls,lazy", [(Tiger, "exact"), (Lion, "decay"), (AdamW, "decay")])
def test_embedding_bags_read_current_rows(cls, lazy, sparse, mode):
    bags = []
    for _ in range(2):
        bag = nn.EmbeddingBag(ROWS, DIM, mode=mode, sparse=sparse, dtype=torch.float64)
        bag.weight.data = torch.linspace(-1, 1, ROWS * DIM).double().reshape(ROWS, DIM)
        rows = None if sparse else "tracked"
        bags.append((bag, cls(bag.parameters(), lazy=lazy, rows=rows, **HYPER)))
    (bag, optimizer), (twin, other) = bags
    optimizer.track(bag)
    other.track(twin)
    for step in range(20):
        ids, offsets = batch(step), torch.tensor([0, 2, 2, 4])
        if step % 5 == 4:
            bag.eval(), twin.eval()
        if step % 3 == 2:
            ids, offsets = ids[:4].reshape(2, 2), None
        other.flush()  # every row is current
        outputs = []
        for b, o in bags:
            o.zero_grad()
            out = b(ids, offsets) if step % 2 else b(input=ids, offsets=offsets)
            outputs.append(out)
            if b.training:
                (out * torch.linspace(-1, 2, out.numel()).reshape(out.shape)).sum().backward()
                o.step()
        torch.testing.assert_close(*outputs, rtol=0, atol=1e-13)
        bag.train(), twin.train()
    before = bag.weight.detach().clone()
    optimizer.flush()
    assert not torch.equal(before, bag.weight)  # some rows did lag
    torch.testing.assert_close(bag.weight, twin.weight, rtol=0, atol=1e-13)


# ---------------------------------------------------------------------------------- half precision


@pytest.mark.parametrize("fused", [None, False], ids=["native", "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cls,lazy", [(Tiger, "exact"), (Lion, "exact"), (Tiger, "decay")])
def test_half_precision_against_the_dense_rule(cls, lazy, dtype, fused):
    p = nn.Parameter(torch.randn(ROWS, DIM).to(dtype))
    options = dict(lazy=lazy, momentum_dtype=torch.float32, fused=fused)
    optimizer = cls([p], lr=0.01, weight_decay=0.1, **options)
    group = optimizer.param_groups[0]
    dense = Dense(p, group["algorithm"], lazy)
    largest = dense.p.abs().amax(1)
    touches = torch.zeros(ROWS)
    for step in range(60):
        ids = torch.randint(1 + step % ROWS, (3,)).unique()
        values = torch.randn(len(ids), DIM).to(dtype)
        p.grad = torch.sparse_coo_tensor(ids[None], values, p.shape, check_invariants=True)
        group["lr"] = 0.01 * (1 + step % 3)
        optimizer.step()
        touched = torch.zeros(ROWS, dtype=torch.bool).index_fill(0, ids, True)
        full = p.grad.to_dense()
        dense.step(full, touched, lr=group["lr"], wd=0.1, betas=group["betas"])
        largest = torch.maximum(largest, dense.p.abs().amax(1))
        touches += touched
    optimizer.flush()
    # Each catch-up, each update and the flush round to the storage type once.
    allowed = (2 * touches + 1) * torch.finfo(dtype).eps / 2 * (largest + 0.05)
    error = (p.detach().double() - dense.p).abs().amax(1)
    assert bool((error <= allowed).all()), (error / allowed).max()
    assert int(touches.min()) <= 3 < int(touches.max())
    torch.testing.assert_close(optimizer.state[p]["exp_avg"].double(), dense.m, rtol=0, atol=1e-5)


@pytest.mark.parametrize("fused", [None, False], ids=["native", "reference"])
def test_state_made_by_a_step_in_inference_mode_is_ordinary(fused):
    p = torch.nn.Parameter(torch.ones(3, 2))
    optimizer = Tiger([p], lazy="exact", fused=fused)
    p.grad = torch.ones(3, 2)
    with torch.inference_mode():
        optimizer.step()
    assert not any(t.is_inference() for t in optimizer.state[p].values())
    optimizer.step()
    assert optimizer.state[p]["last_step"].tolist() == [2, 2, 2]
