# SPDX-License-Identifier: Apache-2.0
"""Loads the compiled module; without it the package still works, on the reference."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from types import ModuleType

import torch

C: ModuleType | None
#: Why the compiled module is not there, or None.
unavailable: str | None

try:
    from tiger_ext import _C as C  # type: ignore[attr-defined,no-redef]

    unavailable = None
except ImportError as error:
    C = None
    unavailable = (
        f"the compiled module tiger_ext._C cannot be loaded ({error}). Build it against the "
        f"installed torch {torch.__version__}: pip install --no-build-isolation --force-reinstall "
        "--no-deps tiger_ext"
    )
    if os.environ.get("TIGER_EXT_REQUIRE_NATIVE", "0") not in ("", "0"):
        raise ImportError(f"TIGER_EXT_REQUIRE_NATIVE is set, but {unavailable}") from error
    warnings.warn(
        f"tiger_ext: {unavailable}. Until then all optimizers run on the slow PyTorch reference.",
        RuntimeWarning,
        stacklevel=3,
    )


def has_kernels(device_type: str) -> bool:
    """Return whether this build has kernels for a type of device."""
    if C is None:
        return False
    return device_type == "cpu" or (device_type == "cuda" and bool(C.build_info()["cuda"]))


def translated(error: Exception, name: Callable[[int, int], str]) -> Exception:
    """Return the exception that users see in place of a compiled ``UpdateError``.

    Args:
        error: the compiled module's.
        name: what to call the parameter, given its group's index and its position.
    """
    kind, group, position, message = error.args
    kinds = {"index": IndexError, "nonfinite": FloatingPointError, "value": ValueError}
    return kinds.get(kind, RuntimeError)(f"{name(group, position)}: {message}")
