# SPDX-License-Identifier: Apache-2.0
"""Mutated state dicts: refused in one sentence, or loaded and used without harm.

A case is a program, lines that change its state dict ``saved``, and lines that use what was loaded.
"""

from __future__ import annotations

import random
import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fuzz.execute import Execution, caught
from fuzz.generate import KINDS, Generator
from fuzz.observe import Failure, snapshot
from fuzz.operations import Run
from fuzz.program import GroupSpec, Program, complete
from fuzz.shrink import shrink, shrink_list

# What a value X of the state may become. Sizes stay small: memory is not what is tested.
_TENSORS = """
X.double() | X.to(torch.int64) | X.half() | X.bool() | X.to(torch.complex64) | X.to(torch.float32)
X.reshape(-1) | X[:-1] | X[0] | X.sum() | X.unsqueeze(0) | X.mT | X.mT.contiguous()
torch.zeros((), dtype=X.dtype).expand(X.shape) | torch.empty(0, dtype=X.dtype)
X.to_sparse() | X.to("meta") | X.numpy() | X.tolist() | torch.zeros(3, 3, dtype=X.dtype)
torch.zeros((), dtype=X.dtype) | torch.zeros((), dtype=X.dtype).expand(1000, 100)
None | 5 | "text" | {} | [] | float("nan") | True
"""
_INTEGERS = "-1 | -2 | -(2**31) | 2**31 - 1 | 10**6 | -(10**6) | 3"
_FLOATS = 'float("nan") | float("inf") | -float("inf")'
_STEPS = """
-1 | -5 | 0 | 2**62 | 2.5 | float("nan") | None | "text" | torch.tensor(-3) | torch.tensor([1, 2])
torch.tensor(1.5) | torch.tensor(float("inf")) | torch.tensor(3.0) | 7
"""
# Since when a parameter trains, and until when: integers beside its tensors.
_STANDING = """
0 | 1 | 2 | 3 | torch.tensor(1) | -1 | 10**6 | 2**62 | 2.5 | float("nan") | None | "text" | True
torch.tensor(-3) | torch.tensor([1, 2]) | torch.tensor(0.5) | [] | {}
"""
_STATES = "None | 5 | [] | {} | 'text' | torch.zeros(3)"
_ROWS = """
torch.tensor([[10**6]]) | torch.tensor([[-5]]) | torch.tensor([[0], [0]]) | torch.tensor([0])
torch.zeros(0, 0) | torch.zeros((0, 0), dtype=torch.int64) | torch.tensor([[2**40]]) | None | 5
torch.zeros((0, 3), dtype=torch.int64) | torch.zeros((7, 1), dtype=torch.int64)
"""
_CLOCKS = """
torch.zeros(p.shape[:1], dtype=torch.int32) | torch.zeros((), dtype=torch.int32)
torch.zeros(p.shape, dtype=torch.int32) | torch.full(p.shape[:1], -1, dtype=torch.int32)
torch.full(p.shape[:1], 50, dtype=torch.int32) | torch.zeros(99, dtype=torch.int32)
torch.zeros(p.shape[:1], dtype=torch.int64) | torch.zeros(p.shape[:1])
"""
_NUMBERS = '-1 | float("nan") | float("inf") | "0.1" | None | [0.1] | torch.zeros(2) | 1j | {}'
_OPTIONS = {
    "lr": _NUMBERS,
    "weight_decay": _NUMBERS,
    "eps": _NUMBERS,
    "betas": '(0.9,) | (0.9, 0.99) | (0.9, 0.99, 0.5) | () | 0.9 | None | (1.5, 2.0) | ("a", "b")',
    "algorithm": '"tiger" | "lion" | "adamw" | "sgd" | None | 3',
    "lazy": '"frozen" | "decay" | "exact" | "eager" | None | 1',
    "rows": '"nonzero" | "all" | 0',
    "scale": '"rms" | "rms_rows" | "size" | 2.0',
    "direction": '"clip" | "up" | None',
    "direction_scale": "-1.0 | 0.0 | float('nan') | 'x'",
    "nonfinite": '"skip" | "ignore" | None',
    "shrink_ratio": "-1 | 2.0 | None",
    "momentum_dtype": "torch.int8 | torch.int32 | 'float32' | torch.bfloat16 | 3",
    "second_moment": "'row' | 'element' | 'column' | None",
    "stochastic_rounding": "True | 1 | None",
    "rounding_seed": "-1 | 2**63 | 5 | 1.5 | None | 'x'",
    "maximize": "None | 1 | 'yes'",
    "accumulation_steps": "0 | -1 | 2.5 | '2' | None | 2 | 10**12",
    "windows": "-1 | 2.5 | 10**12 | '1' | None | 2**31 - 1 | 2**31 | float('nan') | 1 | 2**31 - 2",
    "micro_steps": "-1 | 1.5 | 10**12 | '1' | None | 1 | float('nan')",
    "fused": "1 | 'no'",
    "capturable": "None | 1",
    "history": """
    "" | "2 0 1" | "nan 0" | "inf 0" | "-1.0 0.0"
    "0.0 5.0" | "2.5 0.0" | "1e300 0.0" | None | "a b"
    "3.0 0.0 1.0 nan 0.1 0.9 0.9" | "3.0 0.0 1.0 0.1 -0.1 0.9 0.9" | "3.0 0.0 1.0 0.1 0.1 1.5 0.9"
    "3.0 0.0 1.0 50.0 0.1 0.9 0.9" | "3.0 0.0 2.0 0.1 0.1 0.9 0.9 1.0 0.1 0.1 0.9 0.9" | 5 | [1.0]
    "3.0 0.0 9.0 0.1 0.1 0.9 0.9" | "2147483647.0 0.0" | "2147483648.0 0.0" | "9e15 0.0" | {}
    "3.0 0.0 -4.0 0.1 0.1 0.9 0.9" | (0.0, 0.0) | (2.0,) | "0x10 0" | "3.0 0.0 1.0 inf 0.0 0.9 0.9"
    "3.0 0.0 1.0 0.1 0.1 0.0 0.0" | "5.0 2.0 1.0 0.1 0.1 0.9 0.9" | "1.0 0.0"
    """,
    "anything": "1 | None",
}
_GROUPS = """
saved["param_groups"].pop() | saved["param_groups"] = [] | saved["param_groups"] = None
saved["param_groups"].append(saved["param_groups"][0]) | saved["param_groups"][0] = None
saved["param_groups"].reverse() | del saved["state"] | saved["state"] = None | saved["state"] = []
saved["state"][99] = {} | saved["state"]["x"] = {"exp_avg": torch.zeros(2)}
saved = {} | saved = None
saved["param_groups"][0]["params"].append(98) | saved["param_groups"][0]["params"].pop()
saved["param_groups"][0]["params"] = [0] * len(saved["param_groups"][0]["params"])
saved["param_groups"][0]["params"] = None | saved["param_groups"][0]["params"] = ["a"]
saved["param_groups"][0]["param_names"] = [1] | saved["param_groups"][0]["param_names"] = "a"
saved["param_groups"][0]["params"].reverse() | del saved["param_groups"][0]["params"]
saved = build("Lion", [nn.Parameter(p.detach().clone()) for p in ps]).state_dict()
saved = build("AdamW", [nn.Parameter(p.detach().clone()) for p in ps]).state_dict()
saved = torch.optim.AdamW([nn.Parameter(p.detach().clone()) for p in ps]).state_dict()
saved = torch.optim.SGD([nn.Parameter(p.detach().clone()) for p in ps]).state_dict()
"""
# Of these keys every value above that is not named here has to be refused.
_LEGAL_VALUES = {
    "lr": "",
    "weight_decay": "",
    "eps": "",
    "betas": "(0.9,) | (0.9, 0.99)",
    "lazy": '"frozen" | "decay" | "exact"',
    "rows": '"nonzero"',
    "scale": '"rms" | "rms_rows"',
    "direction": '"clip"',
    "nonfinite": '"skip"',
    "shrink_ratio": "",
    "second_moment": "'row' | 'element'",
    "stochastic_rounding": "True",
    "rounding_seed": "5",
    "accumulation_steps": "2",
    "windows": "1 | 2**31 - 1 | 2**31 - 2",
    "micro_steps": "1",
}
_COUNTERS = ("windows", "micro_steps")  # of every group, whatever its options
_ILLEGAL_CLOCKS = ("2**31 - 1", "-(2**31)", "10**6", "-(10**6)")
_PERHAPS_LEGAL_STANDING = "0 | 1 | 2 | 3 | torch.tensor(1)"  # depends on the group's steps
# Refusals of a step that come from its gradients or from counting on, not from what was loaded.
_LEGAL = (
    "within an accumulation window",
    "before in the same accumulation window",
    "the lazy modes count at most",
    "accumulation windows count at most",
)


