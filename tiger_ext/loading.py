# SPDX-License-Identifier: Apache-2.0
"""State dicts: what of an optimizer's counters is in them, and whether one fits before it loads."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor

from tiger_ext.clocks import PLACEHOLDERS, Clocks, GroupClock
from tiger_ext.group_step import storage_of
from tiger_ext.history import MAX_STEPS, History
from tiger_ext.huge_pages import is_large, move_to_huge_pages
from tiger_ext.moments import SCALES, block_scales, is_int8, is_row_wise, is_scale, scale_name
from tiger_ext.options import (
    ALGORITHMS,
    FLOATS,
    MOMENTS,
    OTHER_OPTIONS,
    Moment,
    algorithm_of,
    check_lazy,
    check_option,
)
from tiger_ext.parameters import parameter_name
from tiger_ext.reference import arithmetic_dtype
from tiger_ext.rounding import keep_seed
from tiger_ext.row_numbers import extremes, out_of_range
from tiger_ext.state import clock_device, unlisted
from tiger_ext.tables import untouched_zeros_like

__all__ = ["Loaded", "fill_in"]

# Options of other optimizers that make another rule under the same names: what they must be.
_OTHER_RULES = {
    "amsgrad": False,
    "centered": False,
    "differentiable": False,
    "dampening": False,
    "decoupled_weight_decay": True,
    "momentum": False,
    "momentum_decay": False,
    "nesterov": False,
}
_INTEGERS = (torch.int32, torch.int64, torch.int16, torch.int8, torch.uint8)


def fill_in(
    state_dict: dict[str, Any], groups: list[dict[str, Any]], clocks: list[GroupClock]
) -> None:
    """Put what has been counted into a state dict, in the place of the placeholders."""
    for saved, group, clock in zip(state_dict["param_groups"], groups, clocks, strict=True):
        numbers = clock.numbers()
        started = clock.history is not None and clock.history.started
        counted = {"history": started, "windows": clock.windows > 0}
        for name, number in numbers.items():
            if name in saved or counted.get(name, clock.micro_steps > 0):
                saved[name] = number
        for i, p in zip(saved["params"], group["params"], strict=True):
            if own := clock.numbers_of(p):
                state_dict["state"][i] = {**state_dict["state"].get(i, {}), **own}


class Loaded:
    """A state dict on its way into an optimizer: checked and copied first, then taken over.

    Attributes:
        states: of each group's parameters, what has been copied.
        clocks: of each group, what has been counted.
    """

    def __init__(self, groups: list[dict[str, Any]], *, assign: bool = False) -> None:
        """Remember what it must fit; ``assign``: its tensors are taken, not copied."""
        self._groups = groups
        self._assign = assign
        self.states: list[list[dict[str, Any]]] = []
        self.clocks: list[GroupClock] = []

    def check(self, final: dict[str, Any]) -> dict[str, Any]:
        """Check and copy; return what torch is to load: all but the parameters' states.

        Raises:
            ValueError: it does not fit.
        """
        saved = final.get("param_groups") if isinstance(final, dict) else None
        states = final.get("state") if isinstance(final, dict) else None
        if not isinstance(saved, list) or not isinstance(states, Mapping):
            raise ValueError("a state dict has a list 'param_groups' and a dict 'state'")
        for i, group in enumerate(saved):
            if not isinstance(group, Mapping) or not isinstance(group.get("params"), list):
                _refuse(f"group {i}", "params", type(group).__name__, "a dict with a list 'params'")
        sizes = [[len(g["params"]) for g in groups] for groups in (saved, self._groups)]
        if sizes[0] != sizes[1]:
            return final  # which torch refuses
        groups, known = [], set()
        for index, (group, own) in enumerate(zip(saved, self._groups, strict=True)):
            merged = _checked_group(index, group, own)
            clock = _clock_of(index, merged, own)
            each = []
            for position, (i, p) in enumerate(zip(group["params"], own["params"], strict=True)):
                where = parameter_name(own, index, position)
                if not isinstance(i, (int, str)) or i in known:
                    _refuse(where, "params", i, "an id of its own")
                known.add(i)
                state = states.get(i, {})
                each.append(_checked_state(where, state, p, merged, clock, self._assign))
            groups.append(merged)
            self.states.append(each)
            self.clocks.append(clock)
        rest = {key: value for key, value in states.items() if key not in known}
        return {**final, "param_groups": groups, "state": rest}

    def restore(self, groups: list[dict[str, Any]], state: Any, clocks: Clocks) -> None:
        """Take over the copies; ``groups`` are those that torch has loaded."""
        for group, each in zip(groups, self.states, strict=True):
            group.update({key: PLACEHOLDERS[key] for key in PLACEHOLDERS if key in group})
            keep_seed(group)
            for p, own in zip(group["params"], each, strict=True):
                if own:
                    state[p] = own
                    self._move_to_huge_pages(p, own)
        for group, clock in zip(groups, self.clocks, strict=True):
            clock.storage = storage_of(group)
        clocks.replace(groups, self.clocks)

    def _move_to_huge_pages(self, p: Tensor, state: Mapping[str, Any]) -> None:
        # Its first step is over. Copies are in huge pages.
        for value in (p, *state.values()) if self._assign else (p,):
            if isinstance(value, Tensor) and p.dim() >= 2 and is_large(value):
                move_to_huge_pages(value)


def _refuse(where: str, key: str, got: Any, expected: str) -> NoReturn:
    shown = repr(got)
    shown = shown if len(shown) <= 200 else shown[:200] + "..."
    raise ValueError(f"load_state_dict: {where}: {key}: got {shown}, expected {expected}")


# --------------------------------------------------------------------------------- groups


def _checked_group(index: int, saved: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options with which a group goes on."""
    where, name = f"group {index}", own["algorithm"]
    algorithm = algorithm_of(name)
    if saved.get("algorithm", name) != name:
        _refuse(where, "algorithm", saved["algorithm"], repr(name))
    for key, value in saved.items():
        owners = [a.name for a in ALGORITHMS.values() if key in a.defaults]
        if owners and key not in algorithm.defaults:
            _refuse(where, key, value, f"no such option of {name}: it is one of {owners}")
        # Dicts of this package say what rule they are of, and may have any keys.
        if key in _OTHER_RULES and "algorithm" not in saved and not isinstance(value, Tensor):
            undecayed = key == "decoupled_weight_decay" and not saved.get("weight_decay")
            if bool(value) != _OTHER_RULES[key] and not undecayed:
                _refuse(where, key, value, f"{_OTHER_RULES[key]}: another rule is not {name}'s")
    names, count = saved.get("param_names", ()), len(saved["params"])
    if "param_names" in saved and not (
        isinstance(names, (list, tuple))
        and len(names) == count
        and all(isinstance(each, str) for each in names)
    ):
        _refuse(where, "param_names", names, f"a list of {count} strings")
    merged = {**saved, "algorithm": name}
    if own["lazy"] != "frozen" and saved.get("lazy", "frozen") == "frozen":
        merged["lazy"] = own["lazy"]
    try:
        for option in (*algorithm.defaults, *OTHER_OPTIONS):
            if option in merged:
                check_option(option, merged[option], algorithm)
        check_lazy({**algorithm.defaults, **merged})
    except ValueError as error:
        raise ValueError(f"load_state_dict: {where}: {error}") from None
    return merged


