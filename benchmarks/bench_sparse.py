# SPDX-License-Identifier: Apache-2.0
"""The optimizer step alone on row-sparse gradients, CPU: tiger_ext against torch.optim.

``.grad`` is set, ``step()`` is timed. All contenders of a cell update the same rows in turn, from
warm tables with momenta that are not zero. torch's optimizers have a table of their own where
memory allows; where they share ours, they profit from the huge pages that ours asked for.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby, product

import harness
import torch
from harness import Bar, Cell, Contender, Report, geometric_mean
from torch import Tensor
from torch.nn import Parameter
from torch.optim import SGD, Adagrad, Optimizer, SparseAdam

from tiger_ext import AdamW, Lion, Tiger

# Rows of the 26 categorical features of the Criteo Kaggle display advertising data.
CRITEO_KAGGLE = (
    1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683, 8351593, 3194, 27, 14992,
    5461306, 10, 5652, 2173, 4, 7046547, 18, 15, 286181, 105, 142572,
)  # fmt: skip
ONE_ROW = "one row"
# Smaller tables live in the last-level cache: no share of the memory's bandwidth.
OUT_OF_CACHE_BYTES = 32 << 20
_TOUCHED_BY_A_ROTATION = 256 << 20
_ROOM_FOR_TEMPORARIES = 2 << 30


@dataclass(frozen=True)
class SparseCell:
    """One cell of the matrix: ``n`` entries a step for each of the tables."""

    tables: tuple[int, ...]
    dim: int
    n: int
    ids: str
    coalesced: bool = False
    dtype: torch.dtype = torch.float32
    sign_only: bool = False

    @property
    def name(self) -> str:
        """Return a readable name."""
        one = len(self.tables) == 1
        rows = f"{self.tables[0]:.3g}".replace("e+0", "e") if one else f"{len(self.tables)} tables"
        marks = [self.ids, *(["coalesced"] if self.coalesced else [])]
        if self.dtype != torch.float32:
            marks.append(str(self.dtype).removeprefix("torch."))
        return f"{rows} x {self.dim}, n {self.n:,}, {', '.join(marks)}"

    @property
    def table_bytes(self) -> int:
        """Return the bytes of all tables, without state."""
        return sum(self.tables) * self.dim * self.dtype.itemsize

    @property
    def in_matrix(self) -> bool:
        """Return whether the geometric means count the cell.

        One-row cells do not (SparseAdam hardly does anything there), nor single entries, which are
        overhead only and have a bar of their own in bench_small_tensors.py.
        """
        return self.ids != ONE_ROW and self.n > 1

    def gradients(self, rotations: int) -> list[list[Tensor]]:
        """Return ``rotations`` lists with one sparse gradient for each table."""
        generator = torch.Generator().manual_seed(self.n)
        return [[self._gradient(rows, generator) for rows in self.tables] for _ in range(rotations)]

    def _gradient(self, rows: int, generator: torch.Generator) -> Tensor:
        ids = harness.make_ids(self.ids, rows, self.n, generator)
        values = torch.randn(self.n, self.dim, generator=generator).mul_(0.01).to(self.dtype)
        gradient = torch.sparse_coo_tensor(ids[None], values, (rows, self.dim))
        return gradient.coalesce() if self.coalesced else gradient

    def floor_bytes(self, gradients: Sequence[Sequence[Tensor]], state_tensors: int) -> int:
        """Return the bytes that a step must move, averaged over the rotations.

        ``n·D·size(g) + U·D·(2·size(θ) + 2·size(state))``, with U touched rows.
        """
        entries = sum(g._nnz() for rotation in gradients for g in rotation)
        touched = sum(len(g._indices().unique()) for rotation in gradients for g in rotation)
        numbers = entries + touched * 2 * (1 + state_tensors)
        return numbers * self.dim * self.dtype.itemsize // len(gradients)


@dataclass
class Tables:
    """Parameters with state for several optimizers that take turns on them."""

    params: list[Parameter]
    optimizers: dict[str, Optimizer] = field(default_factory=dict)

    @staticmethod
    def create(shapes: Iterable[tuple[int, int]], dtype: torch.dtype) -> Tables:
        """Allocate and write the parameters."""
        return Tables(
            [Parameter(harness.fill_random_(torch.empty(s, dtype=dtype), 0.1)) for s in shapes]
        )

    def add(
        self, name: str, optimizer: Optimizer, adopt: dict[str, list[Tensor]] | None = None
    ) -> None:
        """Add an optimizer; ``adopt`` gives it state tensors that others use as well."""
        self.optimizers[name] = optimizer
        for key, tensors in (adopt or {}).items():
            for p, tensor in zip(self.params, tensors, strict=True):
                optimizer.state[p][key] = tensor

    def state(self, name: str, key: str) -> list[Tensor]:
        """Return a state tensor of every parameter."""
        return [self.optimizers[name].state[p][key] for p in self.params]

    def set_gradients(self, gradients: Sequence[Tensor]) -> None:
        """Set ``.grad`` of every parameter."""
        for p, gradient in zip(self.params, gradients, strict=True):
            p.grad = gradient

    def one_entry_step(self, name: str) -> None:
        """Let an optimizer create its state, the way it does for its users."""
        self.set_gradients(
            [
                torch.sparse_coo_tensor([[0]], torch.ones(1, p.shape[1], dtype=p.dtype), p.shape)
                for p in self.params
            ]
        )
        self.optimizers[name].step()

    def contenders(self, gradients: Sequence[Sequence[Tensor]]) -> list[Contender]:
        """Return one contender an optimizer, that steps on ``gradients[rotation]``."""
        return [
            Contender(
                name,
                lambda _, optimizer=optimizer: optimizer.step(),
                lambda i: self.set_gradients(gradients[i]),
            )
            for name, optimizer in self.optimizers.items()
        ]


def _fill_state(tensors: Iterable[Tensor], *, positive: bool = False) -> list[Tensor]:
    scale = 1e-4 if positive else 1e-3
    return [harness.fill_random_(t, scale, positive=positive) for t in tensors]


def add_tiger(tables: Tables) -> list[Tensor]:
    """Add Tiger; return its momentum, written."""
    tables.add("Tiger", Tiger(tables.params, lr=1e-4))
    tables.one_entry_step("Tiger")
    return _fill_state(tables.state("Tiger", "exp_avg"))


def add_sign_only(tables: Tables) -> None:
    """Add the optimizers with at most one state tensor."""
    momentum = add_tiger(tables)
    tables.add("Lion", Lion(tables.params, lr=1e-4), {"exp_avg": momentum})
    tables.add("torch SGD", SGD(tables.params, lr=1e-4))


def add_ours(tables: Tables, second_moment: list[Tensor] | None = None) -> list[Tensor]:
    """Add Tiger, Lion and AdamW; return the momentum that they share."""
    momentum = add_tiger(tables)
    tables.add("Lion", Lion(tables.params, lr=1e-4), {"exp_avg": momentum})
    state = {"exp_avg": momentum}
    if second_moment is not None:
        state["exp_avg_sq"] = second_moment
    tables.add("AdamW", AdamW(tables.params, lr=1e-4), state)
    tables.one_entry_step("AdamW")
    _fill_state(tables.state("AdamW", "exp_avg_sq"), positive=True)
    for step in tables.state("AdamW", "step"):
        step.fill_(1000)
    return momentum


def add_torch(tables: Tables, adagrad: Adagrad, momentum: list[Tensor]) -> None:
    """Add torch's SGD, ``adagrad``, and SparseAdam with Adagrad's sum as its second moment."""
    tables.add("torch SGD", SGD(tables.params, lr=1e-4))
    tables.add("torch Adagrad", adagrad)
    state = {"exp_avg": momentum, "exp_avg_sq": tables.state("torch Adagrad", "sum")}
    sparse_adam = SparseAdam(tables.params, lr=1e-4)
    tables.add("torch SparseAdam", sparse_adam, state)
    for p in tables.params:
        sparse_adam.state[p]["step"] = 1000


def create_shared(tables: Tables) -> Tables:
    """Add all optimizers to one set of parameters, momenta and second moments."""
    adagrad = Adagrad(tables.params, lr=1e-4)
    momentum = add_ours(tables, [adagrad.state[p]["sum"] for p in tables.params])
    add_torch(tables, adagrad, momentum)
    return tables


def create_tables(cell: SparseCell) -> tuple[str, list[Tables]] | None:
    """Return tables with all optimizers that memory allows; None where it allows none.

    Returns:
        "own": two sets, ours and torch's, of three table sizes each; or "shared": one set of three;
        or "sign only": one set of two, for the optimizers with at most one state tensor.
    """

    def create() -> Tables:
        return Tables.create([(rows, cell.dim) for rows in cell.tables], cell.dtype)

    copies = (0.9 * harness.available_bytes() - _ROOM_FOR_TEMPORARIES) / cell.table_bytes
    if copies >= 6 and not cell.sign_only:
        ours, theirs = create(), create()
        add_ours(ours)
        adagrad = Adagrad(theirs.params, lr=1e-4)
        _fill_state((adagrad.state[p]["sum"] for p in theirs.params), positive=True)
        add_torch(theirs, adagrad, _fill_state(torch.empty_like(p) for p in theirs.params))
        return "own", [ours, theirs]
    if copies >= 3 and not cell.sign_only:
        return "shared", [create_shared(create())]
    if copies >= 2:
        tables = create()
        add_sign_only(tables)
        return "sign only", [tables]
    return None


# ----------------------------------------------------------------------------------- the matrix


def _cells(
    rows: Iterable[int], dims: Iterable[int], n: Iterable[int], ids: Iterable[str]
) -> list[SparseCell]:
    return [SparseCell((r,), d, k, i) for r, d, k, i in product(rows, dims, n, ids)]


def quick_matrix() -> list[SparseCell]:
    return [
        *_cells([10**5, 10**6], [16, 64], [8192], ["uniform", "zipf 1.05"]),
        *_cells([10**6], [64], [1, 65536], ["uniform"]),
        *_cells([10**6], [64], [65536], ["zipf 1.05", "zipf 1.15", ONE_ROW]),
        SparseCell((10**6,), 64, 65536, "uniform", dtype=torch.bfloat16),
        SparseCell(tuple(min(r, 10**5) for r in CRITEO_KAGGLE), 16, 1024, "zipf 1.05"),
    ]


def real_shapes() -> list[SparseCell]:
    """Return what does not fit the grid: an LLM's vocabulary, other dtypes, many tables."""
    million = (10**6,)
    return [
        *_cells([128_000], [4096], [8192], ["uniform", "zipf 1.05"]),
        *(SparseCell((128_000,), 4096, 65536, i, sign_only=True) for i in ("uniform", "zipf 1.05")),
        *(SparseCell(million, 64, 65536, i, coalesced=True) for i in ("uniform", "zipf 1.05")),
        *(
            SparseCell(million, dim, 65536, ids, dtype=torch.bfloat16)
            for dim in (64, 128)
            for ids in ("uniform", "zipf 1.05")
        ),
        *(SparseCell(CRITEO_KAGGLE, 16, 8192, ids) for ids in ("uniform", "zipf 1.05")),
    ]