def _choices(text: str) -> list[str]:
    return [c.strip() for line in text.strip().split("\n") for c in line.split(" | ") if c.strip()]


@dataclass
class Case:
    """A program whose state dict is changed, loaded and used."""

    program: Program
    fresh: bool  # load into a fresh optimizer, or into the one that was saved
    changes: list[str] = field(default_factory=list)
    uses: list[str] = field(default_factory=list)
    before: list[str] = field(default_factory=list)  # what was executed when it was made

    def lines(self) -> list[str]:
        return [*self.before, *self.changes, "opt.load_state_dict(saved)", *self.uses]


class Mutations:
    """Writes the lines that change a state dict."""

    def __init__(self, rng: random.Random, saved: dict[str, Any]) -> None:
        self.random = rng
        self.saved = saved

    def line(self) -> str:
        rng = self.random
        has_state = bool(self.saved["state"])
        makers: list[Callable[[], str]] = [self.option, self.missing_option, self.structure]
        if has_state:
            makers += [self.state] * 3 + [self.clock] * 3 + [self.missing_state]
        if any("history" in g for g in self.saved["param_groups"]):
            makers += [self.history, self.history]
        return rng.choice(makers)()

    def _group(self) -> int:
        return self.random.randrange(len(self.saved["param_groups"]))

    def option(self) -> str:
        key = self.random.choice(list(_OPTIONS))
        value = self.random.choice(_choices(_OPTIONS[key]))
        return f'saved["param_groups"][{self._group()}][{key!r}] = {value}'

    def history(self) -> str:
        value = self.random.choice(_choices(_OPTIONS["history"]))
        return f'saved["param_groups"][{self._group()}]["history"] = {value}'

    def missing_option(self) -> str:
        i = self._group()
        key = self.random.choice(list(self.saved["param_groups"][i]))
        return f'saved["param_groups"][{i}].pop({key!r})'

    def structure(self) -> str:
        return self.random.choice(_choices(_GROUPS))

    def _entry(self) -> tuple[int, str]:
        i = self.random.choice(list(self.saved["state"]))
        return i, self.random.choice(list(self.saved["state"][i]))

    def state(self) -> str:
        rng = self.random
        if rng.random() < 0.07:
            i, _ = self._entry()
            return f'saved["state"][{i}] = {rng.choice(_choices(_STATES))}'
        i, name = self._entry()
        old, target = self.saved["state"][i][name], f'saved["state"][{i}][{name!r}]'
        if name == "step":
            return f"{target} = {rng.choice(_choices(_STEPS))}"
        if not isinstance(old, torch.Tensor):
            return f"{target} = {rng.choice(_choices(_STANDING))}"
        if rng.random() < 0.4:
            values = _FLOATS if old.is_floating_point() else _INTEGERS
            value = rng.choice(_choices(values))
            if rng.random() < 0.5 and old.dim():
                return f"{target}[0] = {value}"
            return f"{target} = torch.full_like({target}, {value})"
        return f"{target} = " + rng.choice(_choices(_TENSORS)).replace("X", target)

    def clock(self) -> str:
        """Set a clock or window, most often where there are some."""
        rng = self.random
        rows, standing = ["window", "window_rows"], ["begins_at", "frozen_at"]
        name = rng.choice(["last_step", "last_step", "last_step", *rows, *standing])
        having = [i for i, state in self.saved["state"].items() if name in state]
        i = rng.choice(having) if having else rng.choice(list(self.saved["state"]))
        values = {"window_rows": _ROWS, "begins_at": _STANDING, "frozen_at": _STANDING}
        value = rng.choice(_choices(values.get(name, _CLOCKS)))
        value = value.replace("p.", f"ps[{i}].")
        return f'saved["state"][{i}][{name!r}] = {value}'

    def missing_state(self) -> str:
        i, name = self._entry()
        if self.random.random() < 0.2:
            return f'del saved["state"][{i}]'
        return f'del saved["state"][{i}][{name!r}]'


