# SPDX-License-Identifier: Apache-2.0
"""The operation "step", with its variants and faults."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from fuzz.execute import Execution, caught
from fuzz.observe import Failure, clock_shape, elements, plain_grad, snapshot, summed
from fuzz.program import Op

_BETWEEN_LAYOUTS = "within an accumulation window"


class Steps(Execution):
    """An execution that knows steps."""

    def op_step(self, op: Op) -> None:
        # A window in which a parameter is frozen, and gets gradients all the same, is not modelled.
        grads = {
            n: g for n, g in op.grads.items() if self.training.get(n) or not self._accumulates(n)
        }
        op = dataclasses.replace(op, grads=grads)
        for name in self.all_names():
            grad = op.grads.get(name)
            self.do(f"give({name}, {'None' if grad is None else grad.text(name)})")
        if op.options.get("clip"):
            self._clip(op.options["clip"])
        fault = op.options.get("fault")
        grads = {n: self.names[n].grad for n in self.all_names()}
        if fault and not self._layouts_clash(grads) and self._fault(fault, op):
            self.counts["faults"] += 1
        amp = op.options.get("amp")
        if amp is not None:
            scale, bad = amp
            for name in self.all_names():
                if name in op.grads:
                    self.do(f"give({name}, {name}.grad * {scale})")
            self.do(f"opt.grad_scale, opt.found_inf = torch.tensor({scale}), torch.tensor({bad})")
        self._step(cancelled=amp is not None and amp[1] != 0)
        if amp is not None:
            self.do("opt.grad_scale = opt.found_inf = None")

    def _accumulates(self, name: str) -> bool:
        group = self._group_of(name)
        return group is not None and group.accumulation > 1

    def _step(self, cancelled: bool) -> None:
        grads = {n: self.names[n].grad for n in self.all_names()}
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
                name = list(group.params)[j]
                g = grads.get(name)
                p.sparse_once |= g is not None and g.layout == torch.sparse_coo
                self.observe(name)
                frozen = f"parameter {i}.{j} frozen_at"
                p.divided_anew = (
                    clock_shape(before, i, j) != clock_shape(after, i, j)
                    or (frozen in before and frozen not in after)  # what it had missed before
                )
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
            if grads[n] is not None and not bool(elements(grads[n]).isfinite().all())
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
        names = self.all_names()
        if any("expanded" in self.lines[-i] for i in range(1, len(names) + 1)):
            return  # torch's clips in place as well
        if any(
            self.names[n].grad is not None
            and not bool(elements(self.names[n].grad).isfinite().all())
            for n in names
        ):
            return
        grads = {n: self.names[n].grad for n in names if self.names[n].grad is not None}
        wanted = {n: summed(g) for n, g in grads.items()}
        self.do(f"norm = tiger_ext.clip_grad_norm_([{', '.join(names)}], {norm})")
        total = float(sum((w.square().sum() for w in wanted.values()), torch.zeros(()))) ** 0.5
        # Each gradient's norm is rounded to its dtype, and so is the norm of these.
        rounding = max((torch.finfo(g.dtype).eps for g in grads.values()), default=0.0)
        if abs(float(self.names["norm"]) - total) > (rounding + 1e-6) * total + 1e-6:
            raise Failure("clip: norm", f"norm is {float(self.names['norm'])}, expected {total}")
        for n, w in wanted.items():
            got, expected = summed(self.names[n].grad), w * min(1.0, norm / (total + 1e-6))
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
            error = self.refused("opt.step()", IndexError)
            if str(index) not in str(error) or str(len(p)) not in str(error):
                raise Failure("an IndexError without numbers", f"index {index}: {error}")
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
