# SPDX-License-Identifier: Apache-2.0
"""A small transformer with a hashed n-gram memory: what its rows bring, and what they cost.

    python examples/ngram_memory.py                          held-out loss against rows
    python examples/ngram_memory.py --rows 1e6 --workers 2   two processes on one table
    python examples/ngram_memory.py --compare                ten ways to store table and state
    python examples/ngram_memory.py --smoke                  seconds, to see that everything runs

The text is that of examples/next_token.py: torch's own sources. At each position the last two and
the last three tokens are hashed, twice each, to four rows of one table, as in the n-gram memories
of large language models; their 64 numbers, projected, are added to the token's embedding. The
table comes from ``tiger_ext.empty_table``: zeros whose memory exists once it is written. One
optimizer steps on everything, Tiger on the dense weights and what ``--state`` says on the table;
the table's gradient is sparse, so that a step costs what the batch touches.

With several workers the table and its state are shared: each worker steps on its rows when it has a
gradient, without locks, and of two updates of an element at once one may be lost. The dense weights
are copies, whose gradients are averaged in each step, as ``DistributedDataParallel`` does. Each
worker takes its part of ``--batch``, so all runs take as many steps and see as many tokens.

Each run is made in a process of its own, a thread a worker, and its memory is that process's (of
several workers the sum of their shares). The learning rates are the best of three to five trials
each, a factor of two or three apart, on the validation files, which are neither trained on nor held
out (AdamW by element takes that of AdamW by row); a search like that of examples/next_token.py has
not been made.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import corpus as corpus_module
import torch
import torch.distributed as dist
import torch.multiprocessing
import torch.nn.functional as F
from torch import Tensor, nn

import tiger_ext

try:
    from tqdm import tqdm
except ModuleNotFoundError as error:
    if error.name != "tqdm":
        raise
    sys.exit(f"The demo needs {error.name}: pip install 'tiger_ext[demo]'")

ORDERS = (2, 3)
HEADS = 2  # hashes of each order, so that two n-grams seldom share all their rows
REACH = max(ORDERS) - 1  # tokens before the first position that its n-grams begin with
WIDTH, LAYERS = 64, 2
DENSE_LR, DENSE_WEIGHT_DECAY, BETA = 2e-3, 0.01, 0.9
# As in the large models the table has no weight decay.
SIGN_LR, ADAMW_LR, ADAGRAD_LR = 0.12, 0.01, 0.2
# What a table's optimizer group may keep, by the name that --state gives it.
STATES: dict[str, dict[str, Any]] = {
    "float32": {"lr": SIGN_LR, "momentum_dtype": torch.float32},
    "bfloat16": {"lr": SIGN_LR, "momentum_dtype": torch.bfloat16},
    "int8": {"lr": SIGN_LR, "momentum_dtype": torch.int8},
    "element": {
        "algorithm": "adamw",
        "lr": ADAMW_LR,
        "betas": (0.0, 0.99),
        "momentum_dtype": torch.float32,  # of the second moment too
    },
    "row": {
        "algorithm": "adamw",
        "lr": ADAMW_LR,
        "betas": (0.0, 0.99),
        "second_moment": "row",
    },
    "adagrad": {"lr": ADAGRAD_LR},  # see RowwiseAdagrad
}
# The steps that allocate; they do not count in the medians.
WARM_UP_STEPS = 5
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
MIB = 2**20


@dataclass(frozen=True)
class Setting:
    """One run.

    Attributes:
        rows: of the table; 0: no memory.
        workers: processes that train it.
        dtype: of the table: "bfloat16" or "float32".
        state: a key of ``STATES``.
        rounding: of the table: "stochastic" or "nearest".
        steps: of each worker.
        batch: windows a step, of all workers together.
        context: positions a window.
        dim: numbers a row.
        classes: tokens that the transformer tells apart: the most frequent, the last for all
            others. The memory hashes all tokens.
        test_windows: windows that the loss is measured on.
        split: of the files: "held-out" or "validation".
        seed: of weights and batches.
        files: source files that are read; None: all.
        cache: folder for the tokens.
        lr: of the table; None: that of its state in ``STATES``.
    """

    rows: int
    workers: int
    dtype: str
    state: str
    rounding: str
    steps: int
    batch: int
    context: int
    dim: int
    classes: int
    test_windows: int
    split: str
    seed: int
    files: int | None
    cache: Path
    lr: float | None


class Memory(nn.Module):
    """Rows of a table for the n-grams that end at each position.

    Args:
        table: ``[rows, dim]``; every hash has an equal part of the rows to itself.
        vocabulary: number of distinct tokens.
    """

    def __init__(self, table: Tensor, vocabulary: int) -> None:
        """See the class."""
        super().__init__()
        self.table = nn.Parameter(table)
        self.vocabulary = vocabulary
        self.rows = len(table) // (len(ORDERS) * HEADS)
        generator = torch.Generator().manual_seed(1)
        shape = (len(ORDERS), HEADS, 1, 1)
        odd = torch.randint(-(2**62), 2**62, shape, generator=generator) * 2 + 1
        self.register_buffer("multipliers", odd)
        first = torch.arange(len(ORDERS) * HEADS) * self.rows
        self.register_buffer("first", first.view(shape))

    def ids(self, tokens: Tensor) -> Tensor:
        """Return row ids ``[orders, heads, batch, length]`` of ``[batch, REACH + length]``."""
        length = tokens.shape[1] - REACH
        grams = []
        for order in ORDERS:
            key = torch.zeros_like(tokens[:, :length])
            for back in range(order - 1, -1, -1):
                key = key * self.vocabulary + tokens[:, REACH - back :][:, :length]
            grams.append(key)
        # Multiplicative hashing, modulo 2**64; the high bits are the well-mixed ones.
        hashed = (torch.stack(grams)[:, None] * self.multipliers >> 20) % self.rows
        return hashed + self.first

    def forward(self, tokens: Tensor) -> Tensor:
        """Return ``[batch, length, orders * heads * dim]`` in float32."""
        rows = F.embedding(self.ids(tokens), self.table, sparse=True)
        return rows.float().permute(2, 3, 0, 1, 4).flatten(2)


class Model(nn.Module):
    """A causal transformer over the most frequent tokens, and the memory of all.

    Args:
        setting: the sizes.
        vocabulary: number of distinct tokens.
        table: of the memory; None: there is none.
    """

    def __init__(self, setting: Setting, vocabulary: int, table: Tensor | None) -> None:
        """See the class."""
        super().__init__()
        self.classes = setting.classes
        self.tokens = nn.Embedding(setting.classes, WIDTH)
        self.positions = nn.Parameter(torch.randn(setting.context, WIDTH) * 0.02)
        nn.init.normal_(self.tokens.weight, std=0.1)
        layer = nn.TransformerEncoderLayer(
            WIDTH, 4, 4 * WIDTH, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.body = nn.TransformerEncoder(layer, LAYERS, nn.LayerNorm(WIDTH), False)
        self.head = nn.Linear(WIDTH, setting.classes)
        # Drawn whether there is a memory or not: with it all other weights start the same.
        self.projection = nn.Linear(len(ORDERS) * HEADS * setting.dim, WIDTH, bias=False)
        self.memory = None if table is None else Memory(table, vocabulary)
        causal = nn.Transformer.generate_square_subsequent_mask(setting.context)
        self.register_buffer("causal", causal)

    def dense(self) -> list[nn.Parameter]:
        """Return all parameters but the table, and but the projection if there is no table."""
        unused = "projection" if self.memory is None else "memory"
        return [p for name, p in self.named_parameters() if not name.startswith(unused)]

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits ``[batch, context, classes]`` after ``[batch, REACH + context]``."""
        known = tokens[:, REACH:].clamp(max=self.classes - 1)  # ids are ranks of frequency
        hidden = self.tokens(known) + self.positions
        if self.memory is not None:
            hidden = hidden + self.projection(self.memory(tokens))
        return self.head(self.body(hidden, mask=self.causal, is_causal=True))

    def loss(self, windows: Tensor) -> Tensor:
        """Return the mean cross-entropy, in nats per token, of ``[batch, REACH + context + 1]``."""
        targets = windows[:, REACH + 1 :].clamp(max=self.classes - 1)
        return F.cross_entropy(self(windows[:, :-1]).flatten(0, 1), targets.flatten())