def case_of(seed: int, counts: Counter[str]) -> Case | None:
    """Return the case of a seed; None: its program fails by itself."""
    kinds = {k: n for k, n in KINDS.items() if k not in ("health", "toggle")}
    kinds["freeze"] *= 2
    generator = Generator(seed, kinds)
    rng = generator.random
    program = generator.program()
    program.fused = rng.choice([None, None, False])
    for group in program.groups:  # windows beside clocks have most to go wrong
        simple = group.options.get("nonfinite") != "skip" and "scale" not in group.options
        if "accumulation_steps" in group.options or (simple and _is_tiger(group, program)):
            group.options["accumulation_steps"] = rng.choice([1, 2, 2])
    del program.ops[rng.randrange(3, 12) :]
    case = Case(program, rng.random() < 0.5)
    try:
        execution = _prepared(case)
    except Exception:
        counts["without meaning"] += 1
        return None
    case.before = execution.lines
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        line = Mutations(rng, execution.names["saved"]).line()
        case.changes.append(line)
    for _ in range(4):
        case.uses += _step_lines(rng, execution, generator)
        if rng.random() < 0.2:
            name = rng.choice(execution.all_names())
            case.uses.append(f"{name}.requires_grad_({rng.random() < 0.7})")
        case.uses.append(
            rng.choice(["opt.flush(progress=False)", "str(tiger_ext.health_report(opt))"])
        )
        case.uses += [_read_line(rng, n) for n in execution.tracked if _readable(execution, n)]
    case.uses += ["opt.flush(progress=False)", "opt.load_state_dict(opt.state_dict())"]
    return case


