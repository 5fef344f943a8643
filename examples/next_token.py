# SPDX-License-Identifier: Apache-2.0
"""A next-token model over torch's own sources: Tiger against SparseAdam + AdamW.

    python examples/next_token.py             train both in turn; PNG and closing table
    python examples/next_token.py --tune      find each one's learning rates anew
    python examples/next_token.py --smoke     a few seconds, to see that everything runs

Two copies of one model start from the same weights and see the same batches for the same number of
steps, a step of one after a step of the other. One is trained by a single ``tiger_ext.Tiger`` over
all parameters; the other by ``torch.optim.SparseAdam`` on the embeddings and fused
``torch.optim.AdamW`` on the rest. The learning rates of both were found by ``--tune``, on files
that are neither trained on nor held out.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import corpus as corpus_module
import torch
import torch.nn.functional as F
from corpus import Corpus
from torch import Tensor, nn

import tiger_ext

try:
    from next_token_report import save_plot, table
    from tqdm import tqdm
except ModuleNotFoundError as error:
    if error.name not in ("matplotlib", "tqdm"):
        raise
    sys.exit(f"The demo needs {error.name}: pip install 'tiger_ext[demo]'")

TIGER, ADAM = "Tiger", "SparseAdam + AdamW"
CONTEXT = 4
WEIGHT_DECAY = 0.01
# The first steps allocate the optimizers' state; they do not count in the medians.
WARM_UP_STEPS = 5
# So many positions pass the softmax at once: their logits stay in the cache of the CPU.
CHUNK = 512
SWEEP_FILE = Path(__file__).parents[1] / "benchmarks" / "results" / "next_token_lr_sweep.json"


@dataclass(frozen=True)
class LearningRates:
    """Peak learning rates; both fall linearly to zero."""

    rows: float  # of the two sparse tables
    dense: float


# Found by --tune, in runs of the length that SWEEP_FILE notes.
TUNED = {TIGER: LearningRates(4.8e-2, 6e-3), ADAM: LearningRates(9.6e-2, 6e-3)}


class NextToken(nn.Module):
    """Embeddings of the last tokens and of their hashed bigrams, and a small network over them.

    Args:
        vocabulary: rows of the token table.
        rows: rows of the bigram table.
        dim: width of both tables.
        classes: outputs: the most frequent tokens, and the last one for all others.
    """

    def __init__(self, vocabulary: int, rows: int, dim: int, classes: int) -> None:
        """See the class."""
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, dim, sparse=True)
        self.bigrams = nn.Embedding(rows, dim, sparse=True)
        nn.init.normal_(self.tokens.weight, std=0.1)
        nn.init.zeros_(self.bigrams.weight)  # a bigram never seen says nothing
        self.body = nn.Sequential(
            nn.Linear((2 * CONTEXT - 1) * dim, 256),
            nn.GELU(),
            nn.LayerNorm(256),
            nn.Linear(256, 64),
            nn.LayerNorm(64),
        )
        self.head = nn.Linear(64, classes)

    def forward(self, context: Tensor) -> Tensor:
        """Return the hidden state ``[batch, 64]`` after ``context``, ids ``[batch, CONTEXT]``."""
        pairs = context[:, :-1] * self.tokens.num_embeddings + context[:, 1:]
        # Multiplicative hashing, modulo 2**64; the high bits are the well-mixed ones.
        hashed = (pairs * -0x61C8864680B583EB >> 20) % self.bigrams.num_embeddings
        features = torch.cat([self.tokens(context).flatten(1), self.bigrams(hashed).flatten(1)], 1)
        return self.body(features)

    def loss_chunks(self, hidden: Tensor, target: Tensor) -> Iterator[Tensor]:
        """Yield the chunks' shares of the mean cross-entropy, in nats per token."""
        for h, t in zip(hidden.split(CHUNK), target.split(CHUNK), strict=True):
            yield F.cross_entropy(self.head(h), t, reduction="sum") / len(target)

    def backward(self, context: Tensor, target: Tensor) -> None:
        """Put the gradients of the mean cross-entropy into ``.grad``."""
        hidden = self(context)
        leaf = hidden.detach().requires_grad_()
        for share in self.loss_chunks(leaf, target):
            share.backward()
        hidden.backward(leaf.grad)

    @torch.no_grad()
    def evaluate(self, context: Tensor, target: Tensor) -> float:
        """Return the mean cross-entropy, in nats per token."""
        return sum(share.item() for share in self.loss_chunks(self(context), target))


