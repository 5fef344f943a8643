# SPDX-License-Identifier: Apache-2.0
"""The ids that embeddings look up: their rows must be current, and a step may ask for them."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tiger_ext.capture import is_capturing

__all__ = ["TrackingHandle"]


class UsedRows:
    """Which rows of one parameter its tracked modules have read since the last step.

    Attributes:
        group: where the parameter's group stands in the optimizer.
        current: whether all rows are known to be up to date.
    """

    def __init__(self, name: str, rows: int, group: int) -> None:
        """Start with none of the ``rows`` rows of the parameter ``name`` used."""
        self.name = name
        self.rows = rows
        self.group = group
        self.current = False
        self.modules = 0
        self._ids: list[Tensor] = []
        self._captured = True  # all of them, in a CUDA graph

    def record(self, ids: Tensor) -> None:
        """Add ids of any shape and integer dtype; duplicates are fine.

        Raises:
            IndexError: an id on the CPU is no row. On a GPU, where the check would make the host
                wait, such ids are dropped.
        """
        if ids.device.type == "cpu" and ids.numel() > 0:
            for extreme in map(int, ids.aminmax()):
                if not 0 <= extreme < self.rows:
                    raise IndexError(
                        f"a tracked module of {self.name} was given the id {extreme}, out of range "
                        f"for {self.rows} rows"
                    )
        # A copy: the caller may fill its batch anew before the step.
        self._ids.append(ids.detach().reshape(-1).to(torch.int64, copy=True))
        self._captured = self._captured and is_capturing()

    def mask(self, device: torch.device) -> Tensor:
        """Return a uint8 mask ``[rows]``, 1 where a row was used."""
        # One more at each end takes the ids that are no row.
        mask = torch.zeros(self.rows + 2, dtype=torch.uint8, device=device)
        for ids in self._ids:
            mask.index_fill_(0, ids.to(device).clamp(-1, self.rows) + 1, 1)
        return mask[1 : self.rows + 1]

    def recorded_anew(self, device: torch.device) -> bool:
        """Return whether replays of the graph that is being captured record the ids anew."""
        return bool(self._ids) and self._captured and all(i.device == device for i in self._ids)

    def clear(self) -> None:
        """Forget what was recorded."""
        self._ids.clear()
        self._captured = True


class _Hook:
    """A forward pre-hook. Copies of it, in a copied or pickled model, do nothing."""

    def __init__(self, used: UsedRows | None, read: Callable[[Tensor], bool] | None) -> None:
        self._used = None if used is None else weakref.ref(used)
        self._read = read

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # An exported program reads the rows as they are; `flush` comes before.
        if not torch.compiler.is_exporting():
            self._look(module, args, kwargs)

    @torch.compiler.disable
    def _look(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        used = self._used and self._used()
        if not used or self._read is None:
            return
        ids = args[0] if args else next(iter(kwargs.values()), None)
        if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.is_complex():
            raise TypeError(
                f"{type(module).__name__} is tracked and must be called with a tensor of ids "
                f"first, got {ids.dtype if isinstance(ids, Tensor) else type(ids).__name__}"
            )
        if ids.device.type == "meta":
            return
        wanted = self._read(ids)
        if wanted and module.training and torch.is_grad_enabled():
            used.record(ids)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Hook:
        return _Hook(None, None)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Hook, (None, None)


class TrackingHandle:
    """What ``optimizer.track`` returns; ``remove()`` ends the tracking. Also a context manager."""

    def __init__(self, module: nn.Module, used: UsedRows, read: Callable[[Tensor], bool]) -> None:
        """Register the hook; ``read`` is called with the ids before the module reads their rows."""
        self._used: UsedRows | None = used
        used.modules += 1
        self._hook = module.register_forward_pre_hook(_Hook(used, read), with_kwargs=True)

    def remove(self) -> None:
        """Stop tracking. May be called twice."""
        if self._used is not None:
            self._hook.remove()
            self._used.modules -= 1
            self._used = None

    def __enter__(self) -> TrackingHandle:
        """Return the handle."""
        return self

    def __exit__(self, *exception: object) -> None:
        """End the tracking."""
        self.remove()
