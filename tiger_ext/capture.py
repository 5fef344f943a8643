# SPDX-License-Identifier: Apache-2.0
"""Steps in a captured CUDA graph: a replay repeats the kernels, and nothing that the host did."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from tiger_ext import _native
from tiger_ext.parameters import parameter_name
from tiger_ext.rounding import counts_steps

__all__ = ["check_capture", "check_reference", "is_capturing"]


def is_capturing() -> bool:
    """Return whether a CUDA graph is being captured on the current stream."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def check_capture(
    what: str, groups: Iterable[Mapping[str, Any]], amp: Iterable[Tensor | None]
) -> None:
    """Check that replays of a step would do what the step does.

    Args:
        what: what is being captured, for messages.
        groups: the parameter groups.
        amp: GradScaler's tensors.

    Raises:
        RuntimeError: something in it needs the host at every step.
    """
    captured = f"{what} is being captured in a CUDA graph, but"
    groups = list(groups)
    for index, group in enumerate(groups):
        if not group["capturable"]:
            raise RuntimeError(f"{captured} not every parameter group has capturable=True")
        if group.get("accumulation_steps", 1) > 1:
            raise RuntimeError(
                f"{captured} group {index} has accumulation_steps="
                f"{group['accumulation_steps']}: the host counts the micro-steps, so that no "
                "replay would begin or close a window. Use accumulation_steps=1, and add up the "
                "gradients of several backward passes in .grad before the step"
            )
        if group["nonfinite"] == "raise":
            raise RuntimeError(
                f"{captured} group {index} has nonfinite='raise', for which the host waits for the "
                "GPU in every step. Use nonfinite='skip', 'shrink' or 'propagate'"
            )
        lr = group["lr"]
        if isinstance(lr, Tensor) and lr.device.type == "cpu":
            raise RuntimeError(
                f"{captured} the lr of group {index} is a tensor on the CPU, which no replay would "
                "read. Put it on the GPU of the parameters for replays to follow it, or set a "
                "number that all of them are to use"
            )
    for index, group in enumerate(groups):
        for position, p in enumerate(group["params"]):
            if p.device.type == "cpu" and (p.grad is not None or group["lazy"] != "frozen"):
                raise RuntimeError(
                    f"{captured} {parameter_name(group, index, position)} is on the CPU, where no "
                    "replay would update it. Give it to another optimizer"
                )
    if any(t is not None and t.device.type == "cpu" for t in amp):
        raise RuntimeError(
            f"{captured} grad_scale or found_inf is on the CPU, where no replay would read it"
        )


def check_reference(
    label: str, p: Tensor, group: Mapping[str, Any], amp: Iterable[Tensor | None]
) -> None:
    """Check that an update on the reference can be captured.

    Args:
        label: what messages call the parameter.
        p: the parameter, with a gradient.
        group: its group.
        amp: GradScaler's tensors.

    Raises:
        RuntimeError: the reference reads sizes or values on the host.
    """
    g = p.grad
    works = (
        g is not None
        and g.layout == torch.strided
        and group["rows"] is None
        and group.get("scale") != "rms_rows"
        and group["lazy"] == "frozen"
        and group["nonfinite"] == "propagate"
        and not counts_steps(group)
        and all(t is None for t in amp)
    )
    if not works:
        reason = "fused=False" if group["fused"] is False else "no native kernel takes it"
        if _native.C is None:
            reason = "tiger_ext's compiled module is missing"
        raise RuntimeError(
            f"{label}: the step is being captured in a CUDA graph, but this update runs on the "
            f"reference ({reason}). That works only for Tiger and Lion with strided gradients, "
            "rows=None, scale=None or 'rms', lazy='frozen', nonfinite='propagate', and without "
            "stochastic rounding and GradScaler: else the reference waits for the GPU"
        )