def make_tiger(model: NextToken, lr: LearningRates) -> list[torch.optim.Optimizer]:
    """Return one Tiger over all parameters; only the learning rates differ."""
    tables = [model.tokens.weight, model.bigrams.weight]
    rest = [*model.body.parameters(), *model.head.parameters()]
    groups = [{"params": tables, "lr": lr.rows}, {"params": rest, "lr": lr.dense}]
    return [tiger_ext.Tiger(groups, weight_decay=WEIGHT_DECAY)]


def make_adam(model: NextToken, lr: LearningRates) -> list[torch.optim.Optimizer]:
    """Return torch's pair: SparseAdam (it has no weight decay) and fused AdamW."""
    tables = [model.tokens.weight, model.bigrams.weight]
    rest = [*model.body.parameters(), *model.head.parameters()]
    return [
        torch.optim.SparseAdam(tables, lr=lr.rows),
        torch.optim.AdamW(rest, lr=lr.dense, weight_decay=WEIGHT_DECAY, fused=True),
    ]


MAKE = {TIGER: make_tiger, ADAM: make_adam}


@dataclass
class Run:
    """One model with its optimizers, and what was measured of them."""

    name: str
    lr: LearningRates
    model: NextToken
    optimizers: list[torch.optim.Optimizer]
    schedulers: list[torch.optim.lr_scheduler.LRScheduler]
    optimizer_ms: list[float] = field(default_factory=list)
    backward_ms: list[float] = field(default_factory=list)
    losses: list[tuple[int, float]] = field(default_factory=list)

    @classmethod
    def start(cls, name: str, lr: LearningRates, model: NextToken, steps: int) -> Run:
        """Return a run of ``steps`` steps on a copy of ``model``."""
        model = copy.deepcopy(model)
        optimizers = MAKE[name](model, lr)
        schedulers = [
            torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
            for optimizer in optimizers
        ]
        return cls(name, lr, model, optimizers, schedulers)

    def step(self, context: Tensor, target: Tensor) -> None:
        """Train on one batch; only the optimizers' own steps count as optimizer time."""
        begin = time.perf_counter()
        self.model.backward(context, target)
        middle = time.perf_counter()
        for optimizer in self.optimizers:
            optimizer.step()
        end = time.perf_counter()
        self.backward_ms.append(1e3 * (middle - begin))
        self.optimizer_ms.append(1e3 * (end - middle))
        self.model.zero_grad()
        for scheduler in self.schedulers:
            scheduler.step()

    def state_bytes(self) -> int:
        """Return the bytes of all tensors in the optimizers' state."""
        return sum(
            value.nbytes
            for optimizer in self.optimizers
            for state in optimizer.state.values()
            for value in state.values()
            if isinstance(value, Tensor)
        )

    def measurements(self) -> dict[str, Any]:
        """Return what the report needs, ready for JSON."""
        warm = slice(min(WARM_UP_STEPS, len(self.optimizer_ms) - 1), None)
        return {
            "name": self.name,
            "lr": vars(self.lr),
            "held_out": self.losses,
            "optimizer_ms": statistics.median(self.optimizer_ms[warm]),
            "backward_ms": statistics.median(self.backward_ms[warm]),
            "state_bytes": self.state_bytes(),
            "optimizer_ms_per_step": self.optimizer_ms,
        }


