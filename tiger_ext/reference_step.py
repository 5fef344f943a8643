# SPDX-License-Identifier: Apache-2.0
"""One parameter's update on the reference: its units are gathered, updated and put back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tiger_ext import reference
from tiger_ext.finish import finish
from tiger_ext.group_step import GroupStep, is_row_lazy
from tiger_ext.options import FLOATS, algorithm_of, direction_scale
from tiger_ext.state import check_shapes

__all__ = ["ReferenceUpdate", "catch_up_on_reference"]

# Where units are: an index for each of their dimensions; None: the whole parameter is the only one.
_Where = tuple[Tensor, ...] | None
# What is written once all of it has been computed.
_Writes = list[Callable[[], Any]]
# How many elements `catch_up_on_reference` takes at a time.
_CHUNK = 1 << 24


@dataclass
class ReferenceUpdate:
    """One parameter's share of a step on the reference: check, check_state, apply.

    Attributes:
        param: the parameter.
        grad: its gradient; None: the step adds none, it closes a window.
        group: its group.
        position: where it stands in it.
        mask: of the rows that ``rows="tracked"`` found.
        state: set between ``check`` and ``check_state``.
    """

    param: Tensor
    grad: Tensor | None
    group: GroupStep
    position: int
    mask: Tensor | None
    state: dict[str, Any]
    _writes: _Writes | None = field(default=None, init=False)

    @property
    def adds(self) -> bool:
        """Whether there is a gradient."""
        return self.grad is not None

    def check(self) -> None:
        """Check parameter and gradient; the state may still be missing."""
        p, g = self.param, self.grad
        if p.layout != torch.strided:
            raise RuntimeError(f"the parameter has layout {p.layout}, expected torch.strided")
        if g is None:
            return
        if p.dtype not in FLOATS or g.dtype not in FLOATS:
            raise RuntimeError(
                f"the parameter has dtype {p.dtype} and the gradient {g.dtype}, expected one of "
                "float32, float64, bfloat16, float16"
            )
        if g.layout not in (torch.strided, torch.sparse_coo):
            raise RuntimeError(
                f"the gradient has layout {g.layout}, expected torch.strided or torch.sparse_coo"
            )
        if g.device != p.device or g.shape != p.shape:
            raise RuntimeError(
                f"the gradient has shape {list(g.shape)} on device {g.device}, the parameter has "
                f"shape {list(p.shape)} on device {p.device}"
            )
        if g.layout == torch.sparse_coo and g.device.type != "meta":
            reference.check_indices(g._indices(), p.shape)

    def check_state(self) -> None:
        """Check that the state fits the parameter, and the gradient's values if they matter."""
        check_shapes(self.param, self.state)
        raises = self.group.options["nonfinite"] == "raise"
        if self.adds and raises and not self.param.is_meta:
            grad = self._units()[1]
            if not bool(torch.isfinite(grad).all()):
                raise FloatingPointError("the gradient has a NaN or Inf")

    def apply(self, grad_scale: float) -> None:
        """Update the parameter and its state; gradients are divided by ``grad_scale``.

        Once: a caller that a signal has interrupted may call again.
        """
        if self._writes is None:
            self._writes = self._computed(grad_scale)
        for write in self._writes:
            write()
        self._writes = []

    def _computed(self, grad_scale: float) -> _Writes:
        where, grad = self._units()
        group, options, state = self.group, self.group.options, self.state
        writes: _Writes = []
        if self.adds and group.history is not None:
            catch_up_on_reference(self.param, state, group, state["last_step"], where)
        param = self._read(self.param, where)
        decays = torch.ones((param.shape[0],), dtype=torch.bool, device=param.device)
        if group.window:
            in_window = self._read(state["window"], where).reshape(-1) == group.window
            decays = ~in_window
            if not self.adds:  # all rows for which the window is open
                if where is None and not bool(in_window):
                    return writes
                where = _select(where, in_window)
                param, decays = param[in_window], decays[in_window]
                grad = torch.zeros_like(param)
        if self.adds and options["nonfinite"] in ("skip", "shrink"):
            finite = reference.per_unit(torch.isfinite(grad)).all(1)
            if options["nonfinite"] == "shrink":
                shrunk = reference.shrink(
                    param[~finite], ratio=options["shrink_ratio"], to=options.get("shrink_to", 0.0)
                )
                writes.append(partial(_write, self.param, _select(where, ~finite), shrunk))
            if where is None and not bool(finite):
                return writes
            where = _select(where, finite)
            param, grad, decays = param[finite], grad[finite], decays[finite]
        step = 0
        if "step" in state:
            step = int(state["step"]) + 1
            writes.append(partial(state["step"].fill_, step))
        if group.window and self.adds:
            number = torch.full_like(decays, group.window, dtype=torch.int32)
            writes.append(partial(_write, state["window"], where, number))
        writes += self._update(where, param, grad / grad_scale, decays, step)
        if group.history is not None:
            now = group.history.steps + (1 if group.moves(self.adds) else 0)
            place = ... if where is None else where
            writes.append(partial(_set, state["last_step"], place, now))
        return writes

    def _update(
        self, where: _Where, param: Tensor, grad: Tensor, decays: Tensor, step: int
    ) -> _Writes:
        group, options, state = self.group, self.group.options, self.state
        algorithm = algorithm_of(options["algorithm"])
        relative = options.get("scale") is not None
        use = reference.Use(
            lr=group.lr,
            betas=tuple(options["betas"]),
            weight_decay=options["weight_decay"],
            eps=options.get("eps", 0.0),
            step=step,
            direction=options.get("direction", "sign"),
            direction_scale=direction_scale(options),
            rms_floor=options["rms_floor"] if relative else None,
            decays=decays if group.window else None,
            micro_steps=group.micro_steps,
        )
        stored = {moment.name for moment in group.moments()}
        names = [moment.name for moment in algorithm.moments]
        update = getattr(reference, algorithm.update)
        new_param, new_moments = update(
            param,
            -grad if options["maximize"] else grad,
            [self._read(state[name], where) if name in stored else None for name in names],
            use,
        )
        written = [
            (state[name], value)
            for name, value in zip(names, new_moments, strict=True)
            if value is not None
        ]
        if group.moves(self.adds):
            written.append((self.param, new_param))
        return [partial(_write, tensor, where, value) for tensor, value in written]

    # A parameter is updated in units: its touched rows, or the whole of it as the only one.

    def _units(self) -> tuple[_Where, Tensor]:
        """Return where the units are and their gradients ``[units, ...]``."""
        p, g = self.param, self.grad
        dtype = reference.arithmetic_dtype(p)
        window = self.state.get("window")
        row_dims = 0 if window is None else window.dim()
        if g is not None and g.layout == torch.sparse_coo:
            rows, sums = reference.sum_duplicates(g._indices(), g._values(), p.shape, dtype)
            return tuple(rows), sums
        if g is None:
            g = torch.zeros((), dtype=dtype, device=p.device).expand(p.shape)
            touched = torch.ones(p.shape[:row_dims], dtype=torch.bool, device=p.device)
        elif is_row_lazy(p, self.group):
            row_dims = 1
            if self.mask is not None:
                touched = self.mask.bool()
            else:
                touched = reference.per_unit(g != 0).any(1)
        else:
            if self.group.options.get("scale") == "rms_rows" and p.dim() > 0:
                row_dims = 1
            touched = torch.ones(p.shape[:row_dims], dtype=torch.bool, device=p.device)
        if row_dims == 0:
            return None, g.to(dtype).unsqueeze(0)
        where = touched.nonzero(as_tuple=True)
        return where, g[where].to(dtype)

    def _read(self, tensor: Tensor, where: _Where) -> Tensor:
        units = tensor.unsqueeze(0) if where is None else tensor[where]
        return (
            units.to(reference.arithmetic_dtype(self.param)) if units.is_floating_point() else units
        )


