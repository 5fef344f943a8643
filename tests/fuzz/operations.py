# SPDX-License-Identifier: Apache-2.0
"""The other operations: reads, flushes, copies, and what changes a group."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from fuzz.model import Estimate, Parameter
from fuzz.observe import Failure, short, snapshot
from fuzz.program import GroupSpec, Op, Program, value_of
from fuzz.step import Steps


class Run(Steps):
    """An execution that knows all operations."""

    def op_read(self, op: Op) -> None:
        name, training = op.options["name"], op.options["training"]
        if name not in self.tracked or (group := self._group_of(name)) is None:
            return
        rows = len(self.names[name])
        if rows == 0:
            return
        ids = sorted({i % rows for i in op.options["ids"]})
        before = snapshot(self.optimizer)
        self.do(
            f"with torch.set_grad_enabled({training}): values = read_{name}(torch.tensor({ids}))"
        )
        if not self.training[name]:
            self._frozen_unchanged(before, "a read of a frozen parameter")
        if training:
            self.used.setdefault(name, set()).update(ids)
        must = torch.zeros(self.names[name].shape, dtype=torch.bool)
        must[ids] = group.lazy != "frozen" and self.training[name]
        self.compare("a read", {name: must})

    def _frozen_unchanged(self, before: dict[str, Any], by: str) -> None:
        """Check that no frozen parameter was changed."""
        after = snapshot(self.optimizer)
        for i, group in enumerate(self.groups):
            for j, name in enumerate(group.params):
                key = f"parameter {i}.{j}"
                if not self.training[name] and before[key] != after[key]:
                    raise Failure(f"{by} changed it", f"{by} changed {name}")

    def op_flush(self, op: Op) -> None:
        before = snapshot(self.optimizer)
        self.do("opt.flush(progress=False)")
        self._frozen_unchanged(before, "a flush with a frozen parameter")
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
            self.has_base = False  # whether it trains is in no delta
            group.params[name].was_frozen = True

    def op_set(self, op: Op) -> None:
        i, key, value = op.options["group"], op.options["key"], op.options["value"]
        if i >= len(self.groups) or key not in self.groups[i].options:
            return
        group = self.groups[i]
        if key == "rows" and group.accumulation > 1:
            return  # a window's gradients keep their rows
        if key == "betas":
            if group.options["betas"][0] == 0:
                return  # what is stored would change
            value = tuple(value[: len(group.options["betas"])])
        if key in ("momentum_dtype", "second_moment", "stochastic_rounding"):
            if group.accumulation > 1 or value_of(value) == group.options[key]:
                return
            if key == "momentum_dtype" and value_of(value) == torch.int8:
                return  # rounded by the rows of old clocks first: how often is not modelled
            for p in group.params.values():
                p.changed_by_hand = True
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
        self.do(self._constructor(bare=op.options["bare"]))
        for i, group in enumerate(self.groups):
            if group.lazy == "frozen":  # else a lazy group stays in its mode
                self.do(f"opt.param_groups[{i}]['lazy'] = 'frozen'")
        self.do("opt.load_state_dict(saved)")
        self.unchanged(before, "saving and loading")
        self._track_all()

    def op_copy(self, op: Op) -> None:
        before = snapshot(self.optimizer)
        how = "through_pickle" if op.options["pickle"] else "through_copy"
        everything = ", ".join([*self.all_names(), "opt"])
        self.do(f"{everything} = {how}({everything})")
        self.unchanged(before, how)
        self._track_all()

    def op_add(self, op: Op) -> None:
        spec: GroupSpec = op.options["spec"]
        if not spec.params:
            return
        self.has_base = False
        self._add_model(spec)
        self.specs = [*self.specs, spec]
        self.do(f"opt.add_param_group({spec.text(self.program.fused)})")
        for p in spec.params:
            self._track(p.name)

    def op_edit(self, op: Op) -> None:
        """Let others write a parameter while its rows are current."""
        name = op.options["name"]
        group = self._group_of(name)
        if group is None or not self.training[name]:
            return
        self.op_flush(op)
        self.do(f"with torch.no_grad(): {name}.mul_(0.5)")
        p = group.params[name]
        p.value = Estimate.exact(p.value.value * 0.5)
        self.compare("an edit", {})

    def op_clear(self, op: Op) -> None:
        """Drop the state of a parameter: what it has not caught up with is forgotten."""
        name = op.options["name"]
        group = self._group_of(name)
        if group is None or group.micro_steps or not self.training[name]:
            return
        if self.names[name] not in self.optimizer.state:
            return
        p = group.params[name]
        if group.lazy == "frozen":
            p.steps = 0
        elif p.steps not in (0, group.steps):  # AdamW counts the group's steps in a lazy mode
            return
        self.do(f"del opt.state[{name}]")
        group.params[name] = Parameter.of(self.names[name])

    def op_delta(self, op: Op) -> None:
        """Bring a copy of before up to date with a delta, and begin the next one."""
        before = snapshot(self.optimizer)
        everything = ", ".join([*self.all_names(), "opt"])
        if self.has_base:
            self.do("bring_over(opt, since, base[-1])")
            self.unchanged(before, "save_changes")
            base = snapshot(self.names["base"][-1])
            for key in sorted({*before, *base}):
                if "rounding_seed" in key and key not in before:
                    continue  # the first look at a group whose options were changed
                if before.get(key) != base.get(key):
                    raise Failure(
                        f"a delta lacks {re.sub(r'[0-9]+', '#', key)}",
                        f"{key} is {short(base.get(key))} with the delta applied, expected "
                        f"{short(before.get(key))}",
                    )
        self.do(f"base, since = through_copy({everything}), checkpoint.position(opt)")
        self.unchanged(before, "position")
        self.has_base = True

    def op_health(self, op: Op) -> None:
        before = snapshot(self.optimizer)
        self.do("report = str(tiger_ext.health_report(opt))")
        self.unchanged(before, "health_report")

    def op_close(self, op: Op) -> None:
        if not hasattr(self.optimizer, "close_window"):
            return
        self.do("opt.close_window()")
        for group in self.groups:
            group.close_window(self.training)
        self.compare("close_window", {})


def legal_lazy(lazy: str, options: dict[str, Any]) -> bool:
    if lazy == "frozen":
        return True
    legal = options.get("scale") is None and float(options["lr"]) * options["weight_decay"] < 1
    if lazy == "exact":
        legal &= options["algorithm"] != "adamw" and options["direction"] == "sign"
        legal &= all(beta > 0 for beta in options["betas"])
    return legal


def failure_of(program: Program) -> tuple[Failure | None, Run | None]:
    """Run a program; return how it failed, and what was executed."""
    execution = None
    try:
        execution = Run(program)
        execution.run()
    except Failure as failure:
        return failure, execution
    except Exception as error:  # the constructor's
        return Failure(f"construction {type(error).__name__}", str(error)), execution
    return None, execution
