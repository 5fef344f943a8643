# SPDX-License-Identifier: Apache-2.0
"""Runs a program line by line, on the optimizer and on the model, and compares them.

The lines that are executed are the lines that are printed.
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
from fuzz.program import GroupSpec, Op, Param, Program, complete, value_of

PRELUDE = Path(__file__).with_name("prelude.py")
_NAMESPACE: dict[str, Any] = {}
exec(compile(PRELUDE.read_text(), str(PRELUDE), "exec"), _NAMESPACE)
_BETWEEN_LAYOUTS = "within an accumulation window"


class Failure(Exception):
    """The product did something else than the model.

    Attributes:
        kind: which, without numbers and names; shrinking keeps it.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def plain_bits(t: Tensor) -> Any:
    t = t.detach()
    if t.layout != torch.strided or t.is_meta:
        return repr(t)
    flat = t.clone(memory_format=torch.contiguous_format).reshape(-1)
    raw = flat.view(torch.uint8).numpy().tobytes()
    return (str(t.dtype), tuple(t.shape), raw)


def snapshot(optimizer: Any) -> dict[str, Any]:
    """Return all that a failed step or a copy must leave as it is, bit by bit."""
    found: dict[str, Any] = {}
    for i, group in enumerate(optimizer.param_groups):
        for key, value in group.items():
            if key == "history":
                text = value if isinstance(value, str) else value.text()
                found[f"group {i} {key}"] = text
            elif key in ("micro_steps", "windows"):
                found[f"group {i} {key}"] = value
            elif key not in ("params", "param_names"):
                found[f"group {i} {key}"] = repr(value)
        for j, p in enumerate(group["params"]):
            found[f"parameter {i}.{j}"] = plain_bits(p)
            for name, value in optimizer.state.get(p, {}).items():
                bits = plain_bits(value) if isinstance(value, Tensor) else repr(value)
                found[f"parameter {i}.{j} {name}"] = bits
    # What a first look at a group, and loading, may create.
    nothing = ("0.0 0.0", 0, ("torch.int64", (0, 0), b""))
    return {k: v for k, v in found.items() if v not in nothing}


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
        self._track()

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
            raise Failure("changed by something to what cannot be read", f"{by}: {error}") from error
        for key in sorted({*before, *after}, key=str):
            if before.get(key) != after.get(key):
                kind = re.sub(r"\d+", "#", key)
                raise Failure(
                    f"changed by {re.sub(r'[^a-z_ ]+', ' ', by)[:24]}: {kind}",
                    f"{by} changed {key}: {_short(before.get(key))} -> {_short(after.get(key))}",
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

    def _constructor(self) -> str:
        groups = ", ".join(spec.text() for spec in self.specs)
        return f"opt = build({self.program.cls!r}, [{groups}], fused={self.program.fused})"

    def _track(self) -> None:
        self.used = {}
        self.tracked = [n for g in self.groups for n in g.params if self._has_rows(n)]
        for name in self.tracked:
            self.do(f"read_{name} = track(opt, {name})")

    def _has_rows(self, name: str) -> bool:
        return self.names[name].dim() >= 1

    def _group_of(self, name: str) -> model.Group | None:
        return next((g for g in self.groups if name in g.params), None)

    def _all_names(self) -> str:
        return ", ".join(n for g in self.groups for n in g.params)

    # ------------------------------------------------------------------------------ a step

    def op_step(self, op: Op) -> None:
        for name in (n for g in self.groups for n in g.params):
            grad = op.grads.get(name)
            self.do(f"give({name}, {'None' if grad is None else grad.text(name)})")
        if op.options.get("clip"):
            self._clip(op.options["clip"])
        fault = op.options.get("fault")
        if fault and self._fault(fault, op):
            self.counts["faults"] += 1
        amp = op.options.get("amp")
        if amp is not None:
            scale, bad = amp
            for name in (n for g in self.groups for n in g.params):
                if name in op.grads:
                    self.do(f"give({name}, {name}.grad * {scale})")
            self.do(f"opt.grad_scale, opt.found_inf = torch.tensor({scale}), torch.tensor({bad})")
        self._step(cancelled=amp is not None and amp[1] != 0)
        if amp is not None:
            self.do("opt.grad_scale = opt.found_inf = None")

    def _step(self, cancelled: bool) -> None:
        grads = {n: self.names[n].grad for g in self.groups for n in g.params}
        clash = self._layouts_clash(grads)
        self._raises(grads, expected=not cancelled and not clash)
        before = snapshot(self.optimizer)
        old = {n: self.names[n].detach().clone() for n in grads}
        copies = {n: plain_grad(g) for n, g in grads.items()}
        try:
            self.do("opt.step()")
        except RuntimeError as error:
            if not clash or _BETWEEN_LAYOUTS not in str(error):
                raise
            self.lines[-1] = caught("opt.step()", RuntimeError)
            self.unchanged(before, "a refused step")
            self.counts["refused"] += 1
            return
        self.counts["steps"] += 1
        for name, g in grads.items():
            if plain_grad(g) != copies[name] or self.names[name].grad is not g:
                raise Failure("a gradient was changed", f"the step changed {name}.grad")
        if cancelled:
            self.used = {}
            self.unchanged(before, "a cancelled step")
            return
        scale = getattr(self.optimizer, "grad_scale", None)
        if scale is not None:
            grads = {n: None if g is None else g / float(scale) for n, g in grads.items()}
        after = snapshot(self.optimizer)
        for i, group in enumerate(self.groups):
            masks = {n: self._mask(n) for n in group.params if n in self.tracked}
            for j, p in enumerate(group.params.values()):
                p.divided_anew = _clock_shape(before, i, j) != _clock_shape(after, i, j)
            group.step(grads, self.training, masks)
        self.used = {}
        self._untouched(old)
        self.compare("a step", {n: p.touched for g in self.groups for n, p in g.params.items()})

    def _raises(self, grads: dict[str, Any], expected: bool) -> None:
        """Take the step that nonfinite="raise" must refuse, and mend its gradients."""
        bad = [
            n
            for g in self.groups
            if g.options["nonfinite"] == "raise"
            for n in g.params
            if grads[n] is not None and not bool(_elements(grads[n]).isfinite().all())
        ]
        if bad and expected and not any(self._only_unused(n, grads[n]) for n in bad):
            self.refused("opt.step()", FloatingPointError)
            self.counts["faults"] += 1
        for name in bad:
            self.do(f"give({name}, None)")
            grads[name] = None

    def _only_unused(self, name: str, g: Tensor) -> bool:
        """Return whether what is not finite may stand in rows that do not count."""
        group = self._group_of(name)
        assert group is not None
        return group.options["rows"] == "tracked" and g.layout == torch.strided

    def _layouts_clash(self, grads: dict[str, Any]) -> bool:
        """Return whether a gradient may not fit an open window, which may then be refused."""
        for name, g in grads.items():
            window = self.optimizer.state.get(self.names[name], {}).get("window")
            if g is not None and g.layout == torch.sparse_coo and window is not None:
                group = self._group_of(name)
                assert group is not None
                if group.micro_steps and window.dim() not in (0, g.sparse_dim()):
                    return True
        return False

    def _mask(self, name: str) -> Tensor:
        mask = torch.zeros(len(self.names[name]), dtype=torch.bool)
        mask[list(self.used.get(name, ()))] = True
        return mask

    def _untouched(self, old: dict[str, Tensor]) -> None:
        """Check that what no gradient touched was not written."""
        for group in self.groups:
            for name, p in group.params.items():
                if group.lazy != "frozen" and p.divided_anew:
                    continue  # all rows have caught up
                new = self.names[name].detach()
                wrong = ~p.moved & (new != old[name]) & ~(new.isnan() & old[name].isnan())
                if bool(wrong.any()):
                    raise Failure(
                        "an untouched element was written",
                        f"the step wrote {name}{wrong.nonzero()[0].tolist()}, which it had to "
                        "leave alone",
                    )

    def _clip(self, norm: float) -> None:
        names = [n for g in self.groups for n in g.params]
        if any(
            self.names[n].grad is not None and not bool(_elements(self.names[n].grad).isfinite().all())
            for n in names
        ):
            return
        grads = {n: self.names[n].grad for n in names if self.names[n].grad is not None}
        wanted = {n: _summed(g) for n, g in grads.items()}
        self.do(f"norm = tiger_ext.clip_grad_norm_([{self._all_names()}], {norm})")
        total = float(sum((w.square().sum() for w in wanted.values()), torch.zeros(()))) ** 0.5
        if abs(float(self.names["norm"]) - total) > 4e-3 * total + 1e-6:
            raise Failure("clip: norm", f"norm is {float(self.names['norm'])}, expected {total}")
        for n, w in wanted.items():
            got, expected = _summed(self.names[n].grad), w * min(1.0, norm / (total + 1e-6))
            if bool(((got - expected).abs() > 0.02 * w.abs() + 0.02 * norm).any()):
                raise Failure("clip: gradient", f"{n}.grad is {got}, expected {expected}")

    def _fault(self, kind: str, op: Op) -> bool:
        """Take a step that must fail; return whether there was one to take."""
        kind, _, at = kind.partition(" ")
        grad = op.grads.get(at)
        group = self._group_of(at)
        if group is None:
            return False
        p = self.names[at]
        if kind == "index" and grad is not None and grad.kind == "sparse" and p.grad._nnz():
            index = -1 if grad.options["seed"] % 2 else len(p)
            self.do(f"give({at}, {grad.text(at, index=index)})")
            self.refused("opt.step()", IndexError)
        elif kind == "shape" and p.grad is not None and p.grad.layout == torch.strided:
            self.do(f"{at}.grad.resize_({p.numel() + 1})")
            self.refused("opt.step()", RuntimeError)
        elif kind == "dtype":
            self.do(f"give({at}, torch.ones({at}.shape, dtype=torch.int64))")
            self.refused("opt.step()", RuntimeError)
        elif kind == "lazy" and group.lazy != "frozen":
            i = self.groups.index(group)
            self._illegal(i, "weight_decay", 2.0 / group.lr)
            if group.options["algorithm"] != "adamw":
                self._illegal(i, "scale", "rms")
            if group.lazy == "exact":
                self._illegal(i, "direction", "clip")
        elif kind == "read" and at in self.tracked and p.numel():
            self.refused(f"read_{at}(torch.tensor([0, {len(p)}]))", IndexError, keeps=False)
        else:
            return False
        self.do(f"give({at}, {'None' if grad is None else grad.text(at)})")
        return True

    def _illegal(self, i: int, key: str, value: Any) -> None:
        right = self.optimizer.param_groups[i][key]
        self.do(f"opt.param_groups[{i}][{key!r}] = {value!r}")
        self.refused("opt.step()", ValueError)
        self.do(f"opt.param_groups[{i}][{key!r}] = {right!r}")

    # -------------------------------------------------------------------- other operations

    def op_read(self, op: Op) -> None:
        name, training = op.options["name"], op.options["training"]
        if name not in self.tracked or (group := self._group_of(name)) is None:
            return
        rows = len(self.names[name])
        if rows == 0:
            return
        ids = sorted({i % rows for i in op.options["ids"]})
        before = snapshot(self.optimizer)
        self.do(f"with torch.set_grad_enabled({training}): values = read_{name}(torch.tensor({ids}))")
        if not self.training[name]:
            self._same_parameters(before, "a read of a frozen parameter")
        if training:
            self.used.setdefault(name, set()).update(ids)
        must = torch.zeros(self.names[name].shape, dtype=torch.bool)
        must[ids] = group.lazy != "frozen" and self.training[name]
        self.compare("a read", {name: must})

    def _same_parameters(self, before: dict[str, Any], by: str, only: str | None = None) -> None:
        after = snapshot(self.optimizer)
        for i, group in enumerate(self.groups):
            for j, name in enumerate(group.params):
                key = f"parameter {i}.{j}"
                if not self.training[name] and before[key] != after[key]:
                    raise Failure(f"{by} changed it", f"{by} changed {name}")

    def op_flush(self, op: Op) -> None:
        before = snapshot(self.optimizer)
        self.do("opt.flush(progress=False)")
        self._same_parameters(before, "a flush with a frozen parameter")
        must = {}
        for group in self.groups:
            for name, p in group.params.items():
                must[name] = torch.full_like(p.moved, self.training[name])
        self.compare("flush", must)

    def op_freeze(self, op: Op) -> None:
        name, frozen = op.options["name"], op.options["frozen"]
        group = self._group_of(name)
        if group is not None and group.micro_steps == 0 and self.training[name] == frozen:
            self.do(f"{name}.requires_grad_({not frozen})")
            self.training[name] = not frozen

    def op_set(self, op: Op) -> None:
        i, key, value = op.options["group"], op.options["key"], op.options["value"]
        if i >= len(self.groups) or key not in self.groups[i].options:
            return
        group = self.groups[i]
        if key == "betas":
            if group.options["betas"][0] == 0:
                return  # what is stored would change
            value = tuple(value[: len(group.options["betas"])])
        target = f"opt.param_groups[{i}][{key!r}]"
        if key == "lr" and isinstance(self.optimizer.param_groups[i]["lr"], Tensor):
            self.do(f"{target}.fill_({value!r})")
            value = float(torch.tensor(value))
        else:
            self.do(f"{target} = {value!r}")
        group.options[key] = value_of(value)

    def op_schedule(self, op: Op) -> None:
        self.do("torch.optim.lr_scheduler.ExponentialLR(opt, 0.5).step()")
        for group, real in zip(self.groups, self.optimizer.param_groups):
            lr = float(real["lr"])
            if abs(lr - 0.5 * group.lr) > 1e-6 * lr:
                raise Failure("scheduler", f"lr is {lr}, expected {0.5 * group.lr}")
            group.options["lr"] = lr

    def op_toggle(self, op: Op) -> None:
        """Change the lazy mode right after a flush."""
        i, lazy = op.options["group"], op.options["lazy"]
        if i >= len(self.groups) or any(g.micro_steps for g in self.groups):
            return
        options = self.groups[i].options
        if not legal_lazy(lazy, options) or lazy == options["lazy"]:
            return
        self.op_flush(op)
        if not all(self.training[n] for n in self.groups[i].params):
            return  # what a frozen parameter has missed could not be made up for
        self.do(f"opt.param_groups[{i}]['lazy'] = {lazy!r}")
        options["lazy"] = lazy

    def op_load(self, op: Op) -> None:
        before = snapshot(self.optimizer)
        saved = "opt.state_dict()"
        saved = f"through_file({saved})" if op.options["file"] else saved
        self.do(f"saved = {saved}")
        self.do(self._constructor())
        self.do("opt.load_state_dict(saved)")
        self.unchanged(before, "saving and loading")
        self._track()

    def op_copy(self, op: Op) -> None:
        before = snapshot(self.optimizer)
        how = "through_pickle" if op.options["pickle"] else "through_copy"
        everything = f"{self._all_names()}, opt"
        self.do(f"{everything} = {how}({everything})")
        self.unchanged(before, how)
        self._track()

    def op_add(self, op: Op) -> None:
        spec: GroupSpec = op.options["spec"]
        if not spec.params:
            return
        self._add_model(spec)
        self.specs = [*self.specs, spec]
        self.do(f"opt.add_param_group({spec.text()} | dict(fused={self.program.fused}))")
        self._track()

    def op_health(self, op: Op) -> None:
        before = snapshot(self.optimizer)
        self.do("report = str(tiger_ext.health_report(opt))")
        self.unchanged(before, "health_report")

    def op_close(self, op: Op) -> None:
        if not hasattr(self.optimizer, "close_window"):
            return
        self.do("opt.close_window()")
        for group in self.groups:
            group.close_window()
        self.compare("close_window", {})

    # --------------------------------------------------------------------------- comparing

    def compare(self, after: str, must: dict[str, Tensor]) -> None:
        """Compare what is current, and must be; then go on from the product's values."""
        for group, real in zip(self.groups, self.optimizer.param_groups):
            for name, p in group.params.items():
                state = self.optimizer.state.get(self.names[name], {})
                current = self._current(group, real, state, p)
                if not self.training[name]:  # how its clock stands still is the product's affair
                    current = p.touched.clone()
                if name in must:
                    current = current | must[name]
                self._compare(f"after {after}", "parameter", name, p.value, p.dtype, current)
                for moment in group.moments():
                    if moment in state:
                        e, dtype = getattr(p, moment), group.storage(p, moment)
                        self._compare(f"after {after}", moment, name, e, dtype, current)
                if "step" in state:
                    if not p.steps_known:
                        p.steps, p.steps_known = int(state["step"]), True
                    elif int(state["step"]) != p.steps:
                        raise Failure(
                            f"after {after}: step", f"{name}: step is {state['step']}, not {p.steps}"
                        )
                p.behind &= ~current

    def _current(self, group: model.Group, real: Any, state: Any, p: model.Parameter) -> Tensor:
        """Return the elements that the product says are current."""
        everything = torch.ones_like(p.moved)
        if group.lazy == "frozen" or group.steps == 0:
            return everything
        if "last_step" not in state or "history" not in real:
            return ~everything
        clock = state["last_step"].long()
        done = torch.where(clock < 0, -1 - clock, clock) >= real["history"].steps
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
        allowed = e.error + 2 * torch.finfo(dtype).eps * e.value.abs() + model.smallest(dtype)
        finite = e.value.isfinite() & got.isfinite()
        same = (got == e.value) | (got.isnan() & e.value.isnan()) | (e.error == float("inf"))
        adamw = what != "parameter" and ~got.isfinite() & ~e.value.isfinite()
        right = same | (finite & ((got - e.value).abs() <= allowed)) | adamw
        wrong = current & ~right
        if bool(wrong.any()):
            at = tuple(wrong.nonzero()[0].tolist())
            raise Failure(
                f"{when}: {what} is wrong",
                f"{when}: {what} {name}{list(at)} is {float(got[at])!r}, expected "
                f"{float(e.value[at])!r} +- {float(allowed[at]):.2g} "
                f"({int(wrong.sum())} of {wrong.numel()} elements are wrong)",
            )
        taken = current & got.isfinite() | current & (e.error == float("inf"))
        e.put(taken, model.Estimate(got, torch.zeros_like(got)))


def legal_lazy(lazy: str, options: dict[str, Any]) -> bool:
    if lazy == "frozen":
        return True
    legal = options.get("scale") is None and float(options["lr"]) * options["weight_decay"] < 1
    if lazy == "exact":
        legal &= options["algorithm"] != "adamw" and options["direction"] == "sign"
        legal &= all(beta > 0 for beta in options["betas"])
    return legal


def caught(line: str, *errors: type[Exception]) -> str:
    kinds = ", ".join(e.__name__ for e in errors)
    return f"try:\n    {line}\nexcept ({kinds}) as error:\n    print(error)"


def plain_grad(g: Tensor | None) -> Any:
    if g is None:
        return None
    if g.layout == torch.sparse_coo:
        return (plain_bits(g._indices()), plain_bits(g._values()))
    return plain_bits(g)


def _clock_shape(found: dict[str, Any], i: int, j: int) -> Any:
    clock = found.get(f"parameter {i}.{j} last_step")
    return None if clock is None else clock[1]


def _elements(g: Tensor) -> Tensor:
    return g._values() if g.layout == torch.sparse_coo else g


def _summed(g: Tensor) -> Tensor:
    g = g.detach().to(torch.float64, copy=True)
    return g.to_dense() if g.layout == torch.sparse_coo else g


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 200 else text[:200] + "..."


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


def failure_of(program: Program) -> tuple[Failure | None, Execution | None]:
    """Run a program; return how it failed, and what was executed."""
    execution = None
    try:
        execution = Execution(program)
        execution.run()
    except Failure as failure:
        return failure, execution
    except Exception as error:  # the constructor's
        return Failure(f"construction {type(error).__name__}", str(error)), execution
    return None, execution
