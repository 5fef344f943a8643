# SPDX-License-Identifier: Apache-2.0
"""A next-token model over torch's own sources: Tiger, AdamW and torch's pair side by side.

    python examples/next_token.py             train all three in turn; PNG and closing table
    python examples/next_token.py --tune      search each one's rates anew
    python examples/next_token.py --smoke     a few seconds, to see that everything runs

Three copies of one model start from the same weights and see the same batches for the same number
of steps, a step of one after a step of the other:

    Tiger                      one tiger_ext.Tiger over all parameters
    tiger_ext AdamW            one tiger_ext.AdamW over all parameters, the tables without decay
    torch SparseAdam + AdamW   what torch has: SparseAdam on the tables, fused AdamW on the rest

The second does what the third does, to rounding and the place of epsilon, and takes its rates. The
rates of Tiger and of torch's pair were found by ``--tune``: as many trials for each, by the same
search over the same four knobs (the learning rates of the token table, of the bigram table and of
the rest; the momentum's beta), each trial as long as the run itself, judged on files that are
neither trained on nor held out. Weight decay (0.01), AdamW's second beta (0.999) and the schedule
were not searched.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
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
    from next_token_report import findings, save_plot, table
    from tqdm import tqdm
except ModuleNotFoundError as error:
    if error.name not in ("matplotlib", "tqdm"):
        raise
    sys.exit(f"The demo needs {error.name}: pip install 'tiger_ext[demo]'")

TIGER, DROP_IN, TORCH = "Tiger", "tiger_ext AdamW", "torch SparseAdam + AdamW"
STEPS = 240
CONTEXT = 4
WEIGHT_DECAY = 0.01
BETA2 = 0.999
# With a warm-up of 12 steps Tiger ended 0.05 and torch's pair 0.02 worse (at START's rates).
SCHEDULE = "the peak at the first step, then linearly to zero"
# The first steps allocate the optimizers' state; they do not count in the medians.
WARM_UP_STEPS = 5
# So many positions pass the softmax at once: their logits stay in the cache of the CPU.
CHUNK = 512
SWEEP_FILE = Path(__file__).parents[1] / "benchmarks" / "results" / "next_token_lr_sweep.json"


@dataclass(frozen=True)
class Rates:
    """What is tuned: peak learning rates, which all fall linearly to zero, and the momentum."""

    tokens: float  # learning rate of the token table
    bigrams: float  # of the bigram table
    dense: float  # of all other parameters
    beta: float  # decay rate of the momentum; of Adam's first moment

    def moved(self, knob: str, factor: float) -> Rates:
        """Return the rates with one knob multiplied; of ``beta`` its horizon 1 / (1 - beta)."""
        value = getattr(self, knob)
        value = 1 - (1 - value) / factor if knob == "beta" else value * factor
        return replace(self, **{knob: float(f"{value:.4g}")})


KNOBS = ("tokens", "bigrams", "dense", "beta")
# Where --tune starts: the best of an earlier search in runs of a quarter of the length.
START = {
    TIGER: Rates(4.8e-2, 4.8e-2, 6e-3, 0.965),
    TORCH: Rates(9.6e-2, 9.6e-2, 6e-3, 0.9),
}
# Where it ended; all trials are in SWEEP_FILE.
TUNED = {
    TIGER: Rates(0.024, 0.048, 0.006, 0.86),
    TORCH: Rates(0.384, 0.096, 0.012, 0.6),
}
# A drop-in takes the rates of what it replaces.
TUNED[DROP_IN] = TUNED[TORCH]


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

    def rest(self) -> list[nn.Parameter]:
        """Return all parameters but the tables."""
        return [*self.body.parameters(), *self.head.parameters()]

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


def make_tiger(model: NextToken, rates: Rates) -> list[torch.optim.Optimizer]:
    """Return one Tiger over all parameters."""
    groups = [
        {"params": model.tokens.parameters(), "lr": rates.tokens},
        {"params": model.bigrams.parameters(), "lr": rates.bigrams},
        {"params": model.rest(), "lr": rates.dense},
    ]
    return [tiger_ext.Tiger(groups, betas=(rates.beta,), weight_decay=WEIGHT_DECAY)]


def make_drop_in(model: NextToken, rates: Rates) -> list[torch.optim.Optimizer]:
    """Return one AdamW over all parameters; like SparseAdam it does not decay the tables."""
    groups = [
        {"params": model.tokens.parameters(), "lr": rates.tokens, "weight_decay": 0.0},
        {"params": model.bigrams.parameters(), "lr": rates.bigrams, "weight_decay": 0.0},
        {"params": model.rest(), "lr": rates.dense},
    ]
    return [tiger_ext.AdamW(groups, betas=(rates.beta, BETA2), weight_decay=WEIGHT_DECAY)]


def make_torch(model: NextToken, rates: Rates) -> list[torch.optim.Optimizer]:
    """Return torch's pair: SparseAdam (it has no weight decay) and fused AdamW."""
    tables = [
        {"params": model.tokens.parameters(), "lr": rates.tokens},
        {"params": model.bigrams.parameters(), "lr": rates.bigrams},
    ]
    betas = (rates.beta, BETA2)
    return [
        torch.optim.SparseAdam(tables, betas=betas),
        torch.optim.AdamW(
            model.rest(), lr=rates.dense, betas=betas, weight_decay=WEIGHT_DECAY, fused=True
        ),
    ]


