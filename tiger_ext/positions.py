# SPDX-License-Identifier: Apache-2.0
"""Where an optimizer is: what tells whether a delta checkpoint follows on.

The steps and the other counters say whether a delta between is missing, or was applied already. A
digest of all clocks, and of a sample of the elements of each tensor, says whether it is the same
run: other batches touch other rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tiger_ext.capture import is_capturing
from tiger_ext.change_file import Source, bytes_of
from tiger_ext.group_step import GroupStep
from tiger_ext.lazy import is_rewritten, note_version, place_histories, warn_if_behind
from tiger_ext.moments import SCALES
from tiger_ext.optimizer import MixedOptimizer
from tiger_ext.options import MOMENTS, algorithm_of
from tiger_ext.reference import current_up_to

__all__ = [
    "CLOCKS_AT_ONCE",
    "FORMAT",
    "Position",
    "checked_since",
    "difference",
    "groups_of",
    "position",
    "position_of",
]

Position = dict[str, Any]

FORMAT = 1
CLOCKS_AT_ONCE = 1 << 20
_SAMPLE = 4096  # elements of each tensor that are compared
# Options that others set from step to step, or that say how and not what is computed.
_PASSING = {"lr", "weight_decay", "betas", "eps", "fused", "capturable"}


@torch.no_grad()
def position(optimizer: MixedOptimizer) -> Position:
    """Return where an optimizer is: what a later ``save_changes`` takes as ``since``.

    Call it when the full checkpoint is saved, and anew after one was loaded. It reads all clocks
    and a sample of each tensor.

    Args:
        optimizer: a Tiger, Lion or AdamW.

    Returns:
        A dict of plain numbers, strings and lists, which may be saved as JSON.

    Raises:
        TypeError: it is another optimizer.
        ValueError: a parameter is on the device meta.
        RuntimeError: a CUDA graph is being captured.
    """
    return position_of(groups_of(optimizer), optimizer.state)


def groups_of(optimizer: MixedOptimizer) -> list[GroupStep]:
    """Return an optimizer's groups, with clocks that know of state that was cleared."""
    if not isinstance(optimizer, MixedOptimizer):
        raise TypeError(f"got a {type(optimizer).__name__}, expected a Tiger, Lion or AdamW")
    if is_capturing():
        raise RuntimeError("a CUDA graph is being captured: changes are saved before or after")
    groups = optimizer._group_steps()
    for group in groups:
        group.clock.look_for_cleared(optimizer.state)
        for position, p in enumerate(group.params):
            if p.is_meta:
                raise ValueError(f"{group.name(position)} is on the device meta, expected data")
    place_histories([group for group in groups if group.history is not None])
    return groups


def position_of(
    groups: Sequence[GroupStep], states: Mapping[Tensor, Any], like: Position | None = None
) -> Position:
    """Return the position of these groups, or of as many parameters as another position has."""
    known = [None] * len(groups) if like is None else [len(g["params"]) for g in like["groups"]]
    each = []
    for group, count in zip(groups, known, strict=False):
        history, options = group.history, group.options
        names = algorithm_of(options["algorithm"]).defaults.keys() - _PASSING
        each.append(
            {
                "algorithm": options["algorithm"],
                "options": {name: repr(options.get(name)) for name in sorted(names)},
                "line": group.clock.line,
                "steps": None if history is None else history.steps,
                "history": "" if history is None else _digest([history.text().encode()]),
                "windows": group.clock.windows,
                "micro_steps": group.clock.micro_steps,
                "params": [
                    _parameter_position(group, i, states.get(p, {}))
                    for i, p in enumerate(group.params[:count])
                ],
            }
        )
    return {"format": FORMAT, "groups": each}


def _parameter_position(group: GroupStep, i: int, state: Mapping[str, Any]) -> dict[str, Any]:
    p = group.params[i]
    found: dict[str, Any] = {
        "shape": list(p.shape),
        "dtype": str(p.dtype),
        **group.clock.numbers_of(p),
        "tensors": {
            name: f"{value.dtype} {list(value.shape)}"
            for name, value in sorted(state.items())
            if isinstance(value, Tensor)
        },
        "sample": _sample(
            [p, *(state[name] for name in (*MOMENTS, *SCALES, "step") if name in state)]
        ),
    }
    if group.history is None:
        return found
    if is_rewritten(group, i):
        warn_if_behind(group, i, {p: state})
    note_version(group, i)
    found["rewritten"] = group.clock.rewritten.get(p, 0)
    last_step = state.get("last_step")
    if last_step is not None:
        found["clocks"] = _digest(Source(last_step).pieces())
        steps = group.history.steps
        found["current"] = not any(
            bool((current_up_to(part) != steps).any())
            for part in last_step.reshape(-1).split(CLOCKS_AT_ONCE)
        )
    return found


