# SPDX-License-Identifier: Apache-2.0
"""The fuzzer of tests/fuzz: that it runs, and that it notices what is wrong and makes it small."""

import argparse
import copy
import json
import subprocess
import sys
from collections import Counter

import pytest
import torch
from fuzz import model
from fuzz.__main__ import Part
from fuzz.checkpoints import Case, case_of, run_case, shrink_case
from fuzz.execute import script
from fuzz.generate import generate
from fuzz.observe import Failure, snapshot
from fuzz.operations import Run, failure_of
from fuzz.program import Code, Grad, GroupSpec, Op, Param, Program
from fuzz.shrink import shrink
from oracle import same_bits

from tiger_ext import checkpoint, group_step, moments, reference, reference_step, rounding
from tiger_ext.history import History
from tiger_ext.optimizer import MixedOptimizer

CLOCK = """saved["state"][0]['last_step']"""
AGREE = [2, 8, 19, 22, 23, 28, 29, 37]


def table(**options):
    """Return a group with one table, in which rows lag."""
    shared = dict(lr=0.1, betas=(0.9,), weight_decay=0.5, lazy="exact")
    return GroupSpec([Param("a", (3, 2), 1)], {**shared, **options})


def steps(count):
    grad = Grad("sparse", dict(seed=3, dims=1, nnz=1))
    return [Op("step", {}, {"a": grad}), *[Op("step") for _ in range(count)], Op("flush")]


@pytest.mark.parametrize("seed", AGREE)
@pytest.mark.parametrize("fused", [None, False], ids=["native", "reference"])
def test_programs_agree_with_the_model(seed, fused):
    program = generate(seed)
    program.fused = fused
    failure, execution = failure_of(program)
    assert failure is None, failure
    assert execution.counts["steps"] > 0


def test_the_same_seed_is_the_same_program():
    assert repr(generate(7)) == repr(generate(7)) != repr(generate(8))


def lost_step(monkeypatch):
    """Let histories lose every third step."""
    advance = History.advance
    calls = Counter()

    def forgetful(self, *hyperparameters):
        calls["all"] += 1
        if calls["all"] % 3:
            advance(self, *hyperparameters)

    monkeypatch.setattr(History, "advance", forgetful)


@pytest.mark.parametrize("fused", [None, False], ids=["native", "reference"])
def test_a_lost_step_is_found_and_shrunk(fused, monkeypatch):
    lost_step(monkeypatch)
    seeds = iter(range(100))
    failure = None
    while failure is None:
        program = generate(next(seeds))
        program.fused = fused
        failure, _ = failure_of(program)

    def fails(smaller):
        return failure_of(smaller)[0] is not None

    smaller = shrink(program, fails, seconds=3.0)
    assert fails(smaller)
    assert len(repr(smaller)) < len(repr(program)) / 2


def test_a_lost_step_is_wrong_after_a_flush(monkeypatch):
    program = Program("Tiger", [table()], steps(5))
    assert failure_of(program)[0] is None
    lost_step(monkeypatch)
    assert failure_of(program)[0].kind == "after flush: parameter is wrong"


def test_a_model_that_steps_wrongly_is_noticed(monkeypatch):
    program = Program("Lion", [table(lazy="frozen", betas=(0.9, 0.99))], steps(0))
    assert failure_of(program)[0] is None
    monkeypatch.setattr(model, "sign", lambda t: -t.sign())
    assert failure_of(program)[0].kind == "after a step: parameter is wrong"


def test_a_step_that_fails_and_writes_is_noticed(monkeypatch):
    grad = Grad("sparse", dict(seed=3, dims=1, nnz=2))
    program = Program("Tiger", [table()], [Op("step", {"fault": "index a"}, {"a": grad})])
    failure, execution = failure_of(program)
    assert failure is None and execution.counts["faults"] == 1
    step = MixedOptimizer._step_eager

    def writes(self):
        with torch.no_grad():
            self.param_groups[0]["params"][0][2, 1] += 1e-6
        step(self)

    monkeypatch.setattr(MixedOptimizer, "_step_eager", writes)
    assert failure_of(program)[0].kind == "changed by a refused opt step : parameter #.#"


INT8 = Code("torch.int8")


def patched(place, name, change):
    """Return what lets a function of the package return something else."""

    def patch(monkeypatch):
        right = getattr(place, name)
        monkeypatch.setattr(place, name, lambda *args, **kw: change(right, *args, **kw))

    return patch


def other_draws(**changes):
    """Return what lets all random bits be those of another key; each is a function of it."""

    def bits(right, self, stream, p, where):
        key = {k: change(getattr(self, k)) for k, change in changes.items() if k != "stream"}
        stream = changes.get("stream", lambda s: s)(stream)
        return right(rounding.Draws(**{**vars(self), **key}), stream, p, where)

    return patched(rounding.Draws, "bits", bits)


