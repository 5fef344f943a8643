# SPDX-License-Identifier: Apache-2.0
"""Saved models and their optimizers: delta checkpoints, and reports of what was saved.

``save_changes`` writes what has changed since an earlier save, ``apply_changes`` brings it back,
and ``position`` says where an optimizer is (docs/checkpoints.md).

``checkpoint_health``, as ``python -m tiger_ext health`` calls it, reads two kinds of file:

* What ``torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)``
  writes; more entries do no harm. It is loaded with ``weights_only=True``, so that a file runs no
  code, and memory-mapped unless its tensors are compressed or it is older than torch 1.6. Lengths
  and places of everything in it are checked, the checksums of uncompressed tensors are not.
* A ``.safetensors`` file, which holds tensors only: ``model.NAME`` for each entry of the model's
  state dict, ``optimizer.state.I.NAME`` for the state NAME of the optimizer's I-th parameter, and
  in the file's metadata, under ``param_groups``, the JSON text of the optimizer's groups::

      saved = optimizer.state_dict()
      tensors = {f"model.{name}": p for name, p in model.state_dict().items()}
      for i, state in saved["state"].items():
          tensors |= {f"optimizer.state.{i}.{name}": t for name, t in state.items()}
      groups = json.dumps(saved["param_groups"], default=str)
      safetensors.torch.save_file(tensors, path, {"param_groups": groups})

The optimizer's parameters are found in the model by the ``param_names`` of its groups (it was
constructed from ``model.named_parameters()`` or ``tiger_ext.param_groups``). Without names, the
I-th parameter is the I-th floating point tensor of the model, which needs as many of the one as of
the other: buffers and frozen parameters make names necessary.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import reprlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from tiger_ext.applying import apply_changes
from tiger_ext.archive import CheckpointError, load_checked, open_regular
from tiger_ext.changes import save_changes
from tiger_ext.health import HealthReport, Table, report_on
from tiger_ext.history import MAX_STEPS
from tiger_ext.options import MOMENTS, REDUCIBLE
from tiger_ext.positions import position

__all__ = ["CheckpointError", "apply_changes", "checkpoint_health", "position", "save_changes"]

_MESSAGE_LENGTH = 300


def checkpoint_health(path: str | os.PathLike[str]) -> HealthReport:
    """Return the ``health_report`` of a saved model and optimizer.

    Args:
        path: a file as the module describes; ``.safetensors`` is told by its suffix.

    Returns:
        What ``health_report`` would say of the optimizer when it was saved, except that a table is
        not recognised by its sparse gradient, which no checkpoint has.

    Raises:
        CheckpointError: the file cannot be read, or something in it is missing or not what it is to
            be.
        MemoryError: there is not enough memory for it.
    """
    path = os.fspath(path)
    try:
        saved = _read_safetensors(path) if path.endswith(".safetensors") else load_checked(path)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except MemoryError:
        raise
    except Exception as error:  # a damaged file can raise anything
        raise CheckpointError(f"{path}: cannot be read: {_reason(error)}") from error
    try:
        return report_on(_tables(saved))
    except (CheckpointError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def _reason(error: Exception) -> str:
    """Return in one line what an exception says."""
    text = str(error)
    if isinstance(error, pickle.UnpicklingError):
        # The advice before it is for who wrote the file.
        text = text.rpartition("WeightsUnpickler error:")[2].strip()
        unknown = re.match(r"Unsupported global: GLOBAL (\S+)", text)
        if unknown:
            return f"it holds a {unknown[1]}, which torch.load(weights_only=True) refuses"
    line = next(iter(text.strip().splitlines()), "")
    return f"{type(error).__name__}: {line[:_MESSAGE_LENGTH]}"


def _read_safetensors(path: str) -> Any:
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise CheckpointError(
            "reading it needs the library safetensors, which cannot be imported: "
            f"pip install safetensors ({error})"
        ) from error
    open_regular(path).close()
    model: dict[str, Tensor] = {}
    state: dict[int, dict[str, Tensor]] = {}
    with safe_open(path, framework="pt", device="cpu") as file:
        groups = (file.metadata() or {}).get("param_groups")
        for key in file.keys():  # noqa: SIM118, it is no dict
            kind, _, rest = key.partition(".")
            if kind == "model":
                model[rest] = file.get_tensor(key)
            elif key.startswith("optimizer.state."):
                index, _, name = key.removeprefix("optimizer.state.").partition(".")
                if not (index.isascii() and index.isdecimal() and len(index) < 20):
                    raise CheckpointError(
                        f"its tensor {reprlib.repr(key)} is of parameter {reprlib.repr(index)}, "
                        "expected a number"
                    )
                state.setdefault(int(index), {})[name] = file.get_tensor(key)
    if not model:
        raise CheckpointError("no tensor in it is called 'model.<name>'")
    if groups is None:
        raise CheckpointError("its metadata have no 'param_groups'")
    try:
        read = json.loads(groups)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"its metadata 'param_groups' are no JSON: {_reason(error)}"
        ) from error
    return {"model": model, "optimizer": {"state": state, "param_groups": read}}


def _tables(saved: Any) -> list[Table]:
    """Match the optimizer's parameters with the model's tensors."""
    model = _entry(saved, "model", Mapping, "the checkpoint")
    optimizer = _entry(saved, "optimizer", Mapping, "the checkpoint")
    groups = _entry(optimizer, "param_groups", list, "its 'optimizer'")
    states = _entry(optimizer, "state", Mapping, "its 'optimizer'")
    members = [
        _entry(group, "params", list, f"group {g} of its 'optimizer'")
        for g, group in enumerate(groups)
    ]
    _check_ids(members)
    names = _names(model, groups, members)
    room = _Room()
    tables = []
    for g, (group, ids) in enumerate(zip(groups, members, strict=True)):
        options = _options(group, f"group {g} of its 'optimizer'")
        for i in ids:
            name = next(names)
            where = f"the model's {reprlib.repr(name)}"
            values = room.dense(model[name], where)
            if values.is_floating_point() and not _converts(values.dtype):
                raise _wrong(where, values, "a type that converts to float32")
            state = _state(states.get(i, {}), values, name, room)
            if "last_step" in state and "history" in options:
                _check_clock(state["last_step"], int(options["history"].split()[0]), name)
            tables.append(Table(name, values, state, options))
    return tables


def _got(value: Any) -> str:
    """Return what a value is, in a few words however large it is."""
    if isinstance(value, Tensor):
        return f"a {value.layout} tensor of {value.dtype} on {value.device}".replace("torch.", "")
    kind = type(value).__name__
    if value is None or isinstance(value, (bool, int, float, str)):
        return f"{reprlib.repr(value)} ({kind})"
    return f"a {kind}"


def _wrong(where: str, value: Any, expected: str) -> CheckpointError:
    return CheckpointError(f"{where} is {_got(value)}, expected {expected}")


def _entry(container: Any, key: str, kind: type, where: str) -> Any:
    if not isinstance(container, Mapping):
        raise _wrong(where, container, f"a dict with {key!r}")
    if key not in container:
        raise CheckpointError(f"{where} has no {key!r}, expected a {kind.__name__.lower()}")
    if not isinstance(container[key], kind):
        raise _wrong(f"{key!r} of {where}", container[key], f"a {kind.__name__.lower()}")
    return container[key]


def _check_ids(members: list[list[Any]]) -> None:
    seen = set()
    for g, ids in enumerate(members):
        for i in ids:
            where = f"a parameter in 'params' of group {g} of its 'optimizer'"
            if isinstance(i, bool) or not isinstance(i, (int, str)):
                raise _wrong(where, i, "a number or a name")
            if i in seen:
                raise CheckpointError(f"{where} is {reprlib.repr(i)} for the second time")
            seen.add(i)


def _names(
    model: Mapping[Any, Any], groups: list[Mapping[str, Any]], members: list[list[Any]]
) -> Iterator[str]:
    """Return the names of all groups' parameters in the model, one after the other."""
    names: list[str] = []
    named = 0
    for g, (group, ids) in enumerate(zip(groups, members, strict=True)):
        given = group.get("param_names")
        if given is None:
            continue
        where = f"'param_names' of group {g} of its 'optimizer'"
        if not isinstance(given, (list, tuple)):
            raise _wrong(where, given, "a list")
        if len(given) != len(ids):
            raise CheckpointError(
                f"{where} has {len(given)} names, expected {len(ids)}, one for each of its 'params'"
            )
        for name in given:
            if not isinstance(name, str):
                raise _wrong(f"a name in {where}", name, "a string")
            if not isinstance(model.get(name), Tensor):
                raise CheckpointError(
                    f"its 'model' has no tensor {reprlib.repr(name)}, which its 'optimizer' names"
                )
        names += given
        named += len(ids)
    count = sum(map(len, members))
    if named == count:
        return iter(names)
    # A tied weight stands in a state dict under each of its names, but is one parameter.
    distinct: dict[Any, str] = {}
    for name, tensor in model.items():
        if isinstance(tensor, Tensor) and _is_dense(tensor) and tensor.is_floating_point():
            if not isinstance(name, str):
                raise _wrong("a name in its 'model'", name, "a string")
            place = (tensor.data_ptr(), tensor.shape, tensor.stride()) if tensor.numel() else name
            distinct.setdefault(place, name)
    if len(distinct) != count:
        raise CheckpointError(
            f"its 'optimizer' has no 'param_names', and {count} parameters for the {len(distinct)} "
            "floating point tensors of its 'model': construct the optimizer from "
            "model.named_parameters()"
        )
    return iter(distinct.values())


