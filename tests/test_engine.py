# SPDX-License-Identifier: Apache-2.0
"""How a step is put together: options as the compiled module reads them, hooks, recording."""

import json

import pytest
import torch
from cases import RULES, clock_of, every_rule, parameter, sparse_grad
from torch.nn import Embedding, Parameter

from tiger_ext import AdamW, Tiger, _native
from tiger_ext.options import ALGORITHMS


def stepped(**options):
    p = parameter(6, 3)
    p.grad = sparse_grad(p, 4)
    opt = Tiger([p], **options)
    opt.step()
    return p, opt


# -------------------------------------------------------------------------- options, rules, state


@pytest.mark.parametrize("algorithm", ALGORITHMS.values(), ids=lambda a: a.name)
def test_the_compiled_rules_have_the_moments_of_the_table(algorithm):
    names = [m.name for m in algorithm.moments]
    required = [m.name for m in algorithm.moments if not m.optional]
    forms = _native.C.rule_forms()[algorithm.family]
    assert names in forms
    assert {tuple(form) for form in forms} == {tuple(names), tuple(required)}


def test_a_state_that_the_compiled_module_does_not_find_is_an_error(monkeypatch):
    row = ALGORITHMS["tiger"]
    wrong = type(row)(**{**vars(row), "moments": (type(row.moments[0])("m", -1),)})
    monkeypatch.setitem(ALGORITHMS, "tiger", wrong)
    p = parameter(3)
    p.grad = torch.ones(3)
    opt = Tiger([p])
    with pytest.raises(RuntimeError, match="its state lacks what the compiled module wants"):
        opt.step()
    assert not opt.state


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("lazy", None, ValueError),
        ("lazy", "sometimes", ValueError),
        ("nonfinite", None, ValueError),
        ("direction", None, ValueError),
        ("rows", "some", ValueError),
        ("weight_decay", "x", TypeError),
        ("weight_decay", None, TypeError),
        ("betas", (None,), TypeError),
        ("rms_floor", "x", TypeError),
    ],
)
def test_options_spoilt_after_construction_are_named(name, value, error):
    p, opt = stepped()
    before = p.detach().clone()
    opt.param_groups[0][name] = value
    with pytest.raises(error, match=f"{name}="):
        opt.step()
    assert torch.equal(p, before)


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("value", [None, "sometimes"])
def test_a_lazy_mode_that_does_not_exist_takes_no_step(fused, value):
    p, opt = stepped(lazy="decay", fused=fused)
    before = p.detach().clone()
    opt.param_groups[0]["lazy"] = value
    with pytest.raises(ValueError, match=f"lazy={value!r}: expected one of"):
        opt.step()
    assert torch.equal(p, before)
    assert clock_of(opt).history.steps == 1


@pytest.mark.parametrize("name", ["betas", "weight_decay", "maximize", "rows", "nonfinite", "lazy"])
def test_options_that_are_gone_are_named(name):
    p, opt = stepped()
    before = p.detach().clone()
    del opt.param_groups[0][name]
    with pytest.raises(KeyError, match=name):
        opt.step()
    assert torch.equal(p, before)


def test_betas_may_be_anything_with_numbers():
    results = []
    for betas in [(0.5,), [0.5], torch.tensor([0.5])]:
        torch.manual_seed(0)
        p, opt = stepped()
        opt.param_groups[0]["betas"] = betas
        opt.step()
        results.append(opt.state[p]["exp_avg"])
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("lazy", ["frozen", "decay"])
def test_a_first_moment_that_is_wanted_later(lazy):
    p = parameter(6, 3)
    opt = AdamW([p], betas=(0.0, 0.9), lazy=lazy)
    for _ in range(2):
        p.grad = sparse_grad(p, 4)
        opt.step()
    assert "exp_avg" not in opt.state[p]
    opt.param_groups[0]["betas"] = (0.9, 0.9)
    opt.flush()
    opt.step()
    assert opt.state[p]["exp_avg"].abs().sum() > 0
    opt.param_groups[0]["betas"] = (0.0, 0.9)
    opt.step()
    opt.flush()