def small_program(cls="Lion", layout="sparse", dtype="f32", **options):
    """Return a program with two tables, of which the second gets other rows each time."""
    tables = [Param("a", (3, 2), 1, dtype), Param("b", (40, 9), 2, dtype)]
    betas = (0.9,) if cls == "Tiger" else (0.9, 0.95)
    shared = dict(lr=0.1, betas=betas, weight_decay=0.5)
    ops = []
    for seed in range(4):
        more = dict(dims=1, nnz=30) if layout == "sparse" else {}
        ops.append(Op("step", {}, {"b": Grad(layout, dict(seed=seed, **more))}))
    ops.append(Op("flush"))
    return Program(cls, [GroupSpec(tables, {**shared, **options})], ops, False)


def quantised_otherwise(factor, shift):
    """Return what gives int8 momenta other scales, or other numbers."""

    def quantised(right, values, bits):
        q, scale = right(values, bits)
        return (q + shift * (q.abs() < 100)).to(torch.int8), scale * factor

    return patched(moments, "quantised", quantised)


SMALL_FAULTS = {
    "scale": (dict(momentum_dtype=INT8), quantised_otherwise(1.001, 0), "a scale is wrong"),
    "numbers": (
        dict(momentum_dtype=INT8, layout="dense"),
        quantised_otherwise(1.0, 1),
        "a momentum has other random bits",
    ),
    "nearest int8": (
        dict(momentum_dtype=INT8),
        patched(moments, "quantised", lambda right, v, b: right(v, torch.full_like(b, 1 << 15))),
        "a momentum has other random bits",
    ),
    "momentum's stream": (
        dict(momentum_dtype=INT8),
        other_draws(stream=lambda s: 2 if s == 1 else s),
        "a momentum has other random bits",
    ),
    "decay of scales": (
        dict(momentum_dtype=INT8, lazy="decay"),
        patched(
            reference_step,
            "decaying",
            lambda right, m, s: right(m, s).clone() if m.name == "exp_avg" else right(m, s),
        ),
        "after flush: exp_avg is wrong",
    ),
    "mean": (
        dict(cls="AdamW", second_moment="row"),
        patched(reference, "mean_over", lambda right, g, rows: 1.0001 * right(g, rows)),
        "after a step: parameter is wrong",
    ),
    "largest in place of the mean": (
        dict(cls="AdamW", second_moment="row", layout="dense", betas=(0.0, 0.95)),
        patched(reference, "mean_over", lambda right, g, rows: g.square().amax(-1, keepdim=True)),
        "after a step: parameter is wrong",
    ),
    "nearest": (
        dict(dtype="bf16", stochastic_rounding=True),
        patched(reference_step, "round_to", lambda right, dtype, v, bits: v.to(dtype)),
        "other random bits",
    ),
    "step": (
        dict(dtype="f16", stochastic_rounding=True, layout="dense"),
        other_draws(step=lambda t: t + 1),
        "other random bits",
    ),
    "position": (
        dict(dtype="bf16", stochastic_rounding=True),
        other_draws(position=lambda n: 0),
        "other random bits",
    ),
    "stream of a catch-up": (
        dict(dtype="bf16", stochastic_rounding=True, lazy="exact"),
        other_draws(stream=lambda s: 0),
        "other random bits",
    ),
    "rows for blocks": (
        dict(dtype="bf16", stochastic_rounding=True, layout="dense"),
        patched(rounding, "memory_order", lambda right, p: right(p.unsqueeze(0)).squeeze(0) + 256),
        "other random bits",
    ),
}


@pytest.mark.parametrize("fault", SMALL_FAULTS)
def test_state_in_few_bytes_that_is_wrong_is_found(fault, monkeypatch):
    options, patch, kind = SMALL_FAULTS[fault]
    program = small_program(**options)
    failure, execution = failure_of(program)
    assert failure is None, failure
    assert "mean" in fault or execution.counts["drawn"] > 100
    patch(monkeypatch)
    assert failure_of(program)[0].kind == kind


@pytest.mark.parametrize("fused", [None, False], ids=["native", "reference"])
@pytest.mark.parametrize(
    "options,kind",
    [
        (dict(dtype="bf16", stochastic_rounding=True), "other random bits"),
        (dict(momentum_dtype=INT8), "a momentum has other random bits"),
    ],
    ids=["rounding", "int8"],
)
def test_another_seed_is_found(fused, options, kind, monkeypatch):
    program = small_program(**options)
    program.fused = fused
    assert failure_of(program)[0] is None

    def other(right, group):
        right(group)
        group["rounding_seed"] = 5

    patched(group_step, "keep_seed", other)(monkeypatch)
    assert failure_of(program)[0].kind == kind


