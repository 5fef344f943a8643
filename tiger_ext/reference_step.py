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
from tiger_ext.history import Missed
from tiger_ext.moments import (
    Where,
    check_shapes,
    decaying,
    is_row_wise,
    read_moment,
    read_units,
    stored_dims,
    written_moment,
)
from tiger_ext.options import FLOATS, algorithm_of, direction_scale
from tiger_ext.rounding import CATCH_UP, PARAMETER, Draws, counts_steps, round_to

__all__ = ["ReferenceUpdate", "catch_up_on_reference"]

# What is written once all of it has been computed.
_Writes = list[Callable[[], Any]]
_ROUNDED = (torch.bfloat16, torch.float16)  # what stochastic rounding is for
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
        step = self.state.get("step")
        if step is not None and counts_steps(self.group.options) and step.numel() != 1:
            raise RuntimeError(f"the state step has {step.numel()} elements, expected one")
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
        p, group, options, state = self.param, self.group, self.group.options, self.state
        writes: _Writes = []
        counts = counts_steps(options) and "step" in state
        step = int(state["step"]) + 1 if counts else 0
        ages = self.adds and group.history is not None
        if ages and where is None:
            catch_up_on_reference(group, self.position, state, state["last_step"], None)
        decays = torch.ones((grad.shape[0],), dtype=torch.bool, device=p.device)
        if group.window:
            in_window = read_units(state["window"], where).reshape(-1) == group.window
            decays = ~in_window
            if not self.adds:  # all rows for which the window is open
                if where is None and not bool(in_window):
                    return writes
                where = _select(where, in_window)
                grad, decays = grad[in_window], decays[in_window]
        if self.adds and options["nonfinite"] in ("skip", "shrink"):
            finite = reference.per_unit(torch.isfinite(grad)).all(1)
            if options["nonfinite"] == "shrink":
                writes += self._shrink(where, ~finite, ages, step)
            if where is None and not bool(finite):
                return writes
            where = _select(where, finite)
            grad, decays = grad[finite], decays[finite]
        if counts:
            writes.append(partial(state["step"].fill_, step))
        if group.window and self.adds:
            number = torch.full_like(decays, group.window, dtype=torch.int32)
            writes.append(partial(_write, state["window"], where, number))
        param, moments = self._current(where, ages)
        writes += self._update(where, param, grad / grad_scale, moments, decays, step)
        if group.history is not None:
            now = group.history.steps + (1 if group.moves(self.adds) else 0)
            place = ... if where is None else where
            writes.append(partial(_set, state["last_step"], place, now))
        return writes

    def _shrink(self, where: Where, chosen: Tensor, ages: bool, step: int) -> _Writes:
        """Return what moves units with a NaN or Inf towards ``shrink_to``."""
        options, state = self.group.options, self.state
        rows = _select(where, chosen)
        if ages and rows is not None:
            catch_up_on_reference(self.group, self.position, state, state["last_step"], rows)
        units = self._to_arithmetic(read_units(self.param, rows))
        if rows is None:
            units = units[chosen]
        shrunk = reference.shrink(
            units, ratio=options["shrink_ratio"], to=options.get("shrink_to", 0.0)
        )
        return [self._write_param(rows, shrunk, step)]

    def _current(self, where: Where, ages: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """Return units of the parameter and its moments, rows after the steps they have skipped."""
        p, group, state = self.param, self.group, self.state
        param = self._to_arithmetic(read_units(p, where))
        moments = [moment for moment in group.moments() if moment.name in state]
        read = partial(read_moment, p, state=state, where=where)
        if not ages or where is None:
            return param, {moment.name: read(moment) for moment in moments}
        assert group.history is not None
        now = group.history.steps
        since = reference.current_up_to(state["last_step"][where]).long().clamp(max=now)
        missed = group.history.missed(since, now)
        behind = (since < now).reshape(_each(param))
        exp_avg = read(moments[0]) if group.options["lazy"] == "exact" else None
        param = torch.where(behind, _caught_up(param, missed, exp_avg), param)
        return param, {m.name: read(m, factor=missed.betas[m.beta]) for m in moments}

    def _update(
        self,
        where: Where,
        param: Tensor,
        grad: Tensor,
        moments: Mapping[str, Tensor],
        decays: Tensor,
        step: int,
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
            row_wise=any(is_row_wise(self.param, m, options) for m in algorithm.moments),
        )
        stored = {moment.name for moment in group.moments()}
        update = getattr(reference, algorithm.update)
        new_param, new_moments = update(
            param,
            -grad if options["maximize"] else grad,
            [moments[m.name] if m.name in stored else None for m in algorithm.moments],
            use,
        )
        writes: _Writes = []
        draws = group.draws(self.position, step)
        for moment, value in zip(algorithm.moments, new_moments, strict=True):
            # A pass that adds no gradient leaves them as they are.
            if self.adds and value is not None and len(value) > 0:
                parts = written_moment(self.param, moment, state, where, value, draws)
                writes += [partial(_write, tensor, where, units) for tensor, units in parts]
        if group.moves(self.adds):
            writes.append(self._write_param(where, new_param, step))
        elif group.history is not None and self.adds:  # rows may have caught up
            writes.append(self._write_param(where, param, step))
        return writes

    def _write_param(self, where: Where, units: Tensor, step: int) -> Callable[[], None]:
        if len(units) > 0:
            draws = self.group.draws(self.position, step)
            units = _rounded(self.param, where, units, self.group, draws, PARAMETER)
        return partial(_write, self.param, where, units)

    # A parameter is updated in units: its touched rows, or the whole of it as the only one.

    def _units(self) -> tuple[Where, Tensor]:
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
            row_dims = row_dims or stored_dims(p, self.group, self.state)
            touched = torch.ones(p.shape[:row_dims], dtype=torch.bool, device=p.device)
        if row_dims == 0:
            return None, g.to(dtype).unsqueeze(0)
        where = touched.nonzero(as_tuple=True)
        return where, g[where].to(dtype)

    def _to_arithmetic(self, units: Tensor) -> Tensor:
        return units.to(reference.arithmetic_dtype(self.param))


def _each(units: Tensor) -> tuple[int, ...]:
    """Return the shape of one number a unit that is broadcast over ``units``."""
    return (-1, *[1] * (units.dim() - 1))


def _write(tensor: Tensor, where: Where, units: Tensor) -> None:
    if where is not None:
        place = tensor[where]
        tensor[where] = units.reshape(place.shape).to(tensor.dtype)
    elif len(units):
        tensor.copy_(units[0])


def _rounded(
    p: Tensor,
    where: Where,
    units: Tensor,
    group: GroupStep,
    draws: Draws | None,
    stream: int,
) -> Tensor:
    """Return units of a parameter in its dtype, rounded as the group's options say."""
    if draws is None or not group.options["stochastic_rounding"] or p.dtype not in _ROUNDED:
        return units.to(p.dtype)
    return round_to(p.dtype, units, draws.bits(stream, p, where))


def _set(clock: Tensor, where: Any, step: int) -> None:
    clock[where] = step


def _select(where: Where, chosen: Tensor) -> Where:
    return None if where is None else tuple(index[chosen] for index in where)


def catch_up_on_reference(
    group: GroupStep,
    position: int,
    state: Mapping[str, Any],
    last_step: Tensor,
    where: Where,
    until: int | None = None,
) -> None:
    """Bring rows, all or those at ``where``, up to date with the group's steps so far.

    Or with those up to the step ``until``. May be repeated, also after an interrupt.
    """
    p, history = group.params[position], group.history
    assert history is not None
    now = history.steps if until is None else until
    since = reference.current_up_to(last_step)
    behind = since < now
    if where is not None:
        chosen = torch.zeros_like(behind)
        chosen[where] = True
        behind &= chosen
    draws = group.draws(position, now)
    rest = (group, last_step, now, draws)
    if behind.dim() == 0:  # the parameter is one row
        if bool(behind):
            finish(_catch_up(p, state, None, since.long().unsqueeze(0), *rest))
        return
    rows = behind.nonzero()
    chunk = max(_CHUNK * behind.numel() // max(p.numel(), 1), 1)
    for some in rows.split(chunk):
        if len(some) > 0:
            place = tuple(some.unbind(1))
            finish(_catch_up(p, state, place, since[place].long(), *rest))


def _catch_up(
    p: Tensor,
    state: Mapping[str, Any],
    rows: Where,
    since: Tensor,
    group: GroupStep,
    last_step: Tensor,
    now: int,
    draws: Draws | None,
) -> Callable[[], None]:
    """Return what writes rows that have been brought from the step ``since`` to ``now``."""
    assert group.history is not None
    moments = [moment for moment in group.moments() if moment.name in state]
    missed = group.history.missed(since, now)
    exp_avg = None
    if group.options["lazy"] == "exact":
        exp_avg = read_moment(p, moments[0], state=state, where=rows)
    arithmetic = reference.arithmetic_dtype(p)
    param = _caught_up(read_units(p, rows).to(arithmetic), missed, exp_avg)
    # Its bits go by rows also where the parameter is the only one.
    whole = p.unsqueeze(0) if rows is None else p
    place = (torch.zeros(1, dtype=torch.int64, device=p.device),) if rows is None else rows
    param = _rounded(whole, place, param, group, draws, PARAMETER + CATCH_UP)
    new = [(p, param), (last_step, reference.brought_to(read_units(last_step, rows), now))]
    for moment in moments:
        stored = decaying(moment, state)
        units = read_units(stored, rows).to(arithmetic)
        floor = reference.smallest(stored.dtype, arithmetic)
        factor = missed.betas[moment.beta].reshape(_each(units))
        new.append((stored, reference.decayed(units, factor, floor)))

    def write() -> None:
        for tensor, value in new:
            _write(tensor, rows, value)

    return write


def _caught_up(param: Tensor, missed: Missed, exp_avg: Tensor | None) -> Tensor:
    """Return units of a parameter after skipped steps, which were sign steps if of ``exp_avg``."""
    decay, drift = (t.to(param.dtype).reshape(_each(param)) for t in (missed.decay, missed.drift))
    return reference.catch_up(
        param, decay=decay, drift=None if exp_avg is None else drift, exp_avg=exp_avg
    )