MAKE = {TIGER: make_tiger, DROP_IN: make_drop_in, TORCH: make_torch}


@dataclass
class Run:
    """One model with its optimizers, and what was measured of them."""

    name: str
    rates: Rates
    model: NextToken
    optimizers: list[torch.optim.Optimizer]
    schedulers: list[torch.optim.lr_scheduler.LRScheduler]
    optimizer_ms: list[float] = field(default_factory=list)
    step_ms: list[float] = field(default_factory=list)  # forward, backward and optimizer
    losses: list[tuple[int, float, float]] = field(default_factory=list)

    @classmethod
    def start(cls, name: str, rates: Rates, model: NextToken, steps: int) -> Run:
        """Return a run of ``steps`` steps on a copy of ``model``."""
        model = copy.deepcopy(model)
        optimizers = MAKE[name](model, rates)
        schedulers = [
            torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
            for optimizer in optimizers
        ]
        return cls(name, rates, model, optimizers, schedulers)

    def step(self, context: Tensor, target: Tensor) -> None:
        """Train on one batch; only the optimizers' own steps count as optimizer time."""
        begin = time.perf_counter()
        self.model.backward(context, target)
        middle = time.perf_counter()
        for optimizer in self.optimizers:
            optimizer.step()
        end = time.perf_counter()
        self.optimizer_ms.append(1e3 * (end - middle))
        self.step_ms.append(1e3 * (end - begin))
        self.model.zero_grad()
        for scheduler in self.schedulers:
            scheduler.step()

    def evaluate(self, test: tuple[Tensor, Tensor]) -> float:
        """Return the loss on ``test`` and note it with the steps and seconds of training so far."""
        loss = self.model.evaluate(*test)
        self.losses.append((len(self.step_ms), sum(self.step_ms) / 1e3, loss))
        return loss

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
            "rates": vars(self.rates),
            "held_out": [
                {"step": step, "seconds": seconds, "loss": loss}
                for step, seconds, loss in self.losses
            ],
            "optimizer_ms": statistics.median(self.optimizer_ms[warm]),
            "step_ms": statistics.median(self.step_ms[warm]),
            "state_bytes": self.state_bytes(),
            "optimizer_ms_per_step": self.optimizer_ms,
            "step_ms_per_step": self.step_ms,
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
            losses = [f"{run.evaluate(test):.3f}" for run in runs]
            bar.set_postfix_str(f"loss {', '.join(losses)}", refresh=False)
        if step < steps:
            batch = next(batches)
            for run in runs:
                run.step(*batch)


class Search:
    """A coordinate search for one optimizer's rates: the best validation loss in ``limit`` trials.

    Each knob in turn goes up by a factor as long as that helps, or else down. Once no move by the
    factor helps, the factor becomes its square root. It begins with 2.

    Args:
        name: which optimizer.
        trial: returns the validation loss of a run with the given rates, in nats per token.
        limit: number of trials.
    """

    def __init__(self, name: str, trial: Callable[[Rates], float], limit: int) -> None:
        """See the class."""
        self.name, self.trial, self.limit = name, trial, limit
        self.losses: dict[Rates, float] = {}
        self.best = START[name]

    def run(self, report: Callable[[], None]) -> None:
        """Search; call ``report`` after every trial."""
        try:
            self._improves(self.best, report)
            factor = 2.0
            while True:
                helped = [self._climb(knob, factor, report) for knob in KNOBS]
                if not any(helped):
                    factor = math.sqrt(factor)
        except _SpentError:
            pass

    def result(self) -> dict[str, Any]:
        """Return all trials so far and the best rates, ready for JSON."""
        return {
            "name": self.name,
            "best": vars(self.best),
            "trials": [
                {"rates": vars(rates), "validation_loss": loss}
                for rates, loss in self.losses.items()
            ],
        }

    def _climb(self, knob: str, factor: float, report: Callable[[], None]) -> bool:
        for direction in (factor, 1 / factor):
            helped = False
            while self._improves(self.best.moved(knob, direction), report):
                helped = True
            if helped:
                return True
        return False

    def _improves(self, rates: Rates, report: Callable[[], None]) -> bool:
        if rates in self.losses:
            return False
        if len(self.losses) >= self.limit:
            raise _SpentError
        loss = self.trial(rates)
        self.losses[rates] = loss if math.isfinite(loss) else math.inf
        improves = self.losses[rates] <= min(self.losses.values())
        if improves:
            self.best = rates
        report()
        return improves


class _SpentError(Exception):
    """The search has had all its trials."""