def _is_tiger(group: GroupSpec, program: Program) -> bool:
    return group.options.get("algorithm", program.cls.lower()) == "tiger"


def _readable(execution: Execution, name: str) -> bool:
    return execution.names[name].numel() > 0


def _read_line(rng: random.Random, name: str) -> str:
    return f"read_{name}(torch.tensor([0, {rng.randrange(3)} % len({name})]))"


def _step_lines(rng: random.Random, execution: Execution, generator: Generator) -> list[str]:
    lines = []
    for p, options in generator.params:
        if p.name not in execution.names:
            continue
        kind = rng.choice(["None", "dense", "sparse"]) if p.shape else "dense"
        grad = None if kind == "None" else generator.grad(kind, p, options)
        if grad is not None:
            grad.options.pop("bad", None)
        lines.append(f"give({p.name}, {'None' if grad is None else grad.text(p.name)})")
    return [*lines, "opt.step()"]


def _prepared(case: Case) -> Execution:
    """Run a case's program, save, and construct what to load into."""
    execution = Run(case.program)
    execution.run()
    execution.do(f"ps = [{', '.join(execution.all_names())}]")
    execution.do("saved = copy.deepcopy(opt.state_dict())")
    if case.fresh:
        execution.do(execution._constructor())
        execution._track_all()
    return execution


def run_case(case: Case, counts: Counter[str]) -> tuple[Failure | None, list[str]]:
    """Run a case; return how it failed, and its lines."""
    try:
        execution = _prepared(case)
        for line in case.changes:
            execution.do(line)
    except Exception:
        counts["without meaning"] += 1
        return None, []
    try:
        _load_and_use(case, execution, counts)
    except Failure as failure:
        return failure, execution.lines
    return None, execution.lines