def default_matrix() -> list[SparseCell]:
    rows, dims = [10**5, 10**6, 10**7], [16, 64, 128]
    return [
        *_cells(rows, dims, [1], ["uniform"]),
        *_cells(rows, dims, [8192], ["uniform", "zipf 1.05"]),
        *_cells(rows, dims, [65536], ["uniform", "zipf 1.05", "zipf 1.15", ONE_ROW]),
        *_cells(rows, dims, [262144], ["uniform", "zipf 1.05"]),
        *_cells([10**6], [16, 64], [1 << 20], ["uniform", "zipf 1.05"]),
        *real_shapes(),
    ]


def full_matrix() -> list[SparseCell]:
    ids = ["uniform", "zipf 0.8", "zipf 1.05", "zipf 1.15", ONE_ROW]
    n = [0, 1, 8192, 65536, 262144, 1 << 20]
    grid = _cells([10**5, 10**6, 10**7, 10**8], [16, 64, 128], n, ids)
    wide = _cells([262_144], [5376], [8192], ["uniform", "zipf 1.05"])
    hashed = _cells([40 * 10**6], [128], [8192 * 26], ["zipf 1.05"])
    return [*grid, *wide, *hashed, *real_shapes()]


def measure_matrix(cells: Iterable[SparseCell], report: Report) -> dict[SparseCell, Cell]:
    """Time every cell that fits into memory."""

    def same_tables(cell: SparseCell) -> tuple:
        return cell.table_bytes, cell.tables, cell.dim, str(cell.dtype), cell.sign_only

    results: dict[SparseCell, Cell] = {}
    ordered = harness.progress(sorted(cells, key=same_tables), "matrix")
    for _, group in groupby(ordered, key=same_tables):
        tables = None
        for cell in group:
            tables = tables or create_tables(cell)
            if tables is None:
                report.note(f"{cell.name} left out: too large for the memory of this machine")
                continue
            results[cell] = _measure(cell, *tables, report)
    return results


