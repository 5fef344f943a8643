# SPDX-License-Identifier: Apache-2.0
"""Delta checkpoints on their way into an optimizer: all is checked first, then written."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tiger_ext.archive import CheckpointError
from tiger_ext.change_file import read_changes
from tiger_ext.clocks import PLACEHOLDERS, GroupClock
from tiger_ext.finish import finish
from tiger_ext.group_step import GroupStep
from tiger_ext.lazy import note_version
from tiger_ext.loading import Loaded
from tiger_ext.optimizer import MixedOptimizer
from tiger_ext.positions import FORMAT, Position, difference, groups_of, position_of
from tiger_ext.row_numbers import out_of_range

__all__ = ["apply_changes"]

# Where rows are, an index for each of their dimensions; None: all of them.
_Rows = tuple[Tensor, ...] | None


@torch.inference_mode(False)
@torch.no_grad()
def apply_changes(optimizer: MixedOptimizer, path: str | os.PathLike[str]) -> Position:
    """Bring an optimizer and its parameters from where a delta counts from to where it was saved.

    That is after the full checkpoint, or the delta before, has been loaded; the optimizer has the
    groups with which the delta was saved, those that were added since among them. What is loaded is
    what ``load_state_dict`` loads, and the parameters. Everything is checked before the first
    write. A signal whose handler raises meanwhile is heeded when all is written.

    Args:
        optimizer: a Tiger, Lion or AdamW.
        path: what ``save_changes`` wrote.

    Returns:
        Where the optimizer is now: ``since`` of the next delta.

    Raises:
        TypeError: the optimizer is another one.
        ValueError: a parameter is on the device meta.
        CheckpointError: the file is damaged, is of another optimizer or run, or does not count from
            where the optimizer is, as when a delta is missing, or has been applied already.
        OSError: the file cannot be read.
        RuntimeError: a CUDA graph is being captured.
    """
    groups = groups_of(optimizer)
    try:
        header, tensors = read_changes(os.fspath(path))
        _check_same(groups, header)
        _check_follows(groups, optimizer.state, header)
        applying = _Applying(groups, optimizer.state, header, tensors)
    except CheckpointError as error:
        raise CheckpointError(f"{os.fspath(path)}: {error}") from error
    except (KeyError, IndexError, TypeError, AttributeError) as error:  # whoever wrote it
        raise CheckpointError(
            f"{os.fspath(path)}: is malformed: {type(error).__name__}: {error}"
        ) from error
    finish(partial(applying.write, optimizer))
    end: Position = header["end"]
    for group, reached in zip(groups_of(optimizer), end["groups"], strict=True):
        reached["line"] = group.clock.line
        for i, each in enumerate(reached["params"]):
            if group.history is not None:
                note_version(group, i)
                each["rewritten"] = 0
    return end


def _check_same(groups: Sequence[GroupStep], header: Mapping[str, Any]) -> None:
    """Check that the file is of an optimizer with the same groups and parameters."""
    if header.get("format") != FORMAT:
        raise CheckpointError(f"has format {header.get('format')!r}, expected {FORMAT}")
    saved = header["groups"]
    if len(saved) != len(groups):
        raise CheckpointError(f"has {len(saved)} parameter groups, the optimizer has {len(groups)}")
    for group, theirs in zip(groups, saved, strict=True):
        where, name = f"group {group.index}", group.options["algorithm"]
        if theirs["algorithm"] != name:
            raise CheckpointError(f"has {theirs['algorithm']!r} in {where}, expected {name!r}")
        entries = theirs["parameters"]
        if len(entries) != len(group.params):
            raise CheckpointError(
                f"has {len(entries)} parameters in {where}, the optimizer has {len(group.params)}"
            )
        names = [each.get("param_names") or () for each in (theirs, group.options)]
        for i, (p, entry) in enumerate(zip(group.params, entries, strict=True)):
            if all(names) and names[0][i] != names[1][i]:
                raise CheckpointError(f"has a parameter {names[0][i]!r}, expected {group.name(i)}")
            got, own = [entry["shape"], entry["dtype"]], [list(p.shape), str(p.dtype)]
            if got != own:
                raise CheckpointError(
                    f"{group.name(i)}: has {got[1]} of shape {got[0]}, the optimizer {own[1]} of "
                    f"shape {own[0]}"
                )
            if p.is_inference() or any(
                n > 1 and s == 0 for n, s in zip(p.shape, p.stride(), strict=True)
            ):
                raise CheckpointError(
                    f"cannot be applied: {group.name(i)} is an inference tensor, or expanded"
                )


def _check_follows(
    groups: Sequence[GroupStep], states: Mapping[Tensor, Any], header: Mapping[str, Any]
) -> None:
    """Check that the optimizer is where the changes count from."""
    base = header["base"]
    if "groups" not in base:
        history = groups[base["group"]].history
        steps = None if history is None else history.steps
        if steps != base["steps"]:
            raise CheckpointError(
                f"does not follow on: it counts from step {base['steps']} of group "
                f"{base['group']}, which is at step {steps}"
            )
        return
    wrong = difference(position_of(groups, states, like=base), base)
    if wrong is None:
        return
    if difference(position_of(groups, states), header["end"]) is None:
        raise CheckpointError("has been applied already: the optimizer is where it leads to")
    begin, end = (
        ", ".join(str(each["steps"]) for each in place["groups"]) for place in (base, header["end"])
    )
    raise CheckpointError(
        f"does not follow on, it leads from step {begin} to {end}: {wrong}. Is a delta before it "
        "missing, or is it of another run?"
    )


class _Applying:
    """Changes on their way into an optimizer: all is checked and allocated first."""

    def __init__(
        self,
        groups: Sequence[GroupStep],
        states: Mapping[Tensor, Any],
        header: Mapping[str, Any],
        tensors: Sequence[Tensor],
    ) -> None:
        """Check and allocate.

        Raises:
            CheckpointError: it does not fit.
        """
        self._groups, self._states, self._tensors = groups, states, tensors
        self._copies: list[Callable[[], Any]] = []
        self._final: list[tuple[Tensor, dict[str, Any]]] = []
        self._loaded = Loaded([group.options for group in groups])
        saved: dict[str, Any] = {"param_groups": [], "state": {}}
        new = set()  # parameters whose state is to be allocated
        for group, theirs in zip(groups, header["groups"], strict=True):
            options = {key: value for key, value in theirs.items() if key != "parameters"}
            options["params"] = []
            for p, entry in zip(group.params, theirs["parameters"], strict=True):
                number = len(saved["state"])
                options["params"].append(number)
                saved["state"][number] = dict(entry["numbers"])
                if entry["rows"] is None and not self._is_alike(states.get(p, {}), entry):
                    new.add(p)
                    saved["state"][number] |= {
                        name: self._laid_out(p, self._value(each))
                        for name, each in entry["state"].items()
                    }
            saved["param_groups"].append(options)
        try:
            merged = self._loaded.check(saved)["param_groups"]
        except ValueError as error:
            raise CheckpointError(str(error).removeprefix("load_state_dict: ")) from error
        self._options = [
            {
                **group.options,
                **options,
                "lazy": theirs["lazy"],
                **{key: value for key, value in PLACEHOLDERS.items() if key in options},
                "params": group.params,
            }
            for group, theirs, options in zip(groups, header["groups"], merged, strict=True)
        ]
        for group, theirs, clock, each in zip(
            groups, header["groups"], self._loaded.clocks, self._loaded.states, strict=True
        ):
            for i, (entry, own) in enumerate(zip(theirs["parameters"], each, strict=True)):
                rows = self._rows(group, i, entry)
                if group.params[i] in new:  # without an empty list of a window's rows
                    final = {name: value for name, value in own.items() if name in entry["state"]}
                else:
                    final = self._in_place(group, i, entry, rows, clock)
                self._take(group, i, entry, rows, clock, final)

    def _value(self, each: Mapping[str, Any]) -> Any:
        """Return a state of the file."""
        return self._tensors[each["tensor"]] if "tensor" in each else each["value"]

    def _laid_out(self, p: Tensor, value: Any) -> Any:
        """Return a new state in the parameter's memory format."""
        if not isinstance(value, Tensor) or value.shape != p.shape or p.is_contiguous():
            return value
        return torch.empty_like(p, dtype=value.dtype, device="cpu").copy_(value)

    def _is_alike(self, own: Mapping[str, Any], entry: Mapping[str, Any]) -> bool:
        """Return whether a state that is saved whole has the tensors that the optimizer has."""
        saved = {n: self._value(each) for n, each in entry["state"].items() if "tensor" in each}
        tensors = {name for name, value in own.items() if isinstance(value, Tensor)}
        return saved.keys() == tensors and all(_fits(own[n], t) for n, t in saved.items())

    def _in_place(
        self,
        group: GroupStep,
        i: int,
        entry: Mapping[str, Any],
        rows: _Rows,
        clock: GroupClock,
    ) -> dict[str, Any]:
        """Note what to write to the state that is there; return the state as it will be."""
        where, p = group.name(i), group.params[i]
        own = self._states.get(p, {})
        final: dict[str, Any] = {}
        for name, each in entry["state"].items():
            value = final[name] = self._value(each)
            if not isinstance(value, Tensor):
                continue
            self._check_numbers(group, i, name, value, entry, clock)
            there = own.get(name)
            if each["by_rows"]:
                self._check_rows(f"{where}: {name}", there, rows, value)
                self._copies.append(partial(_put, there, rows, _beside(there, rows, value)))
            elif isinstance(there, Tensor) and _fits(there, value):
                self._copies.append(partial(there.copy_, value))
            else:
                final[name] = value.to(p.device, copy=True)
                continue
            final[name] = there
        return final

    def _take(
        self,
        group: GroupStep,
        i: int,
        entry: Mapping[str, Any],
        rows: _Rows,
        clock: GroupClock,
        final: dict[str, Any],
    ) -> None:
        """Note what to write to a parameter, and the state that it will have."""
        p = group.params[i]
        if entry["parameter"] is not None:
            value = self._tensors[entry["parameter"]]
            self._check_rows(f"{group.name(i)}", p, rows, value)
            self._copies.append(partial(_put, p, rows, _beside(p, rows, value)))
        self._final.append((p, final))
        if "last_step" in final:
            clock.clocked.add(p)

    def _rows(self, group: GroupStep, i: int, entry: Mapping[str, Any]) -> _Rows:
        """Return where the rows of the file are in the parameter; None: it has all."""
        if entry["rows"] is None:
            return None
        p, dims = group.params[i], entry["rows"]["dims"]
        ids = self._tensors[entry["rows"]["ids"]].long()
        count = p.shape[:dims].numel()
        if len(ids) and not (
            0 <= int(ids[0]) <= int(ids[-1]) < count and bool((ids[1:] > ids[:-1]).all())
        ):
            raise CheckpointError(f"{group.name(i)}: has rows that do not rise from 0 to {count}")
        return tuple(torch.unravel_index(ids.to(p.device), p.shape[:dims]))

    def _check_rows(self, what: str, there: Any, rows: _Rows, value: Tensor) -> None:
        """Check that rows, or a whole tensor, can be written to what is there."""
        if not isinstance(there, Tensor):
            raise CheckpointError(f"does not follow on: the optimizer lacks {what}")
        expected = list(there.shape) if rows is None else [len(rows[0]), *there.shape[len(rows) :]]
        got = list(value.shape)
        if got != expected or value.dtype != there.dtype:
            raise CheckpointError(
                f"{what}: has {value.dtype} of shape {got}, expected {there.dtype} of shape "
                f"{expected}"
            )

    def _check_numbers(
        self,
        group: GroupStep,
        i: int,
        name: str,
        value: Tensor,
        entry: Mapping[str, Any],
        clock: GroupClock,
    ) -> None:
        """Check clocks and row numbers, which kernels go by."""
        p, now = group.params[i], 0 if clock.history is None else clock.history.steps
        if name not in ("last_step", "window", "window_rows"):
            return
        if name == "window_rows":
            window = entry["state"].get("window")
            dims = 0 if window is None else self._tensors[window["tensor"]].dim()
            if entry["rows"] is not None and window is not None and window["by_rows"]:
                dims = entry["rows"]["dims"]
            if value.dim() != 2 or (value.numel() + len(value) > 0 and len(value) != dims):
                raise CheckpointError(
                    f"{group.name(i)}: {name}: has shape {list(value.shape)}, expected "
                    f"[{dims}, entries]"
                )
        dtype = torch.int64 if name == "window_rows" else torch.int32
        if value.dtype != dtype:
            raise CheckpointError(f"{group.name(i)}: {name}: has {value.dtype}, expected {dtype}")
        found = out_of_range(name, value, p, clock.windows + 1, now)
        if found is not None:
            (low, high), expected = found
            raise CheckpointError(
                f"{group.name(i)}: {name}: goes from {low} to {high}, expected {expected}"
            )

    def write(self, optimizer: MixedOptimizer) -> None:
        """Write. May be repeated, from whatever line on."""
        for copy in self._copies:
            copy()
        for p, final in self._final:
            if final:
                optimizer.state[p] = final
            else:
                optimizer.state.pop(p, None)
        for own, options in zip(optimizer.param_groups, self._options, strict=True):
            own.update(options)
        optimizer._clocks.replace(optimizer.param_groups, self._loaded.clocks)
        for used in optimizer._tracked.values():
            used.current = False


def _fits(there: Tensor, value: Tensor) -> bool:
    """Return whether a tensor can be copied into another as it is."""
    return there.shape == value.shape and there.dtype == value.dtype and not there.is_meta


def _beside(there: Tensor, rows: tuple[Tensor, ...] | None, value: Tensor) -> Tensor:
    """Return rows on the device on which they are to be written: later there may be no memory."""
    return value if rows is None else value.to(there.device)


def _put(there: Tensor, rows: tuple[Tensor, ...] | None, values: Tensor) -> None:
    """Write rows, or everything."""
    if rows is None:
        there.copy_(values)
    elif len(rows) == 1:
        there.index_copy_(0, rows[0], values)
    else:
        there[rows] = values