class RowwiseAdagrad:
    """The table's update with one sum of squares a row, in torch, to compare with.

    The rule of FBGEMM's ``EXACT_ROWWISE_ADAGRAD``, which recommenders train their tables with
    (https://docs.pytorch.org/FBGEMM): s += mean(g^2); row -= lr g / (sqrt(s) + eps). A hook before
    the step of the optimizer that has the table, which then finds no gradient there.
    """

    def __init__(self, table: nn.Parameter) -> None:
        """See the class."""
        self.table = table
        self.sums = torch.zeros(len(table))

    @torch.no_grad()
    def __call__(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Update the rows of the gradient, with the learning rate of the table's group."""
        gradient = self.table.grad.coalesce()
        ids, values = gradient.indices()[0], gradient.values().float()
        self.sums[ids] += values.square().mean(1)
        size = self.sums[ids].sqrt_().add_(1e-8)
        change = values.mul_(-optimizer.param_groups[-1]["lr"]).div_(size[:, None])
        self.table.index_add_(0, ids, change.to(self.table.dtype))
        self.table.grad = None


def make_optimizer(model: Model, setting: Setting) -> tiger_ext.Tiger:
    """Return one optimizer over everything: Tiger, and the table as ``setting`` says."""
    groups: list[dict[str, Any]] = [{"params": model.dense()}]
    if model.memory is not None:
        group = {"weight_decay": 0.0, **STATES[setting.state]}
        group["stochastic_rounding"] = setting.rounding == "stochastic"
        if setting.lr is not None:
            group["lr"] = setting.lr
        groups.append({"params": [model.memory.table], **group})
    return tiger_ext.Tiger(groups, lr=DENSE_LR, betas=(BETA,), weight_decay=DENSE_WEIGHT_DECAY)


def windows(corpus: corpus_module.Corpus, setting: Setting, split: str, seed: int) -> Iterator:
    """Yield random batches of a split, ``[batch, REACH + context + 1]``; the same for a seed."""
    first, end = corpus.splits[split]
    size = REACH + setting.context + 1
    generator = torch.Generator().manual_seed(seed)
    while True:
        begin = torch.randint(first, end - size + 1, (setting.batch, 1), generator=generator)
        yield corpus.tokens[begin + torch.arange(size)].long()


@torch.no_grad()
def evaluate(model: Model, corpus: corpus_module.Corpus, setting: Setting) -> float:
    """Return the loss on a fixed sample of ``setting.split``, in nats per token."""
    batches = windows(corpus, setting, setting.split, seed=0)
    count = max(1, setting.test_windows // setting.batch)
    return statistics.fmean(model.loss(next(batches)).item() for _ in range(count))


def resident_bytes() -> int | None:
    """Return this process's memory, of shared pages its share; None where Linux is not."""
    try:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    except OSError:
        return None
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def train(
    rank: int,
    model: Model,
    optimizer: torch.optim.Optimizer,
    corpus: corpus_module.Corpus,
    setting: Setting,
    bar: bool,
) -> dict[str, Any]:
    """Take this worker's steps; return what they took."""
    steps = setting.steps
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    own = replace(setting, batch=setting.batch // setting.workers)
    batches = windows(corpus, own, "train", seed=1000 * (setting.seed + 1) + rank)
    optimizer_ms, step_ms = [], []
    begin = time.perf_counter()
    name = f"{setting.rows:,} rows"
    for _ in tqdm(range(steps), name, unit="step", dynamic_ncols=True, disable=not bar):
        batch = next(batches)
        start = time.perf_counter()
        model.loss(batch).backward()
        if setting.workers > 1:
            average([p.grad for p in model.dense()], setting.workers)
        middle = time.perf_counter()
        optimizer.step()
        stop = time.perf_counter()
        optimizer.zero_grad()
        scheduler.step()
        optimizer_ms.append(1e3 * (stop - middle))
        step_ms.append(1e3 * (stop - start))
    warm = slice(min(WARM_UP_STEPS, steps - 1), None)
    return {
        "optimizer_ms": statistics.median(optimizer_ms[warm]),
        "step_ms": statistics.median(step_ms[warm]),
        "seconds": time.perf_counter() - begin,
    }


def average(gradients: list[Tensor], workers: int) -> None:
    """Replace the gradients by their mean over all workers."""
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    parts = flat.div_(workers).split([g.numel() for g in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))


def work(
    rank: int,
    model: Model,
    state: dict[str, Any],
    corpus: corpus_module.Corpus,
    setting: Setting,
    meeting: str,
    results: Any,
    bar: bool,
) -> None:
    """Be one of several workers: all tensors that come are shared, the dense ones to be copied."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=setting.workers)
    parents = [p.data for p in model.dense()]
    for p in model.dense():
        p.data = p.data.clone()
    optimizer = make_optimizer(model, setting)
    last = len(parents)  # the table's number
    own = {i: each if i == last else copy.deepcopy(each) for i, each in state["state"].items()}
    optimizer.load_state_dict({**state, "state": own}, assign=True)
    dist.barrier()  # the others have started too
    figures = train(rank, model, optimizer, corpus, setting, bar and rank == 0)
    dist.barrier()  # all still have the shared pages
    figures["resident_bytes"] = resident_bytes()
    if rank == 0:
        for p, parent in zip(model.dense(), parents, strict=True):
            parent.copy_(p.data)
    dist.barrier()
    results.put(figures)
    dist.destroy_process_group()


def run(setting: Setting, bar: bool = False) -> dict[str, Any]:
    """Train once; return the setting with what was measured, ready for JSON."""
    torch.set_num_threads(1)
    corpus = corpus_module.load(setting.cache, setting.files)
    torch.manual_seed(setting.seed)
    several = setting.workers > 1
    table = None
    if setting.rows:
        dtype = getattr(torch, setting.dtype)
        table = tiger_ext.empty_table(setting.rows, setting.dim, dtype, shared=several)
    model = Model(setting, corpus.vocabulary, table)
    optimizer = make_optimizer(model, setting)
    adagrad = None
    if model.memory is not None and setting.state == "adagrad":
        adagrad = RowwiseAdagrad(model.memory.table)
        optimizer.register_step_pre_hook(adagrad)
    if several:
        model.share_memory()
        optimizer.share_memory()
        results = multiprocessing.get_context("spawn").SimpleQueue()
        with tempfile.TemporaryDirectory() as folder:
            meeting = f"{folder}/meeting"
            shared = (model, optimizer.state_dict(), corpus, setting, meeting, results, bar)
            torch.multiprocessing.spawn(work, shared, setting.workers)
        figures = [results.get() for _ in range(setting.workers)]
    else:
        figures = [train(0, model, optimizer, corpus, setting, bar)]
        figures[0]["resident_bytes"] = resident_bytes()
    together = {name: [f[name] for f in figures] for name in figures[0]}
    seconds = max(together["seconds"])
    tokens = setting.steps * setting.batch * setting.context
    result = {
        **asdict(setting),
        "loss": evaluate(model, corpus, setting),
        "optimizer_ms": statistics.fmean(together["optimizer_ms"]),
        "step_ms": statistics.fmean(together["step_ms"]),
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "resident_bytes": None
        if None in together["resident_bytes"]
        else sum(together["resident_bytes"]),
        "table_bytes": 0,
        "state_bytes": 0,
    }
    result["optimizer_share"] = result["optimizer_ms"] / result["step_ms"]
    if model.memory is not None:
        table = model.memory.table
        state = [adagrad.sums] if adagrad else optimizer.state[table].values()
        result["table_bytes"] = table.nbytes
        result["state_bytes"] = sum(value.nbytes for value in state if value.dim())
        bytes_of_all = result["table_bytes"] + result["state_bytes"]
        result["bytes_per_parameter"] = bytes_of_all / table.numel()
    return {name: value for name, value in result.items() if name != "cache"}


def run_apart(setting: Setting, bar: bool = False) -> dict[str, Any]:
    """Do ``run`` in a process of its own, whose memory is that of this run alone."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(run, setting, bar).result()


# ---------------------------------------------------------------------------- against rows


def sweep(base: Setting, options: argparse.Namespace) -> dict[str, Any]:
    """Run every number of rows with every number of workers."""
    settings = [replace(base, rows=r, workers=w) for w in options.workers for r in options.rows]
    return {"runs": [run_apart(setting, bar=True) for setting in settings]}


def sweep_table(result: dict[str, Any]) -> str:
    """Return the runs as Markdown."""
    lines = [
        "| rows | workers | held-out loss | step ms | optimizer | tokens/s | bytes a parameter "
        "| table and state MiB | resident MiB |",
        "|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for r in result["runs"]:
        each = f"{r['bytes_per_parameter']:.2f}" if r["rows"] else "–"
        resident = f"{r['resident_bytes'] / MIB:,.0f}" if r["resident_bytes"] else "–"
        lines.append(
            f"| {r['rows']:,} | {r['workers']} | {r['loss']:.3f} | {r['step_ms']:.1f} "
            f"| {r['optimizer_share']:.1%} | {r['tokens_per_second']:,.0f} | {each} "
            f"| {(r['table_bytes'] + r['state_bytes']) / MIB:,.0f} | {resident} |"
        )
    return "\n".join(lines)


def save_plot(result: dict[str, Any], path: Path) -> None:
    """Draw loss, step time and memory of a sweep against rows into a PNG file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.2), layout="constrained")
    loss, ms, memory = figure.subplots(1, 3)
    for index, workers in enumerate(sorted({r["workers"] for r in result["runs"]})):
        runs = sorted(
            (r for r in result["runs"] if r["workers"] == workers), key=lambda r: r["rows"]
        )
        x = [r["rows"] for r in runs]
        look = {"color": f"C{index}", "ms": 4}
        name = f"{workers} worker{'s' if workers > 1 else ''}"
        loss.plot(x, [r["loss"] for r in runs], "o-", label=name, **look)
        ms.plot(x, [r["step_ms"] for r in runs], "o-", label=f"{name}, step", **look)
        ms.plot(x, [r["optimizer_ms"] for r in runs], "o:", label=f"{name}, optimizer", **look)
        resident = [r["resident_bytes"] / MIB if r["resident_bytes"] else 0 for r in runs]
        memory.plot(x, resident, "o-", label=f"{name}, resident", **look)
    whole = [(r["table_bytes"] + r["state_bytes"]) / MIB for r in runs]
    memory.plot(x, whole, "k:", lw=1, label="table and state, if all were written")
    loss.set(title="Loss on held-out files", ylabel="nats per token")
    ms.set(title="Time of a step", ylabel="ms, median", ylim=(0, None))
    memory.set(title="Memory", ylabel="MiB", ylim=(0, None))
    for axes in (loss, ms, memory):
        axes.set_xscale("symlog", linthresh=1e4)
        axes.set_xlabel("rows (0: no memory)")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=110)


# ------------------------------------------------------------------- table and state compared

ARMS: dict[str, dict[str, str]] = {
    "float32 table, float32 momentum": {"dtype": "float32", "state": "float32"},
    "bfloat16 table, nearest": {"state": "float32", "rounding": "nearest"},
    "bfloat16 table, stochastic": {"state": "float32", "rounding": "stochastic"},
    "float32 table, int8 momentum": {"dtype": "float32", "state": "int8"},
    "float32 table, AdamW by element": {"dtype": "float32", "state": "element"},
    "float32 table, AdamW by row": {"dtype": "float32", "state": "row"},
    "bfloat16 table, int8 momentum, stochastic": {"state": "int8", "rounding": "stochastic"},
    "bfloat16 table, AdamW by row, nearest": {"state": "row", "rounding": "nearest"},
    "bfloat16 table, AdamW by row, stochastic": {"state": "row", "rounding": "stochastic"},
    "float32 table, row-wise Adagrad": {"dtype": "float32", "state": "adagrad"},
}


def compare(base: Setting, options: argparse.Namespace) -> dict[str, Any]:
    """Train every arm with every seed, some at once."""
    base = replace(base, rows=options.compare_rows, workers=1)
    settings = [
        replace(base, seed=base.seed + seed, **arm)
        for seed in range(options.seeds)
        for arm in ARMS.values()
    ]
    corpus_module.load(base.cache, base.files)  # once, before the processes want it
    with ThreadPoolExecutor(options.processes) as pool:
        done = pool.map(run_apart, settings)
        runs = list(tqdm(done, total=len(settings), unit="run", dynamic_ncols=True))
    arms = []
    for index, name in enumerate(ARMS):
        of_arm = runs[index :: len(ARMS)]
        losses = [r["loss"] for r in of_arm]
        arms.append(
            {
                "name": name,
                "losses": losses,
                "mean": statistics.fmean(losses),
                "spread": max(losses) - min(losses),
                "against_first": statistics.fmean(
                    r["loss"] - first["loss"]
                    for r, first in zip(of_arm, runs[:: len(ARMS)], strict=True)
                ),
                "bytes_per_parameter": of_arm[0]["bytes_per_parameter"],
            }
        )
    return {"arms": arms, "runs": runs}


def compare_table(result: dict[str, Any]) -> str:
    """Return the arms as Markdown."""
    first = next(iter(ARMS))
    lines = [
        f"| | bytes a parameter | held-out loss, mean | its spread over seeds | against {first} |",
        "|---|--:|--:|--:|--:|",
    ]
    for arm in result["arms"]:
        lines.append(
            f"| {arm['name']} | {arm['bytes_per_parameter']:.2f} | {arm['mean']:.4f} "
            f"| {arm['spread']:.4f} | {arm['against_first']:+.4f} |"
        )
    return "\n".join(lines)


# ------------------------------------------------------------------------------ command line

ROWS = [0, 10**5, 10**6, 10**7, 10**8]
SMOKE = {"rows": [0, 4000], "steps": 20, "batch": 4, "context": 16, "classes": 256}
SMOKE |= {"compare_rows": 4000, "test_windows": 16, "files": 200, "dim": 8}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def rows(text: str) -> int:
        count = int(float(text))
        if count and not len(ORDERS) * HEADS <= count <= 10**10:
            raise argparse.ArgumentTypeError(f"{text}: expected 0, or 4 to 1e10")
        return count

    def positive(text: str) -> int:
        if (count := int(text)) < 1:
            raise argparse.ArgumentTypeError(f"{text}: expected at least 1")
        return count

    add = parser.add_argument
    add("--rows", type=rows, nargs="+", default=ROWS, help="of the table (default: 0, 1e5 to 1e8)")
    add("--workers", type=positive, nargs="+", default=[1], help="processes on one table")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the table")
    add("--state", choices=STATES, default="int8", help="of the table (default %(default)s)")
    add("--rounding", choices=("stochastic", "nearest"), default="stochastic", help="of the table")
    add("--steps", type=positive, default=400, help="of each worker (default %(default)s)")
    add("--batch", type=positive, default=16, help="windows a step, of all (default %(default)s)")
    add("--context", type=positive, default=64, help="positions a window (default %(default)s)")
    add("--dim", type=positive, default=16, help="numbers a row (default %(default)s)")
    add("--classes", type=positive, default=2048, help="tokens that the transformer knows")
    add("--lr", type=float, help="of the table (default: the best found for --state)")
    add("--seed", type=int, default=0, help="of weights and batches (default %(default)s)")
    add("--files", type=positive, help="source files that are read (default: all)")
    add("--test-windows", type=positive, default=512, help="windows of the loss (%(default)s)")
    add("--split", choices=("held-out", "validation"), default="held-out", help="of the loss")
    add("--compare", action="store_true", help="storage of table and state, over seeds, instead")
    add("--compare-rows", type=rows, default=10**6, help="rows for that (default %(default)s)")
    add("--seeds", type=positive, default=3, help="seeds for that (default %(default)s)")
    add("--processes", type=positive, default=2, help="runs at once for that (%(default)s)")
    add("--cache", type=Path, default=corpus_module.default_cache(), help="folder for the tokens")
    add("--json", type=Path, help="figures (default: in benchmarks/results); the picture beside it")
    add("--smoke", action="store_true", help="few files, small tables, few steps")
    if parser.parse_known_args(arguments)[0].smoke:
        parser.set_defaults(**SMOKE)
    options = parser.parse_args(arguments)
    if options.compare and not options.compare_rows:
        parser.error("--compare-rows 0: expected a table")
    if options.state == "adagrad" and options.workers != [1]:
        parser.error("--state adagrad: expected one worker")
    for workers in options.workers:
        if options.batch % workers:
            parser.error(f"--batch {options.batch}: expected a multiple of {workers} workers")
    if options.json is None:
        name = "ngram_memory_compare.json" if options.compare else "ngram_memory.json"
        options.json = RESULTS / name
    return options


def base_setting(options: argparse.Namespace) -> Setting:
    """Return the run that ``options`` ask for, but for the rows and the workers."""
    given = {f.name: getattr(options, f.name) for f in fields(Setting)}
    return Setting(**{**given, "rows": 0, "workers": 1})


def main() -> None:
    """Run the sweep or the comparison."""
    options = parse_arguments()
    base = base_setting(options)
    begin = time.perf_counter()
    result = compare(base, options) if options.compare else sweep(base, options)
    result = {"torch": torch.__version__, "seconds": time.perf_counter() - begin, **result}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=1) + "\n")
    print(compare_table(result) if options.compare else sweep_table(result))
    print(f"\n{result['seconds']:.0f} s. Numbers: {options.json}.")
    if not options.compare:
        picture = options.json.with_suffix(".png")
        try:
            save_plot(result, picture)
            print(f"Curves: {picture}")
        except ModuleNotFoundError as error:
            if error.name != "matplotlib":
                raise
            print("No picture, as matplotlib is not there: pip install 'tiger_ext[demo]'")


if __name__ == "__main__":
    main()