def _rotations(floor_bytes: int) -> int:
    """Return how many gradients to rotate so that the rows in turn do not stay in a cache."""
    return max(2, min(32, math.ceil(_TOUCHED_BY_A_ROTATION / max(floor_bytes, 1))))


def _measure(cell: SparseCell, mode: str, tables: Sequence[Tables], report: Report) -> Cell:
    at_most = (cell.n * len(cell.tables)) * cell.dim * cell.dtype.itemsize * 5
    gradients = cell.gradients(_rotations(at_most))
    race = harness.alternate(
        [contender for t in tables for contender in t.contenders(gradients)],
        len(gradients),
        budget=0.2 if report.args.quick else 1.0,
        min_rounds=3 if at_most > 512 << 20 else 5,
    )
    floor = cell.floor_bytes(gradients, state_tensors=1)
    return report.add(
        cell.name,
        race,
        "Tiger",
        floor_bytes=floor,
        floor_share=report.floor_share(floor, race.timings["Tiger"]),
        in_geometric_means=cell.in_matrix,
        tables=mode,
    )


# ------------------------------------------------------------------------------ growth and skew


def measure_growth(report: Report, rows: Sequence[int] = (10**6, 10**8)) -> float:
    """Return the time on the last number of rows over that on the first: same n, D = 16."""
    n, dim = 65536, 16
    if 0.9 * harness.available_bytes() < 2 * 4 * dim * sum(rows) + (1 << 30):
        report.note(f"growth to {rows[-1]:,} rows left out: too large for this machine's memory")
        return math.nan
    contenders = []
    for r in rows:
        cell = SparseCell((r,), dim, n, "uniform")
        tables = Tables.create([(r, dim)], torch.float32)
        add_tiger(tables)
        gradients = cell.gradients(16)
        (tiger,) = tables.contenders(gradients)
        contenders.append(replace(tiger, name=f"Tiger, 1e{round(math.log10(r))} rows"))
    race = harness.alternate(contenders, 16, budget=2.0)
    small, large = (c.name for c in contenders)
    report.add(f"growth, D {dim}, n {n:,}, uniform", race, small)
    ratio = race.ratio(large, small)
    return ratio.median if ratio else math.nan