def _clock_of(index: int, saved: Mapping[str, Any], own: Mapping[str, Any]) -> GroupClock:
    clock = GroupClock(own["params"])
    where = f"group {index}"
    for key in ("windows", "micro_steps"):
        setattr(clock, key, _count(where, key, saved.get(key, 0), MAX_STEPS))
    history = saved.get("history")
    if isinstance(history, History):
        clock.history = History(history.saved())
    elif isinstance(history, (str, tuple, list)):
        try:
            clock.history = History.of(history) if history else None
        except ValueError as error:
            _refuse(where, "history", history, str(error))
    elif history is not None:
        _refuse(where, "history", history, "a string of numbers")
    if clock.history is not None:
        clock.loaded_at = clock.history.steps
    return clock


def _count(where: str, key: str, value: Any, most: int) -> int:
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_meta:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
        _refuse(where, key, value, f"an integer from 0 to {most}")
    return value


# -------------------------------------------------------------------------- parameters' state


def _checked_state(
    where: str, saved: Any, p: Tensor, group: Mapping[str, Any], clock: GroupClock, assign: bool
) -> dict[str, Any]:
    """Return a copy of a parameter's state, and give the clock what it has of the parameter.

    ``assign``: with the tensors themselves.
    """
    if not isinstance(saved, Mapping):
        _refuse(where, "state", saved, "a dict")
    algorithm = algorithm_of(group["algorithm"])
    moments = [moment.name for moment in algorithm.moments]
    now = 0 if clock.history is None else clock.history.steps
    own: dict[str, Any] = {}
    for name, value in saved.items():
        if name in ("begins_at", "frozen_at"):
            table = clock.begins if name == "begins_at" else clock.frozen
            table[p] = _count(where, name, value, now)
        elif name == "step":
            own[name] = _step(where, value, p, assign)
        elif name in ("window", "window_rows", "last_step"):
            own[name] = _integers(where, name, value, p, assign)
        elif name in moments and not isinstance(value, Tensor):
            _refuse(where, name, value, "a tensor")
        elif name in SCALES and group.get("momentum_dtype") == torch.int8:
            own[name] = _scale(where, name, value, p, assign)
        elif isinstance(value, Tensor):
            by_rows = _check_moment(where, name, value, p, group)
            dtype = arithmetic_dtype(p) if by_rows else value.dtype
            if assign and name in moments:
                own[name] = _taken(where, name, value, dtype, p.device)
            else:
                own[name] = value if assign else _copy(value.to(dtype), p)
        else:
            own[name] = value
    if clock.frozen.get(p, now) < clock.begins.get(p, 0):
        _refuse(where, "frozen_at", clock.frozen[p], f"begins_at or later, {clock.begins[p]}")
    is_open = clock.micro_steps > 0 and group.get("accumulation_steps", 1) > 1
    window, last_step = own.get("window"), own.get("last_step")
    if not is_open and _differ(window, last_step):  # a window of the past, of other rows
        del own["window"]
        own.pop("window_rows", None)
    _check_rows(where, own, p, clock.windows + 1, now)
    for moment in algorithm.moments:
        _check_int8(where, moment, own, p, group)
        if (
            last_step is not None
            and group["lazy"] != "frozen"  # clocks of the past otherwise
            and moment.name in own
            and own[moment.name].dim() < last_step.dim()
        ):
            _refuse(
                where,
                moment.name,
                list(own[moment.name].shape),
                f"the shape of last_step, {list(last_step.shape)}, or of more rows",
            )
    if last_step is not None:
        clock.clocked.add(p)
    window = own.get("window")
    missing = [name for name in moments if name not in own]
    if window is not None and is_open and missing:
        _refuse(where, missing[0], None, "a tensor: an accumulation window is open")
    if window is not None and window.dim() > 0 and clock.micro_steps > 0:
        # Distributed checkpointing drops the list, which a fresh optimizer lacks.
        own.setdefault("window_rows", unlisted(p))
    return own


