# SPDX-License-Identifier: Apache-2.0
"""The state of embedding tables: how near to their bound, how old, which rows are wrong.

``health_report`` reads a live optimizer, ``tiger_ext.checkpoint`` a saved one; both hand
``report_on`` a list of ``Table`` and leave the arithmetic to it. Each table is read twice, in
pieces that fit ``_PIECE_ELEMENTS``: an even sample of its rows says what is typical, then
all rows are judged by it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tiger_ext.health_findings import ID_LISTS, HealthReport, TableHealth
from tiger_ext.history import History
from tiger_ext.optimizer import MixedOptimizer

__all__ = ["HealthReport", "TableHealth", "health_report"]

QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)

# Elements read at a time: some copies of them in float64 stay below 64 MiB.
_PIECE_ELEMENTS = 1 << 21
# Quantiles are exact up to this many rows (norms, ages) or elements (distances from the bound).
_SAMPLE = 1 << 20
# A matrix without other evidence is a table if it has more than this many rows per column: the
# widening matrix of a transformer's feed-forward block has 4.
_TABLE_ROWS_PER_COLUMN = 4
# "tok_emb", "embeddings", "posEmbed", but not "ensemble" or "member".
_EMBEDDING_NAME = re.compile(r"(?<![a-z])emb|embed")
# A row is an outlier from this multiple of the median norm, and of what the spread suggests.
_OUTLIER_RATIO = 3.0
_OUTLIER_SPREADS = 10.0


def health_report(optimizer: torch.optim.Optimizer) -> HealthReport:
    r"""Return what can be said about the embedding tables of an optimizer.

    A parameter is taken for a table if it is floating point, has two or more dimensions, and any of
    these holds: its gradient is sparse; its state has ``last_step``; its group has ``rows`` set or
    ``scale="rms_rows"``; its name contains "embed", or "emb" at the start of a word; it is a matrix
    with more than four times as many rows as columns. Tables are called by the names in the
    group's ``param_names``, else "group0.1": the position of the group and in it.

    Nothing is changed, no gradient is recorded, and beside the lists of ids about 64 MiB of memory
    are used (more where one row alone is larger). The quantiles 0 and 1 are exact. The others are
    exact up to 2**20 rows (norms and ages) or elements (:math:`|\theta|\lambda`) and otherwise
    those of an even sample of up to as many: every k-th row, or every k-th element with
    k prime to the row's length.

    Args:
        optimizer: a ``tiger_ext`` optimizer; others work too, as far as their groups have
            ``weight_decay`` and ``lr``. Their state and groups say nothing of tables: construct
            them from ``model.named_parameters()``.

    Returns:
        A ``HealthReport`` with a ``TableHealth`` for each table. Ages count from the group's clock,
        and where there is none from the last step that touched any row of the group.

    Raises:
        TypeError: ``optimizer`` is none.
        ValueError: a ``last_step`` does not fit its parameter; or an optimizer that is not of
            ``tiger_ext`` has no names, and no parameter is a table for another reason.

    Source of the bound: Su 2023, kexue.fm/archives/9736.
    """
    if not isinstance(getattr(optimizer, "param_groups", None), list) or not isinstance(
        getattr(optimizer, "state", None), Mapping
    ):
        raise TypeError(
            "health_report takes an optimizer, with param_groups and state; got "
            f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"
        )
    tables = []
    clocks = None
    if isinstance(optimizer, MixedOptimizer):
        clocks = optimizer._clocks.of(optimizer.param_groups, optimizer.state)
    for g, group in enumerate(optimizer.param_groups):
        if clocks is not None:
            group = {**group, "history": clocks[g].history}
        names = group.get("param_names") or [f"group{g}.{i}" for i in range(len(group["params"]))]
        for name, p in zip(names, group["params"], strict=True):
            sparse_dim = p.grad.sparse_dim() if p.grad is not None and p.grad.is_sparse else 0
            tables.append(Table(name, p, optimizer.state.get(p, {}), group, sparse_dim))
    report = report_on(tables)
    nameless = not any(group.get("param_names") for group in optimizer.param_groups)
    if tables and nameless and not report.tables and clocks is None:
        raise ValueError(
            f"no table is known among the {len(tables)} parameters of this "
            f"{type(optimizer).__module__}.{type(optimizer).__qualname__}, which is no optimizer "
            "of tiger_ext: construct it from model.named_parameters(), and tables are known by "
            "their names"
        )
    return report


@dataclass(frozen=True)
class Table:
    """A parameter, its optimizer state and its group; ``sparse_dim`` of its gradient or 0."""

    name: str
    values: Tensor
    state: Mapping[str, Any]
    group: Mapping[str, Any]
    sparse_dim: int = 0

    @property
    def is_embedding(self) -> bool:
        """Return whether the report takes this parameter; ``health_report`` says when."""
        p = self.values
        if p.dim() < 2 or not p.is_floating_point() or p.device.type == "meta":
            return False
        return (
            self.sparse_dim > 0
            or "last_step" in self.state
            or self.group.get("rows") is not None
            or self.group.get("scale") == "rms_rows"
            or _EMBEDDING_NAME.search(self.name.lower()) is not None
            or (p.dim() == 2 and p.shape[0] > _TABLE_ROWS_PER_COLUMN * p.shape[1])
        )

    @property
    def row_dims(self) -> int:
        """Return how many leading dimensions make a row."""
        if "last_step" not in self.state:
            return max(self.sparse_dim, 1)
        shape, count = self.values.shape, self.state["last_step"].numel()
        for dims in range(1, len(shape) + 1):
            if math.prod(shape[:dims]) == count:
                return dims
        raise ValueError(
            f"{self.name}: the state last_step has {count} entries, which fit no rows of a "
            f"parameter of shape {list(shape)}"
        )


@torch.no_grad()
def report_on(tables: Iterable[Table]) -> HealthReport:
    """Return the report on those of ``tables`` that are embeddings."""
    found = [table for table in tables if table.is_embedding]
    clocks: dict[int, int] = {}
    for table in found:
        clock = max(clocks.get(id(table.group), 0), _last_touch(table))
        clocks[id(table.group)] = clock
    reports: dict[str, TableHealth] = {}
    for i, table in enumerate(found):
        name = table.name if table.name not in reports else f"{table.name} ({i})"
        reports[name] = _health(table, _steps(table.group, clocks[id(table.group)]))
    return HealthReport(reports)


def _steps(group: Mapping[str, Any], otherwise: int) -> int:
    """Return how many steps a group has taken: it is known if it is in a lazy mode."""
    history = group.get("history")
    return History.of(history).steps if history else otherwise


def _last_touch(table: Table) -> int:
    last_step = table.state.get("last_step")
    return int(last_step.max()) if last_step is not None and last_step.numel() > 0 else 0


class _Rows:
    """A table as a matrix ``[rows, dim]`` that is never formed, read in pieces."""

    def __init__(self, table: Table) -> None:
        self._values = table.values.detach()
        self._leading = self._values.shape[: table.row_dims]
        self.rows = math.prod(self._leading)
        self.dim = math.prod(self._values.shape[table.row_dims :])
        double = self._values.dtype == torch.float64
        self.dtype = torch.float64 if double else torch.float32

    def magnitudes(self, step: int = 1) -> Iterator[tuple[int, Tensor]]:
        """Yield the first row and ``|θ|`` of each piece ``[some rows, dim]``, every step-th row."""
        stride = max(_PIECE_ELEMENTS // max(self.dim, 1), 1) * step
        for start in range(0, self.rows, stride):
            yield start, self._read(start, min(start + stride, self.rows), step)

    def _read(self, start: int, stop: int, step: int) -> Tensor:
        if len(self._leading) == 1:
            piece = self._values[start:stop:step]
        else:
            ids = torch.arange(start, stop, step, device=self._values.device)
            piece = self._values[torch.unravel_index(ids, self._leading)]
        count = -(-(stop - start) // step)
        return piece.reshape(count, self.dim).to(self.dtype).abs()


def _row_norms(magnitudes: Tensor, largest: Tensor) -> Tensor:
    """Return the norms as float64 on the CPU; scales ``magnitudes`` in place.

    Each row is divided by its largest element, so that no square over- or underflows.
    """
    scale = torch.where(largest > 0, largest, torch.ones_like(largest))
    norms = torch.linalg.vector_norm(magnitudes.div_(scale.unsqueeze(1)), dim=1)
    return norms.cpu().double() * scale.cpu().double()


def _typical_norms(rows: _Rows) -> Tensor:
    """Return the norms of an even sample of the finite rows."""
    norms = [torch.empty(0, dtype=torch.float64, device="cpu")]
    for _, piece in rows.magnitudes(step=-(-rows.rows // _SAMPLE)):
        largest = piece.amax(1)
        norms.append(_row_norms(piece, largest)[largest.isfinite().cpu()])
    return torch.cat(norms)


def _outlier_norm(norms: Tensor) -> float:
    """Return the norm above which a row is an outlier."""
    nonzero = norms[norms > 0].log()
    if len(nonzero) == 0:
        return math.inf
    median = nonzero.median()
    spread = _OUTLIER_SPREADS * float((nonzero - median).abs().median())
    return float(torch.exp(median + max(spread, math.log(_OUTLIER_RATIO))))


def _quantiles(sample: Tensor, low: float, high: float) -> dict[float, float] | None:
    """Return the quantiles of a sample of values whose extremes are known."""
    if len(sample) == 0:
        return None
    levels = torch.tensor(QUANTILES, dtype=torch.float64, device="cpu")
    inner = torch.quantile(sample.double(), levels).tolist()
    return dict(zip(QUANTILES, [low, *inner[1:-1], high], strict=True))


def _health(table: Table, now: int) -> TableHealth:
    rows = _Rows(table)
    decay = float(table.group.get("weight_decay", 0.0))
    values = _judge(rows, decay) if rows.rows > 0 and rows.dim > 0 else {}
    return TableHealth(
        rows=rows.rows,
        dim=rows.dim,
        **values,
        **_ages(table, now),
        steps_to_half_bound=_steps_to_half_bound(table.group, decay),
    )


def _judge(rows: _Rows, decay: float) -> dict[str, Any]:
    typical = _typical_norms(rows)
    outlier_norm = _outlier_norm(typical)
    # A stride prime to the row's length visits all columns alike.
    every = -(-rows.rows * rows.dim // _SAMPLE)
    while math.gcd(every, rows.dim) > 1:
        every += 1
    bounds = [_threshold(share, decay, rows.dtype) for share in (0.9, 0.99)]
    reached = [0, 0]
    finite_rows = 0
    norm_range, value_range = (math.inf, 0.0), (math.inf, 0.0)
    sample: list[Tensor] = []
    ids: dict[str, list[Tensor]] = {name: [] for name in ID_LISTS}
    for start, piece in rows.magnitudes():
        largest = piece.amax(1)
        finite = largest.isfinite().cpu()
        flags = {"nonfinite_rows": ~finite, "zero_rows": (largest == 0).cpu()}
        if decay > 0:
            counts = [(piece >= bound).sum(1).cpu() for bound in bounds]
            reached = [n + int(c[finite].sum()) for n, c in zip(reached, counts, strict=True)]
            flags["saturated_rows"] = finite & (2 * counts[0] >= rows.dim)
            first = -start * rows.dim % every
            elements = piece.reshape(-1)[first::every].cpu()
            places = torch.arange(first, piece.numel(), every, device="cpu")
            sample.append(elements[finite[places // rows.dim]])
            value_range = _widen(value_range, piece.amin(1).cpu()[finite], largest.cpu()[finite])
        norms = _row_norms(piece, largest)  # the piece is spent now
        norm_range = _widen(norm_range, norms[finite], norms[finite])
        flags["outlier_rows"] = finite & (norms > outlier_norm)
        finite_rows += int(finite.sum())
        for name, flag in flags.items():
            ids[name].append(flag.nonzero().squeeze(1) + start)
    found: dict[str, Any] = {name: torch.cat(each) for name, each in ids.items() if each}
    found["norm_quantiles"] = _quantiles(typical, *norm_range) if finite_rows else None
    if decay > 0 and finite_rows > 0:
        low, high = (decay * value for value in value_range)
        found["bound_quantiles"] = _quantiles(torch.cat(sample).double() * decay, low, high)
        elements_seen = finite_rows * rows.dim
        found["bound_share_090"], found["bound_share_099"] = (n / elements_seen for n in reached)
    return found


def _threshold(share: float, decay: float, dtype: torch.dtype) -> float:
    """Return the magnitude from which ``|θ|·λ`` reaches ``share``."""
    bound = share / decay if decay > 0 else math.inf
    return bound if bound <= torch.finfo(dtype).max else math.inf


def _widen(span: tuple[float, float], low: Tensor, high: Tensor) -> tuple[float, float]:
    if len(low) == 0:
        return span
    return min(span[0], float(low.min())), max(span[1], float(high.max()))


def _ages(table: Table, now: int) -> dict[str, Any]:
    if "last_step" not in table.state:
        return {}
    last_step = table.state["last_step"].detach().reshape(-1)
    never, oldest = 0, now
    for piece in last_step.split(_PIECE_ELEMENTS):
        touched = piece[piece >= 0]
        never += len(piece) - len(touched)
        if len(touched) > 0:
            oldest = min(oldest, int(touched.min()))
    found: dict[str, Any] = {"never_touched": never}
    sample = last_step[:: max(-(-len(last_step) // _SAMPLE), 1)].cpu()
    ages = (now - sample[sample >= 0].double()).clamp_(min=0)
    if len(ages) > 0:
        levels = torch.tensor((0.5, 0.9, 0.99), dtype=torch.float64, device="cpu")
        p50, p90, p99 = torch.quantile(ages, levels).tolist()
        found.update(age_p50=p50, age_p90=p90, age_p99=p99, age_max=now - oldest)
    return found


def _steps_to_half_bound(group: Mapping[str, Any], decay: float) -> float | None:
    lr = group.get("lr", 0.0)
    if group.get("scale") is not None or (isinstance(lr, Tensor) and lr.device.type != "cpu"):
        return None
    shrinkage = float(lr) * decay
    return -math.log(2.0) / math.log1p(-shrinkage) if 0.0 < shrinkage < 1.0 else None