def _is_dense(tensor: Tensor) -> bool:
    return (
        tensor.layout == torch.strided
        and tensor.device.type == "cpu"
        and not tensor.is_quantized
        and not tensor.is_nested
    )


def _converts(dtype: torch.dtype) -> bool:
    """Return whether numbers can be read: not those of which two share a byte."""
    try:
        torch.empty(1, dtype=dtype, device="cpu").to(torch.float32)
    except RuntimeError:
        return False
    return True


class _Room:
    """How much of each tensor's data has been taken.

    Expanded tensors and views of views may have any number of elements in a small file; what is
    read here once has no more bytes than there are.
    """

    def __init__(self) -> None:
        self._taken: dict[int, int] = {}

    def dense(self, tensor: Any, where: str) -> Tensor:
        """Return a tensor that can be read.

        Raises:
            CheckpointError: it is something else, or shares its elements.
        """
        if not isinstance(tensor, Tensor) or not _is_dense(tensor):
            raise _wrong(where, tensor, "a dense tensor on the CPU")
        if tensor.numel() == 0:
            return tensor
        data = tensor.untyped_storage()
        taken = self._taken.get(data.data_ptr(), 0) + tensor.numel() * tensor.element_size()
        if taken > data.nbytes():
            raise CheckpointError(
                f"{where} has shape {list(tensor.shape)} and strides {list(tensor.stride())}, with "
                f"which the parameters read {taken} bytes of the {data.nbytes()} that are there: "
                "expected tensors that share no elements"
            )
        self._taken[data.data_ptr()] = taken
        return tensor


