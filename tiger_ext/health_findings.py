# SPDX-License-Identifier: Apache-2.0
"""What a health report holds, and how it is printed, logged and drawn."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

__all__ = ["ID_LISTS", "HealthReport", "TableHealth", "printable"]

_LABEL_LENGTH = 200
ID_LISTS = ("saturated_rows", "zero_rows", "nonfinite_rows", "outlier_rows")


def _no_rows() -> Tensor:
    return torch.empty(0, dtype=torch.int64, device="cpu")


def printable(text: str) -> str:
    r"""Return text for a terminal: what is no letter, sign or space as ``repr`` shows it.

    So "\x1b" for the character that begins control sequences, "\u202e" for the mark that turns the
    direction of writing.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _label(name: str) -> str:
    """Return a name as reports print it, cut if it is very long."""
    if len(name) > _LABEL_LENGTH:
        name = f"{name[: _LABEL_LENGTH // 2]}…{name[-_LABEL_LENGTH // 2 + 1 :]}"
    return printable(name)


@dataclass(frozen=True, eq=False)
class TableHealth:
    r"""What ``health_report`` found in one table.

    A row is one index of the leading dimension (of the leading ``sparse_dim`` dimensions where
    gradient or state say so, linearised), and ``dim`` the number of its elements. Rows with a NaN
    or Inf are listed in ``nonfinite_rows`` and enter nothing else but the ages. Ids are int64
    tensors on the CPU, ascending; a row may stand in several lists.

    Attributes:
        rows: number of rows.
        dim: elements of a row.
        norm_quantiles: quantiles (keys 0.0 to 1.0) of the rows' Euclidean norms; None: no rows.
        bound_quantiles: quantiles of :math:`|\theta|\lambda` over the elements; a dense sign rule
            without gradient walks to 1. None: weight decay is 0, or no rows.
        bound_share_090: share of the elements with :math:`|\theta|\lambda \ge 0.9`; None likewise.
        bound_share_099: the same for 0.99.
        saturated_rows: ids of rows with at least half of the elements at or above 0.9.
        zero_rows: ids of rows that are all zero.
        nonfinite_rows: ids of rows with a NaN or Inf.
        outlier_rows: ids of rows whose norm is more than ``max(3, exp(10 MAD))`` times the median
            norm, MAD being the median absolute deviation of the norms' logarithms; zero rows do not
            count for median and MAD. In a table of normally distributed elements this is 3 for
            ``dim`` above about 20 and more for narrower ones; norms that spread log-normally with
            standard deviation s have their outliers at 6.7 s.
        age_p50: quantile of the steps since a row was brought up to date, over the rows that ever
            were; None: the state has no ``last_step``, or all rows are untouched.
        age_p90: likewise.
        age_p99: likewise.
        age_max: likewise.
        never_touched: number of rows that no gradient has reached; None: no ``last_step``.
        steps_to_half_bound: :math:`\ln 2 / -\ln(1 - \eta\lambda)`, the steps in which a row that
            starts at 0 and gets no gradient drifts to :math:`1/(2\lambda)` under the dense rule and
            the present learning rate. None: that is not constant (``scale``), is on a GPU, or there
            is no such number (:math:`\eta\lambda` is not in (0, 1)).
    """

    rows: int
    dim: int
    norm_quantiles: dict[float, float] | None = None
    bound_quantiles: dict[float, float] | None = None
    bound_share_090: float | None = None
    bound_share_099: float | None = None
    saturated_rows: Tensor = field(default_factory=_no_rows)
    zero_rows: Tensor = field(default_factory=_no_rows)
    nonfinite_rows: Tensor = field(default_factory=_no_rows)
    outlier_rows: Tensor = field(default_factory=_no_rows)
    age_p50: float | None = None
    age_p90: float | None = None
    age_p99: float | None = None
    age_max: int | None = None
    never_touched: int | None = None
    steps_to_half_bound: float | None = None

    def to_dict(self) -> dict[str, float]:
        """Return numbers only: quantiles as "norm_p50" and the like, of ids how many there are.

        The lowest and highest quantile are called "norm_min" and "norm_max". What is None is left
        out.
        """
        flat: dict[str, float] = {}
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(value, dict):
                prefix = each.name.removesuffix("_quantiles")
                flat.update((f"{prefix}_{_quantile_name(q)}", v) for q, v in value.items())
            elif isinstance(value, Tensor):
                flat[each.name] = len(value)
            elif value is not None:
                flat[each.name] = value
        return flat