def test_tracking_a_table_counts_no_step():
    tables = [Embedding(5, 2, sparse=True) for _ in range(2)]
    opt = Tiger([{"params": t.parameters(), "lazy": "decay"} for t in tables])
    opt.track(tables[1])
    tables[1](torch.tensor([1]))
    assert [clock_of(opt, k).history.started for k in range(2)] == [False, False]


def test_a_parameter_without_a_kernel_and_a_gradient_is_not_asked_for_one():
    p, idle = parameter(3), Parameter(torch.empty(3, device="meta"))
    opt = Tiger([p, idle], accumulation_steps=2, fused=True)
    for _ in range(2):
        p.grad = torch.ones(3)
        opt.step()
    assert clock_of(opt).windows == 1


class Slice(Parameter):
    """Rows of a larger parameter, with their part of its gradient (as TorchRec's tables have)."""

    def __new__(cls, whole: Parameter, rows: slice):
        new = torch.Tensor._make_subclass(cls, whole.detach()[rows], True)
        new._whole, new._rows = whole, rows
        return new

    @property
    def grad(self):
        whole = self._whole.grad
        return None if whole is None else whole[self._rows]

    @grad.setter
    def grad(self, value):
        raise AssertionError("a step does not write gradients")


@every_rule
@pytest.mark.parametrize("fused", [None, True, False])
@pytest.mark.parametrize("options", [{}, {"lazy": "decay"}, {"rows": "nonzero"}], ids=str)
def test_gradients_behind_a_property(rule, fused, options):
    torch.manual_seed(3)
    whole = Parameter(torch.randn(8, 3))
    start = whole.detach().clone()
    parts = [Slice(whole, slice(0, 5)), Slice(whole, slice(5, 8))]
    opt = rule(parts, fused=fused, **options)
    opt.step()  # no gradient: nothing happens
    assert torch.equal(whole, start)

    plain = [Parameter(start[:5].clone()), Parameter(start[5:].clone())]
    expected = rule(plain, fused=fused, **options)
    expected.step()
    for _ in range(3):
        whole.grad = torch.randn(8, 3)
        for p, rows in zip(plain, (slice(0, 5), slice(5, 8))):
            p.grad = whole.grad[rows].clone()
        opt.step()
        expected.step()
    assert not torch.equal(whole, start)
    assert torch.equal(whole, torch.cat([p.detach() for p in plain]))


# ------------------------------------------------------------------------------ hooks, recording


@every_rule
def test_a_profile_has_the_step(rule):
    p = parameter(3)
    p.grad = torch.ones(3)
    opt = rule([p])
    with torch.profiler.profile() as profile:
        opt.step()
    assert f"Optimizer.step#{type(opt).__name__}.step" in [e.name for e in profile.events()]


def test_an_observer_without_a_profiler_has_the_step(tmp_path):
    _, opt = stepped()
    observer = torch.profiler.ExecutionTraceObserver()
    observer.register_callback(str(tmp_path / "trace.json"))
    observer.start()
    opt.step()
    observer.stop()
    observer.unregister_callback()
    names = [node["name"] for node in json.loads((tmp_path / "trace.json").read_text())["nodes"]]
    assert "Optimizer.step#Tiger.step" in names


def test_a_hook_that_the_closure_registers_is_called():
    p = parameter(3)
    p.grad = torch.ones(3)
    for cls in (torch.optim.AdamW, RULES[0]):
        opt, calls = cls([p]), []

        def closure(opt=opt, calls=calls):
            opt.register_step_post_hook(lambda o, args, kwargs: calls.append((o, args, kwargs)))
            return 5

        assert opt.step(closure) == 5
        assert calls == [(opt, (opt, closure), {})]


def test_step_by_keyword():
    p, opt = stepped()
    before = p.detach().clone()
    Tiger.step(self=opt)
    assert not torch.equal(p, before)


@pytest.mark.parametrize("enabled", [False, True])
def test_grad_mode_is_as_before(enabled):
    p, opt = stepped()
    with torch.set_grad_enabled(enabled):
        assert opt.step(torch.is_grad_enabled) is True
        assert torch.is_grad_enabled() is enabled
        p.grad = torch.sparse_coo_tensor([[99]], torch.ones(1, 3), p.shape, check_invariants=False)
        with pytest.raises(IndexError):
            opt.step()
        assert torch.is_grad_enabled() is enabled
