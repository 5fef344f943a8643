# SPDX-License-Identifier: Apache-2.0
"""The rows that tracked modules have used since the last step."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tiger_ext.capture import is_capturing

__all__ = ["EMBEDDINGS", "TrackedTables", "UsedRows"]

EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)


class UsedRows:
    """Which rows of one parameter its tracked modules have read since the last step.

    Attributes:
        name: what messages call the parameter.
        table: the parameter.
        rows: how many rows it had when it was tracked.
        current: whether all rows are known to be up to date.
        modules: how many handles there are.
    """

    def __init__(self, name: str, table: Tensor) -> None:
        """Start with no row used."""
        self.name = name
        self.table = table
        self.rows = _rows_of(table)
        self.current = False
        self.modules = 0
        # One more at the end takes the ids that are no row, as indices -1 and `rows`. It stays
        # where it is from step to step, so that replays of a captured forward pass write where
        # later steps look.
        self._mask: Tensor | None = None

    def check_size(self) -> None:
        """Raise RuntimeError if the table has been resized."""
        rows = _rows_of(self.table)
        if rows != self.rows:
            raise RuntimeError(
                f"{self.name} was resized: it had {self.rows} rows when it was tracked and has "
                f"{rows} now. Resize its state as well, or delete it from `optimizer.state`, then "
                "call optimizer.track(module) anew"
            )

    def take_size(self) -> None:
        """Take the table's present size; if it is another one, what was recorded is forgotten."""
        rows = _rows_of(self.table)
        if rows != self.rows:
            self.rows, self._mask, self.current = rows, None, False

    def record(self, ids: Tensor, padding: int | None = None) -> None:
        """Add ids of any shape, int32 or int64; duplicates are fine, ``padding`` is no row.

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
        mask = self._on(self.table.device)
        if ids.device != mask.device and is_capturing():
            raise RuntimeError(
                f"{self.name}: a CUDA graph is being captured, and every replay would look up the "
                f"same ids: they are on {ids.device}, the table on {mask.device}"
            )
        places = ids.reshape(-1).to(mask.device, torch.int64)
        if ids.device.type != "cpu":
            places = places.clamp(-1, self.rows)
        if padding is not None:
            places = places.masked_fill(places == padding, self.rows)
        mask.index_fill_(0, places, 1)

    def mask(self, device: torch.device) -> Tensor:
        """Return a uint8 mask ``[rows]``, 1 where a row was used; `clear` empties it."""
        return self._on(device)[: self.rows]

    def clear(self) -> None:
        """Forget what was recorded."""
        if self._mask is not None:
            self._mask.zero_()

    def _on(self, device: torch.device) -> Tensor:
        if (self._mask is None or self._mask.device != device) and is_capturing():
            raise RuntimeError(
                f"{self.name}: rows='tracked', but the CUDA graph that is being captured would "
                "empty the record of used rows in every replay, as there is none yet: call the "
                "tracked module once, in training mode, before the capture"
            )
        if self._mask is None:
            with torch.inference_mode(False):
                self._mask = torch.zeros(self.rows + 1, dtype=torch.uint8, device=device)
        elif self._mask.device != device:
            self._mask = self._mask.to(device)
        return self._mask


class TrackedTables(dict[Tensor, UsedRows]):
    """What tracked modules have recorded, by table.

    Attributes:
        whole: the parameters of at least two dimensions that are known not to be an embedding's:
            ``rows="tracked"`` does not concern them.
    """

    def __init__(self) -> None:
        """Track nothing."""
        super().__init__()
        self.whole: set[Tensor] = set()

    def add(self, used: UsedRows) -> UsedRows:
        """Return what there is for the table, else ``used``; its size is taken anew."""
        used = self.setdefault(used.table, used)
        used.take_size()
        self.whole.discard(used.table)
        return used

    def find_whole(self, groups: Iterable[dict[str, Any]]) -> None:
        """Add to ``whole`` the parameters of the groups that are no embedding's.

        None of them if nothing is tracked and no embedding is found: the embeddings are then of a
        kind that only `track` can know.
        """
        tracked = [group["params"] for group in groups if group["rows"] == "tracked"]
        params = [p for params in tracked for p in params if p.dim() >= 2]
        embeddings = {id(p) for p in _tables_of_embeddings()}
        if self or any(id(p) in embeddings for p in params):
            self.whole.update(p for p in params if p not in self and id(p) not in embeddings)


def _tables_of_embeddings() -> Iterator[Tensor]:
    """Find the weights of all embeddings that exist."""
    for thing in gc.get_objects():
        # Its type alone is asked: an attribute of a foreign object may be code.
        if not issubclass(type(thing), EMBEDDINGS):
            continue
        state = object.__getattribute__(thing, "__dict__")
        yield from _parameters_named_weight(state)


def _parameters_named_weight(state: dict[str, Any]) -> Iterator[Tensor]:
    """Find a module's weight, or what a parametrization makes it of."""
    weight = state.get("_parameters", {}).get("weight")
    if weight is not None:
        yield weight
    parametrizations = state.get("_modules", {}).get("parametrizations")
    if isinstance(parametrizations, nn.ModuleDict) and "weight" in parametrizations:
        yield from parametrizations["weight"].parameters(recurse=False)


def _rows_of(table: Tensor) -> int:
    return len(table) if table.dim() else 1