def _load_and_use(case: Case, execution: Execution, counts: Counter[str]) -> None:
    before = snapshot(execution.optimizer)
    saved = execution.names["saved"]
    finite = _finite(saved) and _finite_parameters(execution)
    counts["checkpoints"] += 1
    counts["faults"] += 1
    loaded = True
    try:
        execution.do("opt.load_state_dict(saved)")
    except Exception as error:
        loaded = False
        execution.lines[-1] = caught("opt.load_state_dict(saved)", type(error))
        if not isinstance(error, ValueError) or len(str(error).split()) < 3:
            raise _failure("load", error) from error
        execution.unchanged(before, "a refused load")
        counts["refused"] += 1
    when = "loaded" if loaded else "refused"
    first = None
    if loaded and _illegal(case, execution):
        first = Failure("loaded what is illegal", f"loaded: {case.changes[0]}")
    for line in case.uses:  # all of them, as a later one may do more harm than an exception
        try:
            execution.do(line)
        except Exception as error:
            execution.lines[-1] = caught(line, type(error))
            if not any(text in str(error) for text in _LEGAL):
                first = first or _failure(f"{when}, then {line[:9]}", error)
        counts["steps"] += line == "opt.step()"
    counts["loaded"] += loaded
    if first is not None:
        raise first
    if loaded and finite and not _finite_parameters(execution):
        raise Failure("loaded, then NaN or Inf", "a parameter is not finite")


def _illegal(case: Case, execution: Execution) -> bool:
    """Return whether the only change of a case is one that must be refused."""
    target, sets, value = case.changes[0].partition(" = ") if len(case.changes) == 1 else [""] * 3
    if not sets:
        return False
    group = re.fullmatch(r'saved\["param_groups"\]\[(\d+)\]\[[\'"](\w+)[\'"]\]', target)
    if group is None:
        if target.endswith(("['begins_at']", "['frozen_at']")):
            return value not in _choices(_PERHAPS_LEGAL_STANDING)
        clocks = tuple(f", {clock})" for clock in _ILLEGAL_CLOCKS)
        clock = target.endswith("['last_step']") and value.endswith(clocks)
        return clock and eval(target, execution.names).numel() > 0
    i, key = int(group[1]), group[2]
    added = (op.options["spec"] for op in case.program.ops if op.kind == "add")
    groups = [*case.program.groups, *added]
    options = [*complete(groups[i], case.program.cls), *_COUNTERS] if i < len(groups) else []
    return key in options and key in _LEGAL_VALUES and value not in _choices(_LEGAL_VALUES[key])


def _failure(when: str, error: Exception) -> Failure:
    kind = type(error).__name__
    return Failure(f"{when} raised {kind}", f"{when}: {kind}: {error}")


def shrink_case(case: Case, kind: str, seconds: float) -> Case:
    """Return a smaller case that fails in the same way."""

    def fails(smaller: Case) -> bool:
        failure, _ = run_case(smaller, Counter())
        return failure is not None and failure.kind == kind

    end = time.monotonic() + seconds
    for name in ("changes", "uses"):
        lines = shrink_list(
            getattr(case, name), lambda rest, c=case, n=name: fails(replace(c, **{n: rest})), end
        )
        case = replace(case, **{name: lines})
    program = shrink(
        case.program, lambda p: fails(replace(case, program=p)), end - time.monotonic()
    )
    return replace(case, program=program)


def _finite_parameters(execution: Execution) -> bool:
    return all(
        bool(execution.names[n].isfinite().all()) for g in execution.groups for n in g.params
    )


def _finite(saved: Any) -> bool:
    """Return whether all moments of a state dict are finite, and no second moment is negative."""
    if not isinstance(saved, dict) or not isinstance(saved.get("state"), dict):
        return True
    for state in saved["state"].values():
        for value in state.values() if isinstance(state, dict) else ():
            if isinstance(value, Tensor) and value.is_floating_point() and not value.is_meta:
                plain = value.to_dense() if value.layout != torch.strided else value
                if not bool(plain.isfinite().all()):
                    return False
            elif isinstance(value, float) and value != value:
                return False
    return True
