# SPDX-License-Identifier: Apache-2.0
"""Saved models and their optimizers, as ``python -m tiger_ext health`` reads them.

Two kinds of file:

* What ``torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)``
  writes; more entries do no harm. It is loaded with ``weights_only=True``, so that a file runs no
  code, and memory-mapped where its format allows it.
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
import zipfile
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tiger_ext.health import HealthReport, Table, report_on

__all__ = ["CheckpointError", "checkpoint_health"]

_MOMENTS = ("exp_avg", "exp_avg_sq")


class CheckpointError(Exception):
    """A file cannot be read, or lacks what the report needs; the message names file and lack."""


def checkpoint_health(path: str | os.PathLike[str]) -> HealthReport:
    """Return the ``health_report`` of a saved model and optimizer.

    Args:
        path: a file as the module describes; ``.safetensors`` is told by its suffix.

    Returns:
        What ``health_report`` would say of the optimizer when it was saved, except that a table is
        not recognised by its sparse gradient, which no checkpoint has.

    Raises:
        CheckpointError: the file cannot be read, or something is missing in it.
    """
    path = os.fspath(path)
    try:
        saved = _read_safetensors(path) if path.endswith(".safetensors") else _read_torch(path)
    except CheckpointError:
        raise
    except Exception as error:  # a damaged file can raise anything
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(
            f"{path}: cannot be read: {type(error).__name__}: {reason}"
        ) from error
    try:
        return report_on(_tables(saved))
    except (CheckpointError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def _read_torch(path: str) -> Any:
    # Files older than torch 1.6 are no zip archives and cannot be mapped.
    return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))


def _read_safetensors(path: str) -> Any:
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise CheckpointError(
            f"{path}: reading it needs the library safetensors, which cannot be imported: "
            f"pip install safetensors ({error})"
        ) from error
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
                state.setdefault(int(index), {})[name] = file.get_tensor(key)
    if not model:
        raise CheckpointError(f"{path}: no tensor in it is called 'model.<name>'")
    if groups is None:
        raise CheckpointError(f"{path}: its metadata have no 'param_groups'")
    return {"model": model, "optimizer": {"state": state, "param_groups": json.loads(groups)}}


def _tables(saved: Any) -> list[Table]:
    """Match the optimizer's parameters with the model's tensors."""
    model = _entry(saved, "model", Mapping, "the checkpoint")
    optimizer = _entry(saved, "optimizer", Mapping, "the checkpoint")
    groups = _entry(optimizer, "param_groups", list, "its 'optimizer'")
    states = _entry(optimizer, "state", Mapping, "its 'optimizer'")
    members = [_entry(group, "params", list, "a group of its 'optimizer'") for group in groups]
    names = _names(model, groups, members)
    tables = []
    for group, ids in zip(groups, members, strict=True):
        for i in ids:
            name = next(names)
            state = states.get(i, {})
            for moment in _MOMENTS:
                if moment in state and state[moment].shape != model[name].shape:
                    raise CheckpointError(
                        f"its 'optimizer' has {moment} of shape {list(state[moment].shape)} for "
                        f"the model's {name!r} of shape {list(model[name].shape)}: they do not "
                        "belong together"
                    )
            tables.append(Table(name, model[name], state, group))
    return tables


def _entry(container: Any, key: str, kind: type, where: str) -> Any:
    value = container.get(key) if isinstance(container, Mapping) else None
    if not isinstance(value, kind):
        raise CheckpointError(f"{where} has no {key!r} ({kind.__name__.lower()})")
    return value


def _names(model: Mapping[str, Any], groups: list[Any], members: list[list[Any]]) -> Any:
    """Return the names of all groups' parameters in the model, one after the other."""
    if all(
        len(group.get("param_names") or ()) == len(p)
        for group, p in zip(groups, members, strict=True)
    ):
        names = [name for group in groups for name in group.get("param_names") or ()]
        missing = [name for name in names if not isinstance(model.get(name), Tensor)]
        if missing:
            raise CheckpointError(
                f"its 'model' has no tensor {missing[0]!r}, which its 'optimizer' names"
            )
        return iter(names)
    # A tied weight stands in a state dict under each of its names, but is one parameter.
    distinct: dict[Any, str] = {}
    for name, tensor in model.items():
        if isinstance(tensor, Tensor) and tensor.is_floating_point():
            place = (tensor.data_ptr(), tensor.shape, tensor.stride()) if tensor.numel() else name
            distinct.setdefault(place, name)
    count = sum(map(len, members))
    if len(distinct) != count:
        raise CheckpointError(
            f"its 'optimizer' has no 'param_names', and {count} parameters for the {len(distinct)} "
            "floating point tensors of its 'model': construct the optimizer from "
            "model.named_parameters()"
        )
    return iter(distinct.values())