def _options(group: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return what the report needs of a group."""
    options: dict[str, Any] = {
        key: _rate(group[key], f"{key!r} of {where}")
        for key in ("lr", "weight_decay")
        if key in group
    }
    for key in ("rows", "scale"):
        options[key] = group.get(key)
        if options[key] is not None and not isinstance(options[key], str):
            raise _wrong(f"{key!r} of {where}", options[key], "a string or None")
    if group.get("history") is not None:
        options["history"] = _clock(group["history"], f"'history' of {where}")
    return options


def _rate(value: Any, where: str) -> float:
    expected = "a finite number >= 0"
    number = value
    if isinstance(value, Tensor):
        real = not value.is_complex() and _converts(value.dtype)
        if not _is_dense(value) or value.numel() != 1 or not real:
            raise _wrong(where, value, expected)
        number = value.item()
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        raise _wrong(where, number, expected)
    if not 0 <= number <= torch.finfo(torch.float64).max:
        raise _wrong(where, number, expected)
    return float(number)


def _clock(history: Any, where: str) -> str:
    """Return the beginning of a history: its steps and where it begins; the rest may be long."""
    expected = "numbers, of which the first is the steps so far and the second not larger"
    if not isinstance(history, (str, list, tuple)):
        raise _wrong(where, history, expected)
    first = history.split(maxsplit=2)[:2] if isinstance(history, str) else history[:2]
    try:
        steps, begin = map(float, first)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise _wrong(where, history, expected) from error
    if not (0 <= begin <= steps <= MAX_STEPS and steps.is_integer() and begin.is_integer()):
        raise _wrong(where, history, expected)
    return f"{int(steps)} {int(begin)}"


def _state(state: Any, values: Tensor, name: str, room: _Room) -> dict[str, Tensor]:
    """Return what the report needs of a parameter's state."""
    where = f"of the parameter {reprlib.repr(name)} in its 'optimizer'"
    if not isinstance(state, Mapping):
        raise _wrong(f"the state {where}", state, "a dict")
    for moment in MOMENTS:
        if moment not in state:
            continue
        if not isinstance(state[moment], Tensor) or not _is_dense(state[moment]):
            raise _wrong(f"the state {moment} {where}", state[moment], "a dense tensor on the CPU")
        shape = state[moment].shape
        by_rows = moment in REDUCIBLE and values.dim() >= 2 and 0 < len(shape) <= values.dim()
        if shape != (values.shape[: len(shape)] if by_rows else values.shape):
            raise CheckpointError(
                f"its 'optimizer' has {moment} of shape {list(shape)} for the "
                f"model's {reprlib.repr(name)} of shape {list(values.shape)}: they do not belong "
                "together"
            )
    if "last_step" not in state:
        return {}
    last_step = room.dense(state["last_step"], f"the state last_step {where}")
    if last_step.dtype not in (torch.int32, torch.int64):
        raise _wrong(f"the state last_step {where}", last_step, "int32 or int64")
    return {"last_step": last_step}


def _check_clock(last_step: Tensor, steps: int, name: str) -> None:
    if last_step.numel() == 0:
        return
    low, high = map(int, last_step.aminmax())
    if low < -1 - steps or high > steps:
        raise CheckpointError(
            f"the state last_step of the parameter {reprlib.repr(name)} in its 'optimizer' goes "
            f"from {low} to {high}, but its group has taken {steps} steps: expected {-1 - steps} "
            f"to {steps}"
        )