def _check_moment(
    where: str, name: Any, value: Tensor, p: Tensor, group: Mapping[str, Any]
) -> bool:
    """Return whether it is a number a row."""
    algorithm = algorithm_of(group["algorithm"])
    moment = next((m for m in algorithm.moments if m.name == name), None)
    if moment is None:
        if value.shape != p.shape:
            return False  # a user's own
        _refuse(
            where,
            str(name),
            f"a tensor {list(value.shape)}",
            f"a state of {algorithm.name}: {', '.join(m.name for m in algorithm.moments)}",
        )
    by_rows = is_row_wise(p, moment, group)
    option = ""
    if moment.reducible:
        option = f" (second_moment={group.get('second_moment', 'element')!r})"
    if by_rows and not (value.dim() > 0 and value.shape == p.shape[: value.dim()]):
        _refuse(where, name, list(value.shape), f"the first dimensions of {list(p.shape)}{option}")
    if not by_rows and value.shape != p.shape:
        _refuse(where, name, list(value.shape), f"the parameter's shape {list(p.shape)}{option}")
    if value.dtype not in FLOATS and not (value.dtype == torch.int8 and is_int8(moment, group)):
        option = f" (momentum_dtype={group.get('momentum_dtype')})" if not moment.wide else ""
        _refuse(where, name, value.dtype, f"float32, float64, bfloat16 or float16{option}")
    _check_readable(where, name, value, p)
    return by_rows


def _scale(where: str, name: str, value: Any, p: Tensor, assign: bool) -> Tensor:
    """Return the scales of an int8 moment: a copy, or with ``assign`` themselves."""
    if not isinstance(value, Tensor) or value.dtype not in FLOATS:
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        _refuse(where, name, got, "a tensor of float32")
    if not is_scale(p, value):
        expected = f"the first dimensions of {list(p.shape)}, or {list(block_scales(p))}"
        _refuse(where, name, list(value.shape), expected)
    _check_readable(where, name, value, p)
    if assign:
        return _taken(where, name, value, torch.float32, p.device)
    return _copy(value.to(torch.float32), p).contiguous()


def _check_int8(
    where: str, moment: Moment, own: Mapping[str, Any], p: Tensor, group: Mapping[str, Any]
) -> None:
    """Check that an int8 moment and its scales are there together, and fit the rows' clocks."""
    if group.get("momentum_dtype") != torch.int8:
        return
    name = scale_name(moment.name)
    scale = own.get(name)
    last_step = own.get("last_step") if group["lazy"] != "frozen" else None
    quantised = moment.name in own and own[moment.name].dtype == torch.int8
    if quantised and scale is None:
        _refuse(where, name, None, f"a tensor: {moment.name} is int8")
    if scale is not None and not quantised:
        dtype = own[moment.name].dtype if moment.name in own else None
        _refuse(where, moment.name, dtype, f"torch.int8: there is {name}")
    if scale is not None and last_step is not None and last_step.dim() > 0:
        by_rows = scale.dim() >= last_step.dim() and scale.shape != block_scales(p)
        if not by_rows and scale.shape != last_step.shape:
            expected = f"the shape of last_step, {list(last_step.shape)}, or of more rows"
            _refuse(where, name, list(scale.shape), expected)


