# SPDX-License-Identifier: Apache-2.0
"""What torch does around a step, where anybody listens."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import optimizer as torch_optimizer

from tiger_ext import _native

__all__ = ["profile_hook_step"]


def profile_hook_step(func: Callable[..., Any]) -> Callable[..., Any]:
    """As torch's, which runs the hooks and notes the step for the profiler.

    It costs as much as the step of a small tensor, so it is left out where there is neither.
    """
    observed = torch.optim.Optimizer.profile_hook_step(func)

    @functools.wraps(func)
    def step(self: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or _is_recorded() or _has_hooks(self):
            return observed(self, *args, **kwargs)
        out = func(self, *args, **kwargs)
        if _has_hooks(self):  # the closure has registered one
            for hook in itertools.chain(
                self._optimizer_step_post_hooks.values(),
                torch_optimizer._global_optimizer_post_hooks.values(),
            ):
                hook(self, (self, *args), kwargs)
        return out

    return step


def _is_recorded() -> bool:
    """Return whether a profiler or another observer listens."""
    return _native.C is None or _native.C.is_recorded()


def _has_hooks(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether anything is to be called before or after a step."""
    return bool(
        torch_optimizer._global_optimizer_pre_hooks
        or torch_optimizer._global_optimizer_post_hooks
        or optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
    )