def measure_skew(report: Report) -> float:
    """Return the largest time on skewed ids over that on uniform ids, all in turn on one table."""
    shapes = [(64, 65536), (16, 262144), (128, 65536)]
    kinds = ("uniform", "zipf 1.05", "zipf 1.15", ONE_ROW)
    ratios = []
    for dim, n in harness.progress(shapes[:1] if report.args.quick else shapes, "skew"):
        tables = Tables.create([(10**6, dim)], torch.float32)
        add_tiger(tables)
        contenders = []
        for kind in kinds:
            gradients = SparseCell((10**6,), dim, n, kind).gradients(4)
            (tiger,) = tables.contenders(gradients)
            contenders.append(replace(tiger, name=f"Tiger, {kind}"))
        race = harness.alternate(contenders, 4, budget=0.2 if report.args.quick else 2.0)
        uniform = contenders[0].name
        report.add(f"skew, 1e6 x {dim}, n {n:,}", race, uniform)
        # A ratio of the report is how many times slower than uniform the skewed ids are.
        ratios += [ratio.median for ratio in race.ratios_to(uniform).values()]
    return max(ratios)


# --------------------------------------------------------------------------------- verification


def verify() -> None:
    """Check AdamW against SparseAdam, which is the same mathematics, and Tiger and Lion against
    their reference, on gradients with duplicate rows."""
    cell = SparseCell((500,), 24, 2000, "zipf 1.05")
    gradients = [g for (g,) in cell.gradients(4)]
    for optimizer in (Tiger, Lion):
        harness.check_against_reference(optimizer, (500, 24), gradients)
    start = torch.randn(500, 24)
    ours, theirs = Parameter(start.clone()), Parameter(start.clone())
    # The two add epsilon in different places.
    pair = AdamW([ours], lr=0.01, eps=1e-30), SparseAdam([theirs], lr=0.01, eps=1e-30)
    for gradient in gradients:
        for p, optimizer in zip((ours, theirs), pair, strict=True):
            p.grad = gradient
            optimizer.step()
    harness.check_close("AdamW against SparseAdam", ours, theirs, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------- the bars


def _ratios(cells: dict[SparseCell, Cell], peer: str, ours: str) -> list[float]:
    pairs = (result.race.ratio(peer, ours) for cell, result in cells.items() if cell.in_matrix)
    return [ratio.median for ratio in pairs if ratio is not None]


def _floor_share(cells: dict[SparseCell, Cell], ids: str, dims: range) -> float:
    """Return the geometric mean over float32 cells of at least 65,536 entries, out of cache."""

    def counts(cell: SparseCell) -> bool:
        wanted = cell.ids.startswith(ids) and cell.dim in dims and cell.n >= 65536
        large = cell.table_bytes >= OUT_OF_CACHE_BYTES and cell.dtype == torch.float32
        return wanted and large and cell.in_matrix and not cell.coalesced

    return geometric_mean(r.figures["floor_share"] for cell, r in cells.items() if counts(cell))


def bars(cells: dict[SparseCell, Cell], growth: float, skew: float) -> list[Bar]:
    adam, sgd = (_ratios(cells, peer, "Tiger") for peer in ("torch SparseAdam", "torch SGD"))
    narrow, wide = range(64, 4096), range(4096, 4097)

    def mean(peer: str, ours: str) -> float:
        return geometric_mean(_ratios(cells, peer, ours))

    def share(ids: str, dims: range) -> float:
        return _floor_share(cells, ids, dims)

    return [
        Bar("Tiger vs SparseAdam, geometric mean", geometric_mean(adam), 12, 20),
        Bar("Tiger vs SparseAdam, worst cell", min(adam, default=math.nan), 5, 10),
        Bar("Tiger vs sparse SGD, geometric mean", geometric_mean(sgd), 1.3, 2.5),
        Bar("Tiger vs sparse SGD, worst cell", min(sgd, default=math.nan)),
        Bar("Tiger vs Adagrad, geometric mean", mean("torch Adagrad", "Tiger")),
        Bar("Lion vs SparseAdam, geometric mean", mean("torch SparseAdam", "Lion")),
        Bar("AdamW vs SparseAdam, geometric mean", mean("torch SparseAdam", "AdamW"), 8, 15),
        Bar("floor share, uniform, D >= 64", share("uniform", narrow), 0.35, 0.6),
        Bar("floor share, Zipf, D >= 64", share("zipf", narrow), 0.2, 0.4),
        Bar("floor share, D = 4096", share("", wide), 0.85, 0.95),
        Bar("time, 1e8 rows over 1e6 rows", growth, 2, 1.3, at_most=True),
        Bar("time, Zipf or one row over uniform, worst", skew, 1, at_most=True),
    ]


def _options(parser: argparse.ArgumentParser) -> None:
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--full", action="store_true", help="the whole matrix; an hour")
    choice.add_argument("--growth", action="store_true", help="only the growth to 1e8 rows")


def main() -> None:
    args = harness.parse_arguments(__doc__, _options)
    verify()
    report = Report("bench_sparse", "Row-sparse optimizer step on the CPU", args)
    cells: dict[SparseCell, Cell] = {}
    skew = growth = math.nan
    if not args.growth:
        matrix = quick_matrix() if args.quick else full_matrix() if args.full else default_matrix()
        cells = measure_matrix(matrix, report)
        skew = measure_skew(report)
    if args.growth or not args.quick:
        growth = measure_growth(report)
    report.finish(bars(cells, growth, skew))


if __name__ == "__main__":
    main()