def _check_readable(where: str, name: str, value: Tensor, p: Tensor) -> None:
    if value.layout != torch.strided:
        _refuse(where, name, value.layout, "torch.strided")
    if value.is_meta and not p.is_meta:
        _refuse(where, name, "a tensor without data on the device meta", "data")


def _step(where: str, value: Any, p: Tensor, assign: bool) -> Tensor:
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_meta:
        number = value.item()
    else:
        number = value
    legal = isinstance(number, (int, float)) and not isinstance(number, bool)
    if isinstance(value, Tensor) and value.is_meta and p.is_meta and value.numel() == 1:
        return torch.zeros((), dtype=torch.int64)
    if not legal or not math.isfinite(number) or number != int(number) or not 0 <= number < 2**53:
        _refuse(where, "step", value, "one whole number >= 0")
    if assign:
        return _taken(where, "step", value, torch.int64, clock_device(p))
    return torch.tensor(int(number), dtype=torch.int64, device=clock_device(p))


def _integers(where: str, name: str, value: Any, p: Tensor, assign: bool) -> Tensor:
    """Return a contiguous copy of integers that belong to rows, in the dtype of the kernels.

    ``assign``: the tensor itself.
    """
    if not isinstance(value, Tensor):
        _refuse(where, name, type(value).__name__, "a tensor")
    if value.dtype not in _INTEGERS:
        _refuse(where, name, value.dtype, "integers")
    _check_readable(where, name, value, p)
    least = 1 if name == "last_step" and p.dim() >= 2 else 0
    if name != "window_rows" and (value.dim() < least or value.shape != p.shape[: value.dim()]):
        _refuse(where, name, list(value.shape), f"the first dimensions of {list(p.shape)}")
    if name == "window_rows" and value.dim() != 2:
        _refuse(where, name, list(value.shape), "[row dimensions, entries]")
    dtype = torch.int64 if name == "window_rows" else torch.int32
    if assign:
        return _taken(where, name, value, dtype, p.device)
    value = value.detach()
    if name != "window_rows" and value.dtype == torch.int64 and not value.is_meta:
        low, high = extremes(value)
        if not -(2**31) <= low <= high < 2**31:
            _refuse(where, name, [low, high], "numbers of 32 bits")
    return _copy(value.to(dtype), p).contiguous()


def _taken(where: str, name: str, value: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a tensor itself, as ``assign=True`` takes it, unless it is not what steps work on."""
    if not isinstance(value, Tensor):
        _refuse(where, name, type(value).__name__, "a tensor, which assign=True takes itself")
    if value.dtype != dtype:
        _refuse(where, name, value.dtype, f"{dtype}, as assign=True takes the tensor itself")
    if value.device != device:
        _refuse(where, name, value.device, f"{device}, as assign=True takes the tensor itself")
    if name not in MOMENTS and not value.is_contiguous():
        _refuse(where, name, f"strides {value.stride()}", "a contiguous tensor")
    return value.detach() if value.requires_grad else value


def _copy(value: Tensor, p: Tensor) -> Tensor:
    """Return a copy for the state of ``p``, in huge pages where they pay."""
    if p.dim() >= 2 and p.device.type == "cpu" and is_large(value):
        return untouched_zeros_like(value, value.dtype, huge_pages=True).copy_(value.detach())
    return value.detach().to(p.device, copy=True)


def _differ(window: Tensor | None, last_step: Tensor | None) -> bool:
    """Return whether both are there, and not for the same rows."""
    if window is None or last_step is None or window.dim() == 0:
        return False
    return window.dim() != last_step.dim()


def _check_rows(where: str, own: Mapping[str, Any], p: Tensor, open_window: int, now: int) -> None:
    """Check that what belongs to rows fits together, and the counters of the group."""
    window, rows, last_step = (own.get(k) for k in ("window", "window_rows", "last_step"))
    if rows is not None and rows.numel() + rows.shape[0] > 0:
        dims = 0 if window is None else window.dim()
        if rows.shape[0] != dims:
            _refuse(where, "window_rows", list(rows.shape), f"[{dims}, entries], as window has")
    for name in ("window", "window_rows", "last_step"):
        found = None if name not in own else out_of_range(name, own[name], p, open_window, now)
        if found is not None:
            _refuse(where, name, *found)
    if last_step is not None and window is not None and _differ(window, last_step):
        shapes = list(last_step.shape), list(window.shape)
        _refuse(where, "last_step", shapes[0], f"the shape of window, {shapes[1]}")
