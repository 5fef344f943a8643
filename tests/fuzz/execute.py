# SPDX-License-Identifier: Apache-2.0
"""Runs a program line by line, on the optimizer and on the model, and compares them.

The lines that are executed are the lines that are printed. What each operation does stands in
step.py and operations.py.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fuzz import model
from fuzz.observe import Failure, clocks_of, short, snapshot
from fuzz.program import GroupSpec, Param, Program, complete

PRELUDE = Path(__file__).with_name("prelude.py")
_NAMESPACE: dict[str, Any] = {}
exec(compile(PRELUDE.read_text(), str(PRELUDE), "exec"), _NAMESPACE)


class Execution:
    """A program in progress; ``lines`` has what was executed so far."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.names: dict[str, Any] = dict(_NAMESPACE)
        self.lines: list[str] = []
        self.counts: Counter[str] = Counter()
        self.specs = [g for g in program.groups if g.params]
        self.groups: list[model.Group] = []
        self.training: dict[str, bool] = {}
        self.used: dict[str, set[int]] = {}
        self.tracked: list[str] = []
        for spec in self.specs:
            self._add_model(spec)
        self.do(self._constructor())
        self._track_all()

    # ---------------------------------------------------------------------------- executing

    def do(self, line: str) -> Any:
        """Execute a line and keep it."""
        self.lines.append(line)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exec(line, self.names)

    def refused(self, line: str, *errors: type[Exception], keeps: bool = True) -> Exception:
        """Execute a line that must raise one of ``errors`` and, if it ``keeps``, change nothing."""
        before = snapshot(self.optimizer)
        try:
            self.do(line)
        except errors as error:
            self.lines[-1] = caught(line, *errors)
            if keeps:
                self.unchanged(before, f"a refused {line}")
            self.counts["refused"] += 1
            return error
        raise Failure(f"no error: {line[:20]}", f"`{line}` was not refused")

    def unchanged(self, before: dict[str, Any], by: str) -> None:
        try:
            after = snapshot(self.optimizer)
        except Exception as error:
            raise Failure(
                "changed by something to what cannot be read", f"{by}: {error}"
            ) from error
        for key in sorted({*before, *after}, key=str):
            if before.get(key) != after.get(key):
                kind = re.sub(r"\d+", "#", key)
                raise Failure(
                    f"changed by {re.sub(r'[^a-z_ ]+', ' ', by)[:24]}: {kind}",
                    f"{by} changed {key}: {short(before.get(key))} -> {short(after.get(key))}",
                )

    def run(self) -> None:
        """Execute all operations; raises Failure."""
        try:
            for op in self.program.ops:
                getattr(self, f"op_{op.kind}")(op)
                self.counts[f"op {op.kind}"] += 1
        except Failure:
            raise
        except Exception as error:
            text = re.sub(r"[-\d.]+|'[^']*'", "#", f"{type(error).__name__}: {error}")
            raise Failure(
                f"unexpected {text[:70]}", f"unexpected {type(error).__name__}: {error}"
            ) from error

    @property
    def optimizer(self) -> Any:
        return self.names["opt"]

    # --------------------------------------------------------------------------- the pieces

    def _add_model(self, spec: GroupSpec) -> None:
        group = model.Group(complete(spec, self.program.cls))
        for p in spec.params:
            self.do(f"{p.name} = parameter({_arguments(p)})")
            group.params[p.name] = model.Parameter.of(self.names[p.name])
            self.training[p.name] = True
        self.groups.append(group)

    def _constructor(self, bare: bool = False) -> str:
        """Return the line that makes the optimizer; ``bare``: state dicts know the options."""
        groups = ", ".join(spec.text(self.program.fused, bare) for spec in self.specs)
        return f"opt = build({self.program.cls!r}, [{groups}])"

    def _track_all(self) -> None:
        """Track all tables, as a new optimizer or a copy needs."""
        self.used, self.tracked = {}, []
        for name in self.all_names():
            self._track(name)

    def _track(self, name: str) -> None:
        if self.names[name].dim() >= 1:
            self.tracked.append(name)
            self.do(f"read_{name} = track(opt, {name})")

    def _group_of(self, name: str) -> model.Group | None:
        return next((g for g in self.groups if name in g.params), None)

    def all_names(self) -> list[str]:
        return [n for g in self.groups for n in g.params]

    # --------------------------------------------------------------------------- comparing

    def compare(self, after: str, must: dict[str, Tensor]) -> None:
        """Compare what is current, and must be; then go on from the product's values."""
        for group, clock in zip(self.groups, clocks_of(self.optimizer), strict=True):
            for name, p in group.params.items():
                state = self.optimizer.state.get(self.names[name], {})
                current = self._current(group, clock.history, state, p)
                if not self.training[name]:  # how its clock stands still is the product's affair
                    current = p.touched.clone()
                if name in must:
                    current = current | must[name]
                self._compare(f"after {after}", "parameter", name, p.value, p.dtype, current)
                for moment in group.moments():
                    if moment in state:
                        e, dtype = getattr(p, moment), group.storage(p, moment)
                        self._compare(f"after {after}", moment, name, e, dtype, current)
                if "step" in state and int(state["step"]) != p.steps:
                    raise Failure(
                        f"after {after}: step", f"{name}: step is {state['step']}, not {p.steps}"
                    )
                p.behind &= ~current

    def _current(self, group: model.Group, history: Any, state: Any, p: model.Parameter) -> Tensor:
        """Return the elements that the product says are current."""
        everything = torch.ones_like(p.moved)
        if group.lazy == "frozen" or group.steps == 0:
            return everything
        if "last_step" not in state or history is None:
            return ~everything
        clock = state["last_step"].long()
        done = torch.where(clock < 0, -1 - clock, clock) >= history.steps
        return model.to_elements(done, everything.shape, done.dim())

    def _compare(
        self, when: str, what: str, name: str, e: model.Estimate, dtype: Any, current: Tensor
    ) -> None:
        p = self.names[name]
        tensor = p.detach() if what == "parameter" else self.optimizer.state[p][what]
        if tensor.shape != e.value.shape or tensor.dtype != dtype:
            raise Failure(
                f"{when}: {what} has a shape or dtype",
                f"{name}: {what} is {tensor.dtype} {list(tensor.shape)}, expected {dtype} "
                f"{list(e.value.shape)}",
            )
        got = tensor.to(torch.float64)
        allowed = e.error + model.rounded(dtype, e.value.abs() + e.error)
        unknown = e.error == float("inf")
        same = (got == e.value) | (got.isnan() & e.value.isnan()) | unknown
        near = e.value.isfinite() & got.isfinite() & ((got - e.value).abs() <= allowed)
        beyond = got.sign() * e.value + allowed >= torch.finfo(dtype).max
        overflows = got.isinf() & e.value.isfinite() & beyond
        right = same | near | overflows
        wrong = current & ~right
        if bool(wrong.any()):
            at = tuple(wrong.nonzero()[0].tolist())
            raise Failure(
                f"{when}: {what} is wrong",
                f"{when}: {what} {name}{list(at)} is {float(got[at])!r}, expected "
                f"{float(e.value[at])!r} +- {float(allowed[at]):.2g} "
                f"({int(wrong.sum())} of {wrong.numel()} elements are wrong)",
            )
        taken = current & (got.isfinite() | overflows | unknown)
        e.put(taken, model.Estimate(got, torch.zeros_like(got)))


def caught(line: str, *errors: type[Exception]) -> str:
    kinds = ", ".join(e.__name__ for e in errors)
    return f"try:\n    {line}\nexcept ({kinds}) as error:\n    print(error)"


def _arguments(p: Param) -> str:
    text = f"{p.seed}, {p.shape}"
    if p.dtype != "f32" or p.layout != "contiguous":
        text += f", {p.dtype!r}"
    return text if p.layout == "contiguous" else f"{text}, {p.layout!r}"


HEADER = 'import sys\n\nsys.path.insert(0, "tests")\nfrom fuzz.prelude import *\n\n'


def script(lines: list[str], message: str) -> str:
    """Return the text of a program, to be run in the project's folder."""
    comment = "\n# ".join(message.split("\n"))
    return HEADER + "\n".join(lines) + f"\n# {comment}\n"