def _digest(parts: Iterable[Tensor | bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        for piece in [part] if isinstance(part, bytes) else bytes_of(part):
            digest.update(piece)
    return digest.hexdigest()[:32]


def _sample(tensors: Sequence[Tensor]) -> str:
    """Return a digest of some elements of each."""
    found = []
    for t in tensors:
        count = min(t.numel(), _SAMPLE)
        if t.dim() == 0:
            found.append(t.detach().cpu())
        elif count > 0:
            places = torch.arange(count, device=t.device) * t.numel() // count
            found.append(t.detach()[torch.unravel_index(places, t.shape)].cpu())
    return _digest(found)


def difference(now: Position, then: Position) -> str | None:
    """Return in a sentence how a position differs from the one that was expected."""
    return next(_differences(now, then), None)


def _differences(now: Position, then: Position) -> Iterator[str]:
    for k, (here, there) in enumerate(zip(now["groups"], then["groups"], strict=True)):
        for name in ("steps", "windows", "micro_steps"):
            if here[name] != there[name]:
                yield f"group {k} is at {here[name]} {name}, expected {there[name]}"
    for k, (here, there) in enumerate(zip(now["groups"], then["groups"], strict=True)):
        for name in sorted(here["options"].keys() | there["options"].keys()):
            got, expected = (each["options"].get(name) for each in (here, there))
            if got != expected:
                yield f"group {k} has {name}={got}, expected {expected}"
        if here["history"] != there["history"]:
            yield f"group {k} has had other hyperparameters in its steps"
        for i, (own, old) in enumerate(zip(here["params"], there["params"], strict=True)):
            where = f"parameter (group {k}, position {i})"
            for name in ("begins_at", "frozen_at"):
                if own.get(name) != old.get(name):
                    yield f"{where} has {name} {own.get(name)}, expected {old.get(name)}"
            if own.get("clocks") != old.get("clocks"):
                yield f"{where} has had other rows touched: its last_step is another"
            if own["sample"] != old["sample"]:
                yield f"{where} or its state has other values"


def checked_since(since: Any, groups: Sequence[GroupStep]) -> Position:
    """Return the position from which a delta counts; one that is not complete for an int."""
    if isinstance(since, bool) or not isinstance(since, (int, Mapping)):
        raise TypeError(
            f"since is a {type(since).__name__}, expected what position or save_changes returned, "
            "or a number of steps"
        )
    lazy = [group for group in groups if group.history is not None]
    if isinstance(since, int):
        if len(lazy) != 1:
            raise ValueError(
                f"since={since}, but {len(lazy)} groups are in a lazy mode and count steps: "
                "expected what position or save_changes returned"
            )
        history = lazy[0].history
        assert history is not None
        if not 0 <= since <= history.steps:
            raise ValueError(
                f"since={since}: expected 0 to {history.steps}, the steps that "
                f"group {lazy[0].index} has taken"
            )
        return {"format": FORMAT, "group": lazy[0].index, "steps": since}
    if since.get("format") != FORMAT or not isinstance(since.get("groups"), list):
        raise ValueError(
            f"since has format {since.get('format')!r}, expected what position or save_changes of "
            f"this version returned, {FORMAT}"
        )
    base = dict(since)
    if len(base["groups"]) > len(groups):
        raise ValueError(
            f"since is of an optimizer with {len(base['groups'])} groups, this one has "
            f"{len(groups)}"
        )
    for group, then in zip(groups, base["groups"], strict=False):
        _check_group_since(group, then)
    return base


def _check_group_since(group: GroupStep, then: Mapping[str, Any]) -> None:
    where = f"group {group.index}"
    if then["algorithm"] != group.options["algorithm"] or len(then["params"]) > len(group.params):
        raise ValueError(
            f"since has {len(then['params'])} parameters of {then['algorithm']} in {where}, "
            f"expected {len(group.params)} of {group.options['algorithm']}: it is another "
            "optimizer's"
        )
    for i, (p, old) in enumerate(zip(group.params, then["params"], strict=False)):
        if [list(p.shape), str(p.dtype)] != [old["shape"], old["dtype"]]:
            raise ValueError(
                f"{group.name(i)} is {p.dtype} {list(p.shape)}, but since has {old['dtype']} "
                f"{old['shape']}: after a table was resized save a full checkpoint"
            )
    if group.history is None or then["steps"] is None:
        return
    steps, loaded = group.history.steps, group.clock.loaded_at
    if then["steps"] > steps:
        raise ValueError(
            f"since is at step {then['steps']} of {where}, which has taken {steps} steps"
        )
    if then["line"] != group.clock.line and then["steps"] > loaded:
        raise ValueError(
            f"since is at step {then['steps']} of {where}, where this optimizer has not been: what "
            f"it goes on from was saved at step {loaded}. Call position(optimizer) after loading"
        )