@dataclass(frozen=True, eq=False)
class HealthReport:
    """What ``health_report`` returns; ``print`` it, log ``to_dict()``, or ``plot`` it.

    Attributes:
        tables: parameter name -> its ``TableHealth``.
    """

    tables: dict[str, TableHealth]

    def to_dict(self) -> dict[str, float]:
        """Return flat scalars "table/field", as TensorBoard and Weights & Biases take them.

        Example: ``for tag, value in report.to_dict().items(): writer.add_scalar(tag, value, step)``
        """
        return {
            f"{name}/{key}": value
            for name, table in self.tables.items()
            for key, value in table.to_dict().items()
        }

    def __str__(self) -> str:
        """Return a table with a line per parameter, and below it the first flagged ids.

        Names stand in it as a terminal may have them: control characters escaped, and no longer
        than 200 characters.
        """
        if not self.tables:
            return "no embedding tables"
        flat = {name: table.to_dict() for name, table in self.tables.items()}
        columns = [c for c in _COLUMNS if any(c[0] in table for table in flat.values())]
        lines = [["table", *(title for _, title, _ in columns)]]
        for name, values in flat.items():
            cells = (form.format(values[key]) if key in values else "-" for key, _, form in columns)
            lines.append([_label(name), *cells])
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = [
            "  ".join(
                cell.ljust(width) if i == 0 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            )
            for line in lines
        ]
        for name, table in self.tables.items():
            for key in ID_LISTS:
                ids = getattr(table, key)
                if len(ids):
                    shown = ", ".join(map(str, ids[:10].tolist()))
                    more = f" and {len(ids) - 10} more" if len(ids) > 10 else ""
                    text.append(f"{_label(name)}: {key.replace('_', ' ')}: {shown}{more}")
        return "\n".join(text)

    def plot(self, path: str | os.PathLike[str]) -> None:
        r"""Draw the quantiles of norms and of :math:`|\theta|\lambda`, and the flagged shares.

        Args:
            path: file to write; its suffix says the format, as in ``matplotlib``'s ``savefig``.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: the suffix is no format that matplotlib writes.
            OSError: the file cannot be written.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError(
                "HealthReport.plot needs matplotlib, which cannot be imported: "
                f"pip install matplotlib ({error})"
            ) from error
        figure = Figure(figsize=(13, 4), layout="constrained")
        norms, bounds, shares = figure.subplots(1, 3)
        # Between dollar signs matplotlib reads formulas.
        labels = {name: _label(name).replace("$", r"\$") for name in self.tables}
        for name, table in self.tables.items():
            label = labels[name]
            if table.norm_quantiles is not None:
                norms.plot(
                    *zip(*table.norm_quantiles.items(), strict=True), marker=".", label=label
                )
            if table.bound_quantiles is not None:
                bounds.plot(
                    *zip(*table.bound_quantiles.items(), strict=True), marker=".", label=label
                )
        norms.set(title="norm of the rows", xlabel="quantile")
        norms.set_yscale("symlog", linthresh=1e-3)
        bounds.axhline(0.9, color="gray", linestyle="--", linewidth=1)
        bounds.set(title="|θ|·λ of the elements", xlabel="quantile", ylim=(0, None))
        kinds = [*ID_LISTS, "never_touched"]
        height = 0.8 / max(len(self.tables), 1)
        for i, (name, table) in enumerate(self.tables.items()):
            values = table.to_dict()
            shares.barh(
                [k + i * height for k in range(len(kinds))],
                [values.get(kind, 0) / max(table.rows, 1) for kind in kinds],
                height,
                label=labels[name],
            )
        shares.set_yticks(
            [k + 0.4 - height / 2 for k in range(len(kinds))],
            [kind.removesuffix("_rows").replace("_", " ") for kind in kinds],
        )
        shares.invert_yaxis()
        shares.set(title="share of the rows", xlim=(0, 1))
        if self.tables:
            shares.legend()
        figure.savefig(path)


# key of TableHealth.to_dict, title, format
_COLUMNS = (
    ("rows", "rows", "{}"),
    ("dim", "dim", "{}"),
    ("norm_p50", "norm p50", "{:.4g}"),
    ("norm_p99", "p99", "{:.4g}"),
    ("norm_max", "max", "{:.4g}"),
    ("bound_p50", "|θ|λ p50", "{:.3f}"),
    ("bound_p99", "p99", "{:.3f}"),
    ("bound_share_090", "≥0.9", "{:.2%}"),
    ("bound_share_099", "≥0.99", "{:.2%}"),
    ("saturated_rows", "saturated", "{}"),
    ("zero_rows", "zero", "{}"),
    ("nonfinite_rows", "nonfinite", "{}"),
    ("outlier_rows", "outliers", "{}"),
    ("age_p50", "age p50", "{:.0f}"),
    ("age_p99", "p99", "{:.0f}"),
    ("age_max", "max", "{}"),
    ("never_touched", "never touched", "{}"),
    ("steps_to_half_bound", "steps to half bound", "{:.0f}"),
)


def _quantile_name(q: float) -> str:
    return {0.0: "min", 1.0: "max"}.get(q, f"p{round(100 * q):02d}")
