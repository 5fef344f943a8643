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

from fuzz import draws, model
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
        self.has_base = False  # for the next delta
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
            if "rounding_seed" in key and key not in before:
                continue  # the first look at a group whose options were changed
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
        self.has_base = False
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
        for group, clock_of in zip(self.groups, clocks_of(self.optimizer), strict=True):
            for name, p in group.params.items():
                state = self.optimizer.state.get(self.names[name], {})
                self.observe(name)
                current = self._current(group, clock_of.history, state, p)
                if not self.training[name]:  # how its clock stands still is the product's affair
                    current = p.touched.clone()
                if name in must:
                    current = current | must[name]
                caught_up = p.behind & current & ~p.moved if after in ("flush", "a read") else None
                step = group.counts and int(state.get("step", 0))
                if after == "a step" and p.drawn is not None and step:
                    self._drawn(name, group, p, step)
                elif group.at_random(p) and caught_up is not None and not p.was_frozen:
                    clock = state.get("last_step")
                    if clock is not None and clock_of.history is not None:
                        dims = clock.dim() if clock.dim() else None
                        key = (
                            self._seed(group),
                            clock_of.history.steps,
                            self.all_names().index(name),
                        )
                        self._rounded(name, p, key, draws.CATCH_UP, dims, caught_up)
                self._compare(f"after {after}", "parameter", name, p.value, p.dtype, current)
                for moment in group.moments():
                    if moment in state:
                        e, dtype = getattr(p, moment), group.storage(p, moment)
                        self._compare(f"after {after}", moment, name, e, dtype, current)
                if group.accumulation > 1 or not group.counts:
                    p.steps = int(state.get("step", 0))
                elif p.changed_by_hand and "step" in state:
                    p.steps = int(state["step"])
                if "step" in state and int(state["step"]) != p.steps:
                    raise Failure(
                        f"after {after}: step", f"{name}: step is {state['step']}, not {p.steps}"
                    )
                p.behind &= ~current

    def observe(self, name: str) -> None:
        """Let the model know how the state stores a parameter's moments."""
        p, group = self.names[name], self._group_of(name)
        assert group is not None
        state = self.optimizer.state.get(p, {})
        m, scale, v = (state.get(k) for k in ("exp_avg", "exp_avg_scale", "exp_avg_sq"))
        quantised = m is not None and m.dtype == torch.int8
        form = (
            None if m is None else m.dtype,
            tuple(scale.shape) if quantised and scale is not None else None,
            None if v is None else tuple(v.shape),
            None if v is None else v.dtype,
        )
        model.stored_anew(group, group.params[name], form, p)

    def _read(self, when: str, what: str, name: str, dtype: Any) -> tuple[Tensor, Any]:
        """Return numbers of the state by elements, and what their storing may add to the error."""
        p, group = self.names[name], self._group_of(name)
        assert group is not None
        m = group.params[name]
        tensor = p.detach() if what == "parameter" else self.optimizer.state[p][what]
        by_rows = what == "exp_avg_sq" and group.row_wise(m)
        shapes = [p.shape[:d] for d in range(1, p.dim() + 1)] if by_rows else [p.shape]
        if what != "parameter" and m.changed_by_hand:  # as before, until it is needed
            shapes = [p.shape[:d] for d in range(p.dim() + 1)]
        if tensor.shape not in shapes or tensor.dtype != dtype:
            raise Failure(
                f"{when}: {what} has a shape or dtype",
                f"{name}: {what} is {tensor.dtype} {list(tensor.shape)}, expected {dtype} "
                f"{list(shapes[0])}",
            )
        got: Tensor = tensor.to(torch.float64)
        if what == "parameter":
            if not group.at_random(m):
                return got, 0.0
            size = m.value.value.abs() + m.value.error
            return got, model.rounded(p.dtype, size, 1.01) * (m.moved | m.behind)
        if tensor.dtype == torch.int8:
            scale = self.scales(when, name)
            wrote = m.touched if when == "after a step" else torch.zeros_like(m.touched)
            return got * scale, scale.nan_to_num() * 1.001 * wrote
        got = got.reshape([*got.shape, *[1] * (p.dim() - got.dim())]).expand(p.shape).clone()
        return got, 0.0

    def scales(self, when: str, name: str) -> Tensor:
        """Return the scale of each element of an int8 momentum."""
        p, group = self.names[name], self._group_of(name)
        assert group is not None
        m, scale = group.params[name], self.optimizer.state[p]["exp_avg_scale"]
        shapes = [p.shape[:d] for d in range(1, p.dim() + 1)]
        options = group.options
        # A gradient of a step that was refused, or before its state was cleared.
        waiting = p.grad is not None and p.grad.layout == torch.sparse_coo and not m.sparse_once
        lazy = options["rows"] is not None or group.lazy != "frozen" or group.row_wise(m)
        anything = m.changed_by_hand or waiting
        if not m.sparse_once and not anything and not (lazy and p.dim() >= 2):
            if options.get("scale") != "rms_rows" or p.dim() == 0:
                shapes = [torch.Size(model.block_scales(p.shape))]
        elif anything:
            shapes.append(torch.Size(model.block_scales(p.shape)))
        if scale.shape not in shapes or scale.dtype != torch.float32:
            raise Failure(
                f"{when}: scales have a shape or dtype",
                f"{name}: exp_avg_scale is {scale.dtype} {list(scale.shape)}, expected float32 "
                f"{' or '.join(str(list(shape)) for shape in shapes)}",
            )
        if m.row_dims:
            scale = scale.reshape([*scale.shape, *[1] * (p.dim() - scale.dim())])
            return scale.double().expand(p.shape)
        return scale.flatten().double()[draws.places(p, 0)[0]]

    # ------------------------------------------------------------------------- random bits

    def _seed(self, group: model.Group) -> int:
        return int(group.options.get("rounding_seed", torch.initial_seed() & (2**63 - 1)))

    def _drawn(self, name: str, group: model.Group, p: model.Parameter, step: int) -> None:
        """Check what the last step's update rounded at random, with the bits that it drew."""
        assert p.drawn is not None
        key = (self._seed(group), step, self.all_names().index(name))
        dims = p.written_by_rows
        if group.at_random(p):
            self._rounded(name, p, key, draws.PARAMETER, dims, p.drawn)
        if group.quantises and "exp_avg" in group.moments() and bool(p.drawn.any()):
            self._quantised(name, p, key, dims)

    def _rounded(
        self,
        name: str,
        p: model.Parameter,
        key: tuple[int, int, int],
        stream: int,
        dims: int | None,
        where: Tensor,
    ) -> None:
        e, got = p.value, self.names[name].detach().double()
        where = where & e.value.isfinite() & e.error.isfinite()
        bits = draws.random_bits(key, stream, *draws.places(self.names[name], dims), where)
        error = e.error + 2.0**-23 * e.value.abs() + 2.0**-126
        least, most = (draws.rounded(p.dtype, e.value + d, bits) for d in (-error, error))
        wrong = where & ~((least <= got) & (got <= most))
        self.counts["drawn"] += int((where & (least == most)).sum())
        self._none_wrong("other random bits", name, wrong, got, least, most)

    def _quantised(
        self, name: str, p: model.Parameter, key: tuple[int, int, int], dims: int
    ) -> None:
        parameter, m = self.names[name], p.exp_avg
        scale, q = self.scales("now", name), self.optimizer.state[parameter]["exp_avg"].double()
        where = p.drawn & model.per_scale(p, (m.value + m.error).abs()).isfinite()
        size = m.value.abs()
        most = model.per_scale(p, size + m.error) / 127 * (1 + 1e-5) + 2.0**-125
        least = model.per_scale(p, (size - m.error).clamp(min=0)) / 127 * (1 - 1e-5)
        self._none_wrong(
            "a scale is wrong", name, where & ~((least <= scale) & (scale <= most)), scale, least,
            most,
        )  # fmt: skip
        where = where & (scale > 0)
        bits = draws.random_bits(key, draws.MOMENTUM, *draws.places(parameter, dims), where)
        draw = (bits.double() + 0.5) / 65536
        each = torch.where(scale > 0, scale, 1.0)
        least, most = (
            ((m.value + d * m.error) / each + draw + d * 5e-5).floor().clamp(-127, 127)
            for d in (-1, 1)
        )
        self.counts["drawn"] += int((where & (least == most)).sum())
        self._none_wrong(
            "a momentum has other random bits", name, where & ~((least <= q) & (q <= most)), q,
            least, most,
        )  # fmt: skip

    def _none_wrong(
        self, kind: str, name: str, wrong: Tensor, got: Tensor, least: Tensor, most: Tensor
    ) -> None:
        if bool(wrong.any()):
            at = tuple(wrong.nonzero()[0].tolist())
            raise Failure(
                kind,
                f"{kind}: {name}{list(at)} is {float(got[at])!r}, expected from "
                f"{float(least[at])!r} to {float(most[at])!r} ({int(wrong.sum())} of "
                f"{wrong.numel()} elements are wrong)",
            )

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
        got, slack = self._read(when, what, name, dtype)
        allowed = e.error + model.rounded(dtype, e.value.abs() + e.error) + slack
        unknown = e.error == float("inf")
        same = (got == e.value) | (got.isnan() & e.value.isnan()) | unknown
        near = e.value.isfinite() & got.isfinite() & ((got - e.value).abs() <= allowed)
        beyond = got.sign() * e.value + allowed >= largest(dtype)
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


def largest(dtype: torch.dtype) -> float:
    return torch.finfo(torch.float32 if dtype == torch.int8 else dtype).max


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
