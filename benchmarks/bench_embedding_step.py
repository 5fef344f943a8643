# SPDX-License-Identifier: Apache-2.0
"""Forward, backward and step of an embedding on the CPU: tiger_ext and torch against FBGEMM.

FBGEMM's table-batched embedding updates inside its backward, so that only the three together can
be compared. Lookups are summed in bags; bags of one use ``nn.Embedding``. The gradient of the
output is fixed and random, the same for all. FBGEMM's bounds check is switched off.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import bench_sparse
import harness
import torch
from bench_sparse import Tables
from harness import Bar, Cell, Contender, Report, geometric_mean
from torch import Tensor, nn
from torch.optim import SGD, Adagrad

ADAGRAD, ROWWISE_ADAGRAD, FBGEMM_SGD = "FBGEMM Adagrad", "FBGEMM row-wise Adagrad", "FBGEMM SGD"
_FBGEMM_OPTIMIZERS = {
    ADAGRAD: "EXACT_ADAGRAD",
    ROWWISE_ADAGRAD: "EXACT_ROWWISE_ADAGRAD",
    FBGEMM_SGD: "EXACT_SGD",
}
_LR = 1e-3
_EPS = 1e-10
# Ours and torch's share parameter, momentum and second moment; FBGEMM's have 2 + 1 + 1 tables.
_TABLE_COPIES = 7


@dataclass(frozen=True)
class EmbeddingCell:
    """``n`` lookups in a table ``[rows, dim]``, in bags of ``bag`` lookups."""

    rows: int
    dim: int
    n: int
    bag: int
    ids: str

    @property
    def name(self) -> str:
        """Return a readable name."""
        shape = f"1e{round(math.log10(self.rows))} x {self.dim}"
        return f"{shape}, n {self.n:,} in bags of {self.bag}, {self.ids}"


@dataclass(frozen=True)
class Lookup:
    """The input of a step: ids ``[n]``, offsets ``[bags + 1]``, output gradient ``[bags, dim]``."""

    ids: Tensor
    offsets: Tensor
    output_grad: Tensor

    @staticmethod
    def draw(cell: EmbeddingCell, rotations: int) -> list[Lookup]:
        """Draw inputs for a cell."""
        generator = torch.Generator().manual_seed(cell.n + cell.bag)
        offsets = torch.arange(0, cell.n + 1, cell.bag)
        return [
            Lookup(
                harness.make_ids(cell.ids, cell.rows, cell.n, generator),
                offsets,
                torch.randn(len(offsets) - 1, cell.dim, generator=generator).mul_(0.01),
            )
            for _ in range(rotations)
        ]


Forward = Callable[[Lookup], Tensor]


def torch_forward(weight: nn.Parameter, bag: int) -> Forward:
    """Return the forward of ``nn.Embedding`` (bags of one) or ``nn.EmbeddingBag``, sparse."""
    if bag == 1:
        embedding = nn.Embedding(*weight.shape, sparse=True, _weight=weight.detach())
        embedding.weight = weight
        return lambda lookup: embedding(lookup.ids)
    embedding_bag = nn.EmbeddingBag(
        *weight.shape, mode="sum", sparse=True, include_last_offset=True, _weight=weight.detach()
    )
    embedding_bag.weight = weight
    return lambda lookup: embedding_bag(lookup.ids, lookup.offsets)


def fbgemm_module(name: str, rows: int, dim: int) -> Any:
    """Return FBGEMM's table-batched embedding with one table and the named optimizer.

    Raises:
        ImportError: fbgemm_gpu is not installed, or was built for another torch.
    """
    import fbgemm_gpu.split_table_batched_embeddings_ops_training as training
    from fbgemm_gpu import split_table_batched_embeddings_ops_common as common
    from fbgemm_gpu.split_embedding_configs import EmbOptimType

    return training.SplitTableBatchedEmbeddingBagsCodegen(
        [(rows, dim, common.EmbeddingLocation.HOST, training.ComputeDevice.CPU)],
        optimizer=getattr(EmbOptimType, _FBGEMM_OPTIMIZERS[name]),
        learning_rate=_LR,
        eps=_EPS,
        pooling_mode=common.PoolingMode.SUM,
        bounds_check_mode=common.BoundsCheckMode.NONE,
        device="cpu",
    )


def load_fbgemm(report: Report) -> list[str]:
    """Return which FBGEMM contenders run here; the reason why not goes to the report."""
    names = list(_FBGEMM_OPTIMIZERS)
    try:
        for name in names:
            fbgemm_module(name, 8, 4)
    except Exception as error:
        report.note(
            f"FBGEMM left out: {harness.one_line(error)} "
            "(pip install fbgemm-gpu-cpu, the version that was built for the installed torch)"
        )
        return []
    return names


# ----------------------------------------------------------------------------------- contenders


def torch_contenders(tables: Tables, bag: int, lookups: Sequence[Lookup]) -> list[Contender]:
    """Return forward, backward and step with every optimizer, and one without a step."""
    (weight,) = tables.params
    forward = torch_forward(weight, bag)

    def contender(name: str, step: Callable[[], object]) -> Contender:
        def run(rotation: int) -> None:
            lookup = lookups[rotation]
            forward(lookup).backward(lookup.output_grad)
            step()
            weight.grad = None

        return Contender(name, run)

    steps = {name: optimizer.step for name, optimizer in tables.optimizers.items()}
    return [contender(n, s) for n, s in {**steps, "no step": lambda: None}.items()]


def fbgemm_contenders(
    names: Iterable[str], weight: Tensor, lookups: Sequence[Lookup]
) -> list[Contender]:
    """Return forward and backward, with the update inside, of every FBGEMM optimizer."""

    def contender(name: str) -> Contender:
        module = fbgemm_module(name, *weight.shape)
        module.split_embedding_weights()[0].copy_(weight)
        for states in module.split_optimizer_states():
            for state in states:
                harness.fill_random_(state, 1e-4, positive=True)

        def run(rotation: int) -> None:
            lookup = lookups[rotation]
            module(lookup.ids, lookup.offsets).backward(lookup.output_grad)

        return Contender(name, run)

    with torch.no_grad():
        return [contender(name) for name in names]


def measure(cell: EmbeddingCell, fbgemm: list[str], report: Report) -> None:
    """Time a cell, unless it is too large for the memory."""
    table_bytes = 4 * cell.rows * cell.dim
    if _TABLE_COPIES * table_bytes + (1 << 30) > 0.95 * harness.available_bytes():
        report.note(f"{cell.name} left out: too large for the memory of this machine")
        return
    rotations = 4
    lookups = Lookup.draw(cell, rotations)
    tables = bench_sparse.create_shared(Tables.create([(cell.rows, cell.dim)], torch.float32))
    race = harness.alternate(
        [
            *torch_contenders(tables, cell.bag, lookups),
            *fbgemm_contenders(fbgemm, tables.params[0].detach(), lookups),
        ],
        rotations,
        budget=0.3 if report.args.quick else 4.0,
    )
    report.add(cell.name, race, "Tiger")


# --------------------------------------------------------------------------------- verification


def verify(fbgemm: list[str]) -> None:
    """Check that torch and FBGEMM agree: the forward, and a step of SGD and of Adagrad."""
    bench_sparse.verify()
    for bag in (1, 8):
        cell = EmbeddingCell(300, 16, 512, bag, "zipf 1.05")
        (lookup,) = Lookup.draw(cell, 1)
        start = torch.randn(cell.rows, cell.dim)
        for name, make in ((FBGEMM_SGD, SGD), (ADAGRAD, Adagrad)):
            if name not in fbgemm:
                continue
            module = fbgemm_module(name, cell.rows, cell.dim)
            table = module.split_embedding_weights()[0].detach()
            table.copy_(start)
            weight = nn.Parameter(start.clone())
            options = {"eps": _EPS} if make is Adagrad else {}
            optimizer = make([weight], lr=_LR, **options)
            ours, theirs = torch_forward(weight, bag)(lookup), module(lookup.ids, lookup.offsets)
            harness.check_close(f"forward against {name}", ours, theirs, rtol=1e-5, atol=1e-5)
            ours.backward(lookup.output_grad)
            optimizer.step()
            theirs.backward(lookup.output_grad)
            harness.check_close(f"torch against {name}", weight, table, rtol=1e-5, atol=1e-6)


# ----------------------------------------------------------------------------------------- main


def cells(quick: bool) -> list[EmbeddingCell]:
    ids = ("uniform", "zipf 1.05")
    if quick:
        return [EmbeddingCell(10**5, 64, 8192, bag, i) for bag in (1, 16) for i in ids]
    grid = [(10**6, 64, 1), (10**6, 64, 16), (10**5, 64, 16), (10**6, 128, 16), (10**7, 64, 16)]
    return [
        *(EmbeddingCell(rows, dim, 65536, bag, i) for rows, dim, bag in grid for i in ids),
        EmbeddingCell(10**6, 64, 8192, 1, "uniform"),
        EmbeddingCell(10**6, 16, 262_144, 16, "uniform"),
    ]


def bars(measured: Sequence[Cell]) -> list[Bar]:
    def ratios(peer: str, ours: str = "Tiger") -> list[float]:
        pairs = (cell.race.ratio(peer, ours) for cell in measured)
        return [ratio.median for ratio in pairs if ratio is not None]

    def mean(peer: str, ours: str = "Tiger") -> float:
        return geometric_mean(ratios(peer, ours))

    def worst(peer: str) -> float:
        return min(ratios(peer), default=math.nan)

    return [
        Bar("Tiger vs FBGEMM Adagrad, geometric mean", mean(ADAGRAD), 2, 4),
        Bar("Tiger vs FBGEMM Adagrad, worst cell", worst(ADAGRAD), 1.3, 2),
        Bar("Tiger vs FBGEMM row-wise Adagrad, geometric mean", mean(ROWWISE_ADAGRAD), 0.7, 1.2),
        Bar("Tiger vs FBGEMM row-wise Adagrad, worst cell", worst(ROWWISE_ADAGRAD)),
        Bar("Tiger vs FBGEMM SGD, geometric mean", mean(FBGEMM_SGD)),
        Bar("AdamW vs FBGEMM Adagrad, geometric mean", mean(ADAGRAD, "AdamW")),
        Bar("Tiger vs torch SparseAdam, geometric mean", mean("torch SparseAdam")),
        Bar("share of the time that is not Tiger's step", mean("no step")),
    ]


def main() -> None:
    args = harness.parse_arguments(__doc__)
    claim = "Forward, backward and step of an embedding on the CPU"
    report = Report("bench_embedding_step", claim, args)
    fbgemm = load_fbgemm(report)
    verify(fbgemm)
    for cell in harness.progress(cells(args.quick), "embedding"):
        measure(cell, fbgemm, report)
    report.finish(bars(report.cells))


if __name__ == "__main__":
    main()