@pytest.mark.parametrize("lazy", ["frozen", "exact"])
def test_a_delta_that_lacks_something_is_found(lazy, monkeypatch):
    program = small_program(lazy=lazy, momentum_dtype=INT8)
    for i in (2, 1):
        program.ops.insert(i, Op("delta"))
    program.ops.append(Op("delta"))
    failure, execution = failure_of(program)
    assert failure is None, failure
    assert execution.counts["op delta"] == 3
    apply = checkpoint.apply_changes

    def forgetful(optimizer, path):
        p = optimizer.param_groups[0]["params"][1]
        scale = copy.deepcopy(optimizer.state[p]["exp_avg_scale"])
        apply(optimizer, path)
        optimizer.state[p]["exp_avg_scale"][:5] = scale[:5]

    monkeypatch.setattr(checkpoint, "apply_changes", forgetful)
    assert failure_of(program)[0].kind == "a delta lacks parameter #.# exp_avg_scale"


def test_programs_have_all_options_of_small_state():
    options = [g.options for seed in range(60) for g in generate(seed).groups]
    assert any(o.get("stochastic_rounding") for o in options)
    assert any(o.get("second_moment") == "row" and o["betas"][0] == 0 for o in options)
    assert {o["lazy"] for o in options if repr(o.get("momentum_dtype")) == "torch.int8"} == {
        "frozen",
        "decay",
        "exact",
    }


INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize("what", ["parameter", "exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize(
    "expected,error,got,right",
    [
        (INF, 0.0, INF, True),
        (INF, 0.0, -INF, False),
        (INF, 0.0, NAN, False),
        (INF, 0.0, 65504.0, False),
        (NAN, 0.0, NAN, True),
        (NAN, 0.0, INF, False),
        (65520.0, 0.0, INF, True),  # the least number that rounds to it
        (-65520.0, 0.0, INF, False),
        (-65520.0, 0.0, -INF, True),
        (65000.0, 0.0, INF, False),
        (1.0 + 0.49 * 2.0**-10, 0.0, 1.0, True),
        (1.0 + 0.53 * 2.0**-10, 0.0, 1.0, False),
        (206 / 1024 - 0.2 - 0.49 * 2.0**-13, 0.2, 206 / 1024, True),
        (206 / 1024 - 0.2 - 0.53 * 2.0**-13, 0.2, 206 / 1024, False),
    ],
)
def test_what_is_compared_is_one_number_rounded_once(what, expected, error, got, right):
    group = GroupSpec([Param("a", (1,), 1, "f16")], dict(momentum_dtype=Code("torch.float16")))
    execution = Run(Program("AdamW", [group], []))
    p = execution.names["a"]
    tensor = p.detach() if what == "parameter" else torch.zeros(1, dtype=torch.float16)
    execution.optimizer.state[p][what] = tensor
    tensor.fill_(got)
    estimate = model.Estimate(*(torch.tensor([x], dtype=torch.float64) for x in (expected, error)))
    where = torch.ones(1, dtype=torch.bool)
    failure = None
    try:
        execution._compare("now", what, "a", estimate, torch.float16, where)
    except Failure as found:
        failure = found
    assert (failure is None) == right, failure


def test_looking_at_an_optimizer_changes_nothing():
    _, execution = failure_of(Program("Tiger", [table()], steps(2)))
    optimizer, clocks = execution.optimizer, execution.optimizer._clocks
    state = optimizer.state.pop(execution.names["a"])  # cleared, which a look would note
    optimizer.param_groups[0]["params"].append(b := torch.nn.Parameter(torch.ones(3, 2)))
    optimizer.state[b] = state  # of a new parameter, for which a look would drop its clock
    numbers = [clock.__getstate__() for clock in clocks._clocks]
    before = copy.deepcopy([numbers, dict(state)], {id(p): p for p in (execution.names["a"], b)})
    found = snapshot(optimizer)
    assert found["parameter 0.1 begins_at"] == 3
    assert repr([[clock.__getstate__() for clock in clocks._clocks], dict(state)]) == repr(before)
    assert "last_step" in optimizer.state[b]


def test_the_printed_program_is_what_ran():
    _, execution = failure_of(Program("Tiger", [table()], steps(5)))
    names = {}
    exec(script(execution.lines, "expected: something\nelse"), names)
    assert same_bits(names["a"], execution.names["a"])


def test_a_load_that_is_refused_halfway_is_noticed_and_shrunk(monkeypatch):
    program = Program("Tiger", [table()], steps(2))
    uses = ["opt.step()", "opt.flush()"]
    case = Case(program, False, ['saved["param_groups"].append({"params": []})', "x = 1"], uses)
    counts = Counter()
    assert run_case(case, counts)[0] is None
    assert counts["refused"] == 1 and counts["steps"] == 1

    def halfway(self, saved):
        self.param_groups[0]["lr"] = 7.0
        raise ValueError("no such state dict")

    monkeypatch.setattr(MixedOptimizer, "load_state_dict", halfway)
    failure, _ = run_case(case, counts)
    assert failure.kind == "changed by a refused load: group # lr"
    smaller = shrink_case(case, failure.kind, seconds=3.0)
    assert smaller.uses == smaller.changes == smaller.program.ops == []


def test_an_error_that_says_nothing_is_noticed(monkeypatch):
    case = Case(Program("Tiger", [table()], steps(2)), True)
    assert run_case(case, Counter())[0] is None

    def crash(self, saved):
        raise KeyError("exp_avg")

    monkeypatch.setattr(MixedOptimizer, "load_state_dict", crash)
    assert run_case(case, Counter())[0].kind == "load raised KeyError"


@pytest.mark.parametrize(
    "said,found",
    [
        ("a: the accumulation window has number 0, expected one from 1 on", True),
        ("a: sparse_dim changed from 1 to 2 within an accumulation window", False),
    ],
)
def test_only_refusals_that_come_from_a_gradient_are_legal(said, found, monkeypatch):
    case = Case(Program("Tiger", [table()], steps(2)), True, uses=["opt.step()"])

    def refuses(self, *_):
        raise RuntimeError(said)

    def loads(self, saved):
        monkeypatch.setattr(MixedOptimizer, "_step_eager", refuses)

    monkeypatch.setattr(MixedOptimizer, "load_state_dict", loads)
    assert (run_case(case, Counter())[0] is not None) == found


@pytest.mark.parametrize(
    "change",
    [
        """saved["param_groups"][0]['lr'] = -1""",
        """saved["param_groups"][0]['windows'] = 2**31""",
        """saved["param_groups"][0]['micro_steps'] = -1""",
        """saved["state"][0]['frozen_at'] = 10**6""",
        """saved["state"][0]['begins_at'] = 2.5""",
        f"{CLOCK} = torch.full_like({CLOCK}, 10**6)",
    ],
)
def test_a_load_that_checks_nothing_is_noticed(change, monkeypatch):
    monkeypatch.setattr(MixedOptimizer, "load_state_dict", lambda self, saved: None)
    case = Case(Program("Tiger", [table()], steps(2)), True, [change])
    assert run_case(case, Counter())[0].kind == "loaded what is illegal"
    case.changes = ["""saved["param_groups"][0]['betas'] = (0.9,)"""]
    assert run_case(case, Counter())[0] is None


def test_mutations_change_the_state_dict():
    cases = [case_of(seed, Counter()) for seed in range(3)]
    assert all(case is None or (case.changes and case.uses) for case in cases)
    assert any(cases)


def test_a_process_that_ends_is_reported_with_what_it_did(capsys):
    said = [{"begin": 3}, {"end": 3, "counts": {"steps": 2}, "failures": []}, {"begin": 4}]
    said.append({"case": "the case"})
    program = f"print({chr(10).join(map(json.dumps, said))!r}); raise SystemExit(1)"
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    part = Part("checkpoints", 3, argparse.Namespace())
    with process:
        assert part._listen(process) == "the case"
    assert part.next == 4 and part.counts["steps"] == 2


@pytest.mark.parametrize(
    "case,code,found",
    [
        (None, 0, []),
        (None, 1, ["failure at exit"]),
        ("the case", 0, ["crash or hang"]),
        ("the case", 1, ["crash or hang"]),
    ],
)
def test_how_a_process_ends_counts(case, code, found):
    part = Part("checkpoints", 3, argparse.Namespace())
    said = "... ERROR: AddressSanitizer: heap-use-after-free"
    part._process_ended(case, code, f"ended with status {code}", said)
    assert [failure["kind"] for failure in part.failures] == found
    assert all("heap-use-after-free" in failure["message"] for failure in part.failures)


def test_a_part_that_tried_nothing_or_too_little_is_a_failure():
    part = Part("checkpoints", 3, argparse.Namespace())
    part.next = 13
    assert part.complaint() == (
        "checkpoints: nothing ran in 10 seeds, expected at least one of checkpoints"
    )
    part.counts.update({"checkpoints": 9, "without meaning": 1})
    assert part.complaint() is None
    part.counts["without meaning"] = 2
    assert part.complaint() == (
        "checkpoints: 2 of 10 seeds were without meaning, expected at most 10%"
    )


def test_a_run_that_tries_nothing_fails(run_python):
    program = """
import sys
from fuzz import __main__ as fuzz
sys.argv = ["fuzz", "--only", "checkpoints", "--seed", "1", "--seconds", "60", "--programs", "0"]
sys.exit(fuzz.main())
"""
    result = run_python(program, check=False)
    assert result.returncode == 1
    assert "nothing ran in 0 seeds" in result.stdout, result.stderr