def tune(
    names: list[str], model: NextToken, task: Task, options: argparse.Namespace, setting: dict
) -> None:
    """Search the rates of ``names``; write ``setting`` and all trials after every trial."""
    searches: list[Search] = []

    def report() -> None:
        name, (rates, loss) = searches[-1].name, list(searches[-1].losses.items())[-1]
        print(f"{name}: {rates}: {loss:.4f}", flush=True)
        write_json(setting | {"searches": [s.result() for s in searches]}, options.tune_json)

    for name in names:

        def trial(rates: Rates, name: str = name) -> float:
            run = Run.start(name, rates, model, options.steps)
            train([run], task, "validation", options.steps, evaluations=1)
            return run.losses[-1][2]

        searches.append(Search(name, trial, options.tune_trials))
        searches[-1].run(report)
        print(f"best for {name}: {searches[-1].best}", flush=True)


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
    add("--steps", type=int, default=STEPS, help="steps of each optimizer (default %(default)s)")
    add("--rows", type=int, default=2**21, help="rows of the bigram table (default %(default)s)")
    add("--dim", type=int, default=64, help="width of the tables (default %(default)s)")
    add("--batch", type=int, default=8192, help="positions per step (default %(default)s)")
    add("--classes", type=int, default=4096, help="outputs, one for all rare tokens (%(default)s)")
    add("--seed", type=int, default=0, help="of weights and batches (default %(default)s)")
    add("--threads", type=int, default=2, help="threads of torch (default %(default)s)")
    add("--cache", type=Path, default=corpus_module.default_cache(), help="folder for the tokens")
    add("--plot", type=Path, default=Path("next_token.png"), help="picture (default %(default)s)")
    add("--json", type=Path, help="also write all figures to this file")
    add("--tune", action="store_true", help="search the rates instead")
    add("--tune-only", choices=START, help="search those of this optimizer only")
    add("--tune-trials", type=int, default=20, help="trials of each (default %(default)s)")
    add("--tune-json", type=Path, default=SWEEP_FILE, help="where the search is written")
    add("--smoke", action="store_true", help="few files, small tables, few steps")
    options = parser.parse_args()
    options.max_files = None
    if options.smoke:
        options.max_files = 200
        options.rows, options.dim, options.classes = 2**14, 16, 512
        options.batch, options.steps = 512, 40
    return options


def start(options: argparse.Namespace) -> tuple[NextToken, Task, dict[str, Any]]:
    """Return the untrained model, the data, and the setting for the JSON files."""
    print("Reading the sources of the installed torch ...", flush=True)
    corpus = corpus_module.load(options.cache, options.max_files)
    for name, count in corpus.statistics.items():
        print(f"  {name.replace('_', ' '):18} {count:12,}")
    torch.manual_seed(options.seed)
    model = NextToken(corpus.vocabulary, options.rows, options.dim, options.classes)
    names = ("steps", "batch", "rows", "dim", "classes", "seed", "threads")
    setting = {
        **{name: getattr(options, name) for name in names},
        "torch": torch.__version__,
        "weight_decay": WEIGHT_DECAY,
        "beta2": BETA2,
        "schedule": SCHEDULE,
        "corpus": corpus.statistics,
    }
    return model, Task(corpus, options.classes, options.batch, options.seed), setting


def describe(model: NextToken, task: Task) -> dict[str, Any]:
    """Print and return the sizes of the model and of a step, and two losses for scale."""
    result = {
        **touched_rows(task, model),
        "dense_parameters": sum(p.numel() for p in model.rest()),
        "uniform_loss": math.log(task.classes),
        "unigram_loss": task.unigram_loss(task.sample("held-out", 4 * task.batch)[1]),
    }
    print(
        f"Tables of {model.tokens.num_embeddings:,} and {model.bigrams.num_embeddings:,} rows x "
        f"{model.tokens.embedding_dim} and {result['dense_parameters']:,} dense parameters.\n"
        f"A step: {task.batch:,} positions, {result['entries_per_step']:,} gradient entries, "
        f"{result['rows_per_step']:,} distinct rows.\n"
        f"Held-out loss for scale: {result['uniform_loss']:.3f} uniform, "
        f"{result['unigram_loss']:.3f} from token frequencies alone.",
        flush=True,
    )
    return result


def compare(
    model: NextToken, task: Task, setting: dict[str, Any], options: argparse.Namespace
) -> None:
    """Train all in turn; draw, write and print what came out."""
    result = setting | describe(model, task)
    begin = time.perf_counter()
    runs = [Run.start(name, TUNED[name], model, options.steps) for name in MAKE]
    train(runs, task, "held-out", options.steps, evaluations=min(12, options.steps))
    result["seconds"] = time.perf_counter() - begin
    result["runs"] = [run.measurements() for run in runs]
    save_plot(result, options.plot)
    if options.json:
        write_json(result, options.json)
    print(f"{result['seconds']:.0f} s with all evaluations. Curves: {options.plot}\n")
    print(table(result))
    print(f"\nAgainst {TORCH}, at the same steps:")
    for sentence in findings(result):
        print(f"  {sentence}")


def main() -> None:
    """Run the comparison or the search."""
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    model, task, setting = start(options)
    if options.tune:
        names = [options.tune_only] if options.tune_only else list(START)
        tune(names, model, task, options, setting)
    else:
        compare(model, task, setting, options)


def write_json(result: dict[str, Any], path: Path) -> None:
    """Write ``result`` to ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