@dataclass
class Task:
    """The data of a comparison: where batches and test positions come from."""

    corpus: Corpus
    classes: int
    batch: int
    seed: int

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield random training batches ``(context, target)``; the same for every call."""
        generator = torch.Generator().manual_seed(self.seed)
        while True:
            yield self._at(self._positions("train", self.batch, generator))

    def sample(self, split: str, count: int) -> tuple[Tensor, Tensor]:
        """Return a fixed sample of ``count`` positions of a split."""
        return self._at(self._positions(split, count, torch.Generator().manual_seed(self.seed)))

    def unigram_loss(self, target: Tensor) -> float:
        """Return the loss of knowing only how frequent each class is in the training files."""
        first, end = self.corpus.splits["train"]
        tokens = self.corpus.tokens[first:end].clamp(max=self.classes - 1)
        counts = torch.bincount(tokens, minlength=self.classes).double() + 1
        return -(counts / counts.sum()).log()[target].mean().item()

    def _positions(self, split: str, count: int, generator: torch.Generator) -> Tensor:
        first, end = self.corpus.splits[split]
        return torch.randint(first + CONTEXT, end, (count,), generator=generator)

    def _at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        # Ids are ranks of frequency, so that all the rare tokens clamp to the class "other".
        window = positions[:, None] + torch.arange(-CONTEXT, 1)
        ids = self.corpus.tokens[window].long()
        return ids[:, :-1], ids[:, -1].clamp(max=self.classes - 1)


def train(runs: list[Run], task: Task, split: str, steps: int, evaluations: int) -> None:
    """Train ``runs`` in turn, a step each, on the same batches; note their losses on ``split``."""
    test = task.sample(split, 4 * task.batch)
    due = {round(steps * i / evaluations) for i in range(evaluations + 1)}
    batches = task.batches()
    bar = tqdm(range(steps + 1), unit="step", dynamic_ncols=True, leave=len(runs) > 1)
    for step in bar:
        if step in due:
            for run in runs:
                run.losses.append((step, run.model.evaluate(*test)))
            bar.set_postfix_str(
                ", ".join(f"{run.name} {run.losses[-1][1]:.3f}" for run in runs), refresh=False
            )
        if step < steps:
            batch = next(batches)
            for run in runs:
                run.step(*batch)


def tune(name: str, model: NextToken, task: Task, steps: int, limit: int) -> dict[str, Any]:
    """Climb from the committed learning rates, by factors of two, to the best validation loss.

    Args:
        name: which optimizer.
        model: the start; not changed.
        task: the data.
        steps: length of each trial.
        limit: most trials.
    """
    losses: dict[LearningRates, float] = {}

    def loss(lr: LearningRates) -> float:
        if lr not in losses:
            run = Run.start(name, lr, model, steps)
            train([run], task, "validation", steps, evaluations=1)
            losses[lr] = run.losses[-1][1]
            if not math.isfinite(losses[lr]):
                losses[lr] = math.inf
            print(f"{name}: rows {lr.rows:g}, dense {lr.dense:g}: {losses[lr]:.4f}", flush=True)
        return losses[lr]

    best = TUNED[name]
    loss(best)
    moves = [(which, factor) for factor in (2.0, 0.5) for which in ("rows", "dense")]
    tried_in_vain = 0
    for which, factor in itertools.cycle(moves):
        while len(losses) < limit:
            candidate = replace(best, **{which: getattr(best, which) * factor})
            if loss(candidate) >= loss(best):
                break
            best, tried_in_vain = candidate, 0
        tried_in_vain += 1
        if tried_in_vain >= len(moves) or len(losses) >= limit:
            break
    return {
        "name": name,
        "best": vars(best),
        "trials": [{"lr": vars(lr), "validation_loss": value} for lr, value in losses.items()],
    }


def touched_rows(task: Task, model: NextToken) -> dict[str, int]:
    """Return how many entries and how many distinct rows the gradients of one batch have."""
    model.backward(*next(task.batches()))
    gradients = [model.tokens.weight.grad, model.bigrams.weight.grad]
    model.zero_grad()
    return {
        "entries_per_step": sum(g._nnz() for g in gradients),
        "rows_per_step": sum(len(g._indices().unique()) for g in gradients),
    }


def parse_arguments() -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--steps", type=int, default=240, help="steps of each optimizer (default %(default)s)")
    add("--rows", type=int, default=2**21, help="rows of the bigram table (default %(default)s)")
    add("--dim", type=int, default=64, help="width of the tables (default %(default)s)")
    add("--batch", type=int, default=8192, help="positions per step (default %(default)s)")
    add("--classes", type=int, default=4096, help="outputs, one for all rare tokens (%(default)s)")
    add("--seed", type=int, default=0, help="of weights and batches (default %(default)s)")
    add("--threads", type=int, default=2, help="threads of torch (default %(default)s)")
    add("--cache", type=Path, default=corpus_module.default_cache(), help="folder for the tokens")
    add("--plot", type=Path, default=Path("next_token.png"), help="picture (default %(default)s)")
    add("--json", type=Path, help="also write all figures to this file")
    add("--tune", action="store_true", help="search the learning rates instead")
    add("--tune-steps", type=int, default=60, help="steps of a trial (default %(default)s)")
    add("--tune-trials", type=int, default=8, help="most trials each (default %(default)s)")
    add("--tune-json", type=Path, default=SWEEP_FILE, help="where the search is written")
    add("--smoke", action="store_true", help="few files, small tables, few steps")
    options = parser.parse_args()
    options.max_files = None
    if options.smoke:
        options.max_files = 200
        options.rows, options.dim, options.classes = 2**14, 16, 512
        options.batch, options.steps, options.tune_steps = 512, 40, 10
    return options


def main() -> None:
    """Run the comparison or the search."""
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    begin = time.perf_counter()
    print("Reading the sources of the installed torch ...", flush=True)
    corpus = corpus_module.load(options.cache, options.max_files)
    read_seconds = time.perf_counter() - begin
    for name, count in corpus.statistics.items():
        print(f"  {name.replace('_', ' '):18} {count:12,}")

    torch.manual_seed(options.seed)
    model = NextToken(corpus.vocabulary, options.rows, options.dim, options.classes)
    task = Task(corpus, options.classes, options.batch, options.seed)
    setting = {
        "steps": options.tune_steps if options.tune else options.steps,
        **{name: getattr(options, name) for name in ("batch", "rows", "dim", "classes", "seed")},
        "threads": options.threads,
        "torch": torch.__version__,
        "weight_decay": WEIGHT_DECAY,
        "corpus": corpus.statistics,
    }
    if options.tune:
        setting["searches"] = [
            tune(name, model, task, options.tune_steps, options.tune_trials) for name in MAKE
        ]
        write_json(setting, options.tune_json)
        for search in setting["searches"]:
            print(f"best for {search['name']}: {search['best']}")
        return

    touched = touched_rows(task, model)
    unigram = task.unigram_loss(task.sample("held-out", 4 * options.batch)[1])
    dense = sum(p.numel() for part in (model.body, model.head) for p in part.parameters())
    print(
        f"Tables of {corpus.vocabulary:,} and {options.rows:,} rows x {options.dim} "
        f"and {dense:,} dense parameters.\n"
        f"A step: {options.batch:,} positions, {touched['entries_per_step']:,} gradient entries, "
        f"{touched['rows_per_step']:,} distinct rows.\n"
        f"Held-out loss for scale: {math.log(options.classes):.3f} uniform, "
        f"{unigram:.3f} from token frequencies alone.",
        flush=True,
    )
    runs = [Run.start(name, TUNED[name], model, options.steps) for name in MAKE]
    del model
    train(runs, task, "held-out", options.steps, evaluations=min(12, options.steps))

    measured = [run.measurements() for run in runs]
    ours, peer = measured
    result = {
        **setting,
        **touched,
        "dense_parameters": dense,
        "uniform_loss": math.log(options.classes),
        "unigram_loss": unigram,
        "time_ratio": peer["optimizer_ms"] / ours["optimizer_ms"],
        "state_ratio": peer["state_bytes"] / ours["state_bytes"],
        "read_seconds": read_seconds,
        "seconds": time.perf_counter() - begin,
        "runs": measured,
    }
    save_plot(result, options.plot)
    if options.json:
        write_json(result, options.json)
    print(
        f"{result['seconds']:.0f} s in all. Beside the optimizers, forward and backward take "
        f"{ours['backward_ms']:.0f} and {peer['backward_ms']:.0f} ms per step. "
        f"Curves: {options.plot}\n"
    )
    print(table(result))


def write_json(result: dict[str, Any], path: Path) -> None:
    """Write ``result`` to ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