def _write(tensor: Tensor, where: _Where, units: Tensor) -> None:
    if where is not None:
        tensor[where] = units.to(tensor.dtype)
    elif len(units):
        tensor.copy_(units[0])


def _set(clock: Tensor, where: Any, step: int) -> None:
    clock[where] = step


def _select(where: _Where, chosen: Tensor) -> _Where:
    return None if where is None else tuple(index[chosen] for index in where)


def catch_up_on_reference(
    p: Tensor,
    state: Mapping[str, Any],
    group: GroupStep,
    last_step: Tensor,
    where: _Where,
    until: int | None = None,
) -> None:
    """Bring rows, all or those at ``where``, up to date with the group's steps so far.

    Or with those up to the step ``until``. May be repeated, also after an interrupt.
    """
    history = group.history
    assert history is not None
    now = history.steps if until is None else until
    since = reference.current_up_to(last_step)
    behind = since < now
    if where is not None:
        chosen = torch.zeros_like(behind)
        chosen[where] = True
        behind &= chosen
    if behind.dim() == 0:  # the parameter is one row
        p, last_step, since, behind = (t.unsqueeze(0) for t in (p, last_step, since, behind))
        state = {m.name: state[m.name].unsqueeze(0) for m in group.moments() if m.name in state}
    rows = behind.nonzero()
    chunk = max(_CHUNK * behind.numel() // max(p.numel(), 1), 1)
    for some in rows.split(chunk):
        if len(some) > 0:
            place = tuple(some.unbind(1))
            finish(_catch_up(p, state, group, last_step, place, since[place].long(), now))


def _catch_up(
    p: Tensor,
    state: Mapping[str, Any],
    group: GroupStep,
    last_step: Tensor,
    rows: tuple[Tensor, ...],
    since: Tensor,
    now: int,
) -> Callable[[], None]:
    """Return what writes rows that have been brought from the step ``since`` to ``now``."""
    assert group.history is not None
    moments = [moment for moment in group.moments() if moment.name in state]
    stored = [state[moment.name] for moment in moments]
    arithmetic = reference.arithmetic_dtype(p)
    missed = group.history.missed(since, now)
    each = (-1, *[1] * (p.dim() - len(rows)))
    param, caught_up = reference.catch_up(
        p[rows].to(arithmetic),
        [s[rows].to(arithmetic) for s in stored],
        decay=missed.decay.to(arithmetic).reshape(each),
        drift=(
            missed.drift.to(arithmetic).reshape(each) if group.options["lazy"] == "exact" else None
        ),
        factors=[missed.betas[moment.beta].reshape(each) for moment in moments],
        floors=[reference.smallest(s.dtype, arithmetic) for s in stored],
    )
    clock = reference.brought_to(last_step[rows], now)

    def write() -> None:
        for tensor, value in zip([*stored, p, last_step], [*caught_up, param, clock], strict=True):
            tensor[rows] = value.to(tensor.dtype)

    return write
