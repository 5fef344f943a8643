# SPDX-License-Identifier: Apache-2.0
"""How sign optimizers saturate the embeddings of rare tokens, and what helps.

    python examples/embedding_saturation.py            the study; a few minutes on two cores
    python examples/embedding_saturation.py --quick    the same in seconds, to see that it runs
    python examples/embedding_saturation.py --arms tiger,lazy

One model over torch's own sources is trained several times ("arms") from the same weights on the
same batches; only the treatment of the embedding table differs. Some hundred tokens are *planted*
as rare: all their occurrences but one are withheld from training. Half of what was withheld
measures the loss at rare tokens; the other half is for a short fine-tuning in which these tokens
become frequent.

The learning rate is constant, so that the predicted drift of a row seen once,
theta_t = theta* + (theta_0 - theta*)(1 - lr * weight_decay)^t, theta* = -sign(m) / weight_decay,
can be laid over the measured one. The table's weight decay is large, so that the fixed point is
reached within the run; with 0.01 it lies farther out and takes longer.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import corpus as corpus_module
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tiger_ext

ROOT = Path(__file__).parents[1]
CONTEXT = 4
HIDDEN = 128
BODY_WEIGHT_DECAY = 0.01
# "power" needs another learning rate: |m| ** 0.5 is small where sign(m) is 1. Its weight decay is
# divided by the same, so that lr * weight_decay stays.
POWER_FACTOR = 30.0
PLANTED_COUNTS = (20, 200)  # occurrences of a token that may be planted as rare
RARE_STEPS = 5  # a row is rare if so many steps touched it, or fewer
TOP = 256  # so many of the most frequent tokens are "frequent"
CHUNK = 1024
# What --quick takes instead of the defaults.
QUICK = {"steps": 400, "batch": 64, "lr": 2e-2, "files": 200, "classes": 256, "dim": 16}
QUICK |= {"planted": 60, "tune_steps": 60, "checkpoints": 8, "workers": 1}

ARMS = {
    "tiger": "dense Tiger",
    "lion": "dense Lion",
    "lazy": "lazy Tiger, sparse gradients",
    "decay": 'sparse Tiger, lazy="decay"',
    "exact": 'sparse Tiger, lazy="exact"',
    "nonzero": 'Tiger, rows="nonzero"',
    "tied": "tied, halves swapped",
    "tied-plain": "tied, not swapped",
    "adamw": "AdamW table, Tiger rest",
    "clip": 'direction="clip"',
    "power": 'direction="power"',
    "adamw-all": "torch AdamW throughout",
}
SPARSE = ("lazy", "decay", "exact")
MODES = ("decay", "exact")  # their rows lag until they are read or flushed
COMPARED = ("tiger", "exact")  # one rule, so their tables are compared
FAR = 1e-4  # of the bound; rounding alone stays below it


class Model(nn.Module):
    """Embeddings of the last tokens, a small network over them, and a softmax.

    Args:
        vocabulary: rows of the table.
        dim: width of the table.
        classes: outputs of an untied model: the most frequent tokens, the last for all others.
        table: "dense" or "sparse" gradients, or "tied" or "tied-plain".
    """

    def __init__(self, vocabulary: int, dim: int, classes: int, table: str) -> None:
        """See the class."""
        super().__init__()
        self.classes = classes
        self.tied = table.startswith("tied")
        self.body = nn.Sequential(
            nn.Linear(CONTEXT * dim, HIDDEN),
            nn.GELU(),
            nn.LayerNorm(HIDDEN),
            nn.Linear(HIDDEN, dim),
            nn.LayerNorm(dim),
        )
        self.head = None if self.tied else nn.Linear(dim, classes)
        if self.tied:
            from tiger_ext.nn import TiedEmbedding

            self.table = TiedEmbedding(vocabulary, dim, swap_halves=table == "tied")
        else:
            self.table = nn.Embedding(vocabulary, dim, sparse=table == "sparse")
        nn.init.normal_(self.table.weight, std=0.1)

    def forward(self, context: Tensor) -> Tensor:
        """Return the logits after ``context``, ids ``[batch, CONTEXT]``."""
        hidden = self.body(self.table(context).flatten(1))
        return self.table.logits(hidden) if self.head is None else self.head(hidden)

    def loss(self, context: Tensor, target: Tensor) -> Tensor:
        """Return the mean cross-entropy that is trained on."""
        return F.cross_entropy(self(context), target if self.tied else self.classes_of(target))

    def classes_of(self, target: Tensor) -> Tensor:
        """Return the classes of tokens: ids are ranks of frequency, so the rare ones clamp."""
        return target.clamp(max=self.classes - 1)

    @torch.no_grad()
    def evaluate(self, context: Tensor, target: Tensor) -> float:
        """Return the mean cross-entropy over the *classes*, tied or not, so that arms compare."""
        total = 0.0
        for ids, wanted in zip(context.split(CHUNK), target.split(CHUNK), strict=True):
            logits = self(ids)
            if self.tied:
                other = logits[:, self.classes - 1 :].logsumexp(1, keepdim=True)
                logits = torch.cat([logits[:, : self.classes - 1], other], 1)
            total += F.cross_entropy(logits, self.classes_of(wanted), reduction="sum").item()
        return total / len(target)


@dataclass
class Task:
    """The positions of every kind; a position is that of the target, after ``CONTEXT`` tokens."""

    tokens: Tensor
    vocabulary: int
    train: Tensor
    fine_tune: Tensor
    tests: dict[str, Tensor]
    touches: Tensor  # how many training steps touch each row
    first_touch: Tensor  # in which step, counted from 1, each row is touched first
    batch: int
    seed: int

    @classmethod
    def make(cls, options: argparse.Namespace) -> Task:
        """Read the corpus and plant the rare tokens."""
        corpus = corpus_module.load(options.cache, options.files)
        tokens, generator = corpus.tokens.long(), torch.Generator().manual_seed(options.seed)
        first_train = corpus.splits["train"][0]

        counts = torch.bincount(tokens[first_train:], minlength=corpus.vocabulary)
        low, high = PLANTED_COUNTS
        able = ((counts >= low) & (counts <= high)).nonzero().flatten()
        able = able[able >= options.classes]
        planted_ids = able[torch.randperm(len(able), generator=generator)[: options.planted]]
        planted = torch.zeros(corpus.vocabulary, dtype=torch.bool)
        planted[planted_ids] = True

        withheld = planted[tokens]
        where = withheld[first_train:].nonzero().flatten() + first_train
        where = where[torch.randperm(len(where), generator=generator)]
        kept = torch.full((corpus.vocabulary,), -1)
        kept[tokens[where]] = where
        withheld[kept[planted_ids]] = False

        positions = torch.arange(CONTEXT, len(tokens))
        in_context = sliding_any(withheld, CONTEXT)[:-1]
        in_window = sliding_any(withheld, CONTEXT + 1)
        training = positions >= first_train + CONTEXT
        shuffled = positions[training & ~in_window]
        shuffled = shuffled[torch.randperm(len(shuffled), generator=generator)]
        need = options.steps * options.batch
        train = shuffled.repeat(-(-need // len(shuffled)))[:need]
        rare = positions[training & in_context]
        test = rare // 4096 % 2 == 0

        touches = torch.zeros(corpus.vocabulary, dtype=torch.long)
        first_touch = torch.zeros(corpus.vocabulary, dtype=torch.long)
        offsets = torch.arange(-CONTEXT, 0)
        for step, at in enumerate(train.split(options.batch), 1):
            rows = tokens[at[:, None] + offsets].unique()
            first_touch[rows[touches[rows] == 0]] = step
            touches[rows] += 1
        natural = (touches > 0) & (touches <= RARE_STEPS) & ~planted
        held_out = positions[positions < first_train]
        natural_rare = held_out[sliding_any(natural[tokens], CONTEXT)[:-1][: len(held_out)]]
        tests = {"all": held_out, "rare": rare[test], "natural rare": natural_rare}
        tests = {
            name: at[torch.randperm(len(at), generator=generator)[: options.test_positions]]
            for name, at in tests.items()
        }
        return cls(
            tokens,
            corpus.vocabulary,
            train,
            rare[~test],
            tests,
            touches,
            first_touch,
            options.batch,
            options.seed,
        )

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return contexts and targets."""
        ids = self.tokens[positions[:, None] + torch.arange(-CONTEXT, 1)]
        return ids[:, :-1], ids[:, -1]

    def fine_tuning_batches(self, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches of which half have a planted token in the context."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        for _ in range(steps):
            halves = [
                pool[torch.randint(len(pool), (self.batch // 2,), generator=generator)]
                for pool in (self.fine_tune, self.train)
            ]
            yield self.at(torch.cat(halves))


def sliding_any(flags: Tensor, width: int) -> Tensor:
    """Return for each window of ``width`` neighbours whether any flag is set."""
    total = F.pad(flags.long().cumsum(0), (1, 0))
    return total[width:] > total[:-width]


def make_optimizer(
    arm: str, model: Model, lr: float, weight_decay: float
) -> tuple[torch.optim.Optimizer, float]:
    """Return the arm's optimizer and the weight decay of its table."""
    table: dict[str, Any] = {"params": [model.table.weight], "weight_decay": weight_decay}
    rest: dict[str, Any] = {"params": [*model.body.parameters()]}
    if model.head is not None:
        rest["params"] += model.head.parameters()
    rest["weight_decay"] = BODY_WEIGHT_DECAY
    if arm == "lion":
        return tiger_ext.Lion([table, rest], lr=lr), weight_decay
    if arm == "adamw-all":
        return torch.optim.AdamW([table, rest], lr=lr), weight_decay
    if arm == "adamw":
        table |= {"algorithm": "adamw", "lr": lr}
    elif arm in MODES:
        table["lazy"] = arm
    elif arm == "nonzero":
        table["rows"] = "nonzero"
    elif arm == "clip":
        table["direction"] = "clip"
    elif arm == "power":
        table |= {"direction": "power", "lr": lr * POWER_FACTOR}
        table["weight_decay"] = weight_decay / POWER_FACTOR
    return tiger_ext.Tiger([table, rest], lr=lr), table["weight_decay"]


def run_arm(arm: str, options: argparse.Namespace, task: Task | None = None) -> dict[str, Any]:
    """Train one arm, fine-tune it, and return all that was measured.

    For the arms in ``COMPARED`` the item "tables" is the whole table at each measurement, and
    "once" the rows that are followed as seen once; ``compare_tables`` takes both out.
    """
    torch.set_num_threads(options.threads)
    task = task or Task.make(options)
    torch.manual_seed(options.seed)
    kind = "sparse" if arm in SPARSE else arm if arm.startswith("tied") else "dense"
    model = Model(task.vocabulary, options.dim, options.classes, kind)
    optimizer, weight_decay = make_optimizer(arm, model, options.lr, options.weight_decay)
    weight = model.table.weight
    if arm in MODES:
        optimizer.track(model.table)  # the rows of a batch are current when they are read

    tests = {name: task.at(positions) for name, positions in task.tests.items()}
    rare = (task.touches > 0) & (task.touches <= RARE_STEPS)
    # Rows that one step touches, and early: these have the rest of the run to drift.
    early = task.first_touch <= max(1, options.steps // 20)
    once = ((task.touches == 1) & early).nonzero().flatten()
    snapshots: list[tuple[int, Tensor]] = []
    history: list[dict[str, float]] = []
    tables: list[Any] = []
    # Beside "exact", a copy of its table under dense Tiger with the very same gradients.
    beside = weight.detach().clone().requires_grad_() if arm == "exact" else None
    if beside is not None:
        dense = tiger_ext.Tiger([beside], lr=options.lr, weight_decay=weight_decay)
    beside_seconds = 0.0
    beside_apart: list[Tensor] = []
    start = weight.detach()[once].clone()

    def bring_up_to_date() -> None:
        if arm in MODES:
            optimizer.flush(progress=False)

    def measure(step: int) -> None:
        bring_up_to_date()
        bound = weight.detach().abs() * weight_decay
        norms = weight.detach().norm(dim=1)
        snapshots.append((step, weight.detach()[once].clone()))
        if arm in COMPARED:
            tables.append(weight.detach().clone().numpy())
        if beside is not None:
            beside_apart.append((weight.detach() - beside.detach()).abs() * weight_decay)
        history.append(
            {
                "step": step,
                "max_bound": bound.max().item(),
                "share_090": (bound >= 0.9).float().mean().item(),
                "share_090_rare": (bound[rare] >= 0.9).float().mean().item(),
                "rare_norm": norms[rare].mean().item(),
                "frequent_norm": norms[:TOP].mean().item(),
                **{f"loss {name}": model.evaluate(*test) for name, test in tests.items()},
            }
        )

    def train(context: Tensor, target: Tensor) -> None:
        nonlocal beside_seconds
        model.loss(context, target).backward()
        if beside is not None and weight.grad is not None:
            at = time.perf_counter()
            weight.grad = weight.grad.coalesce()
            beside.grad = weight.grad.to_dense()
            dense.step()
            beside_seconds += time.perf_counter() - at
        optimizer.step()
        optimizer.zero_grad()

    due = {round(options.steps * i / options.checkpoints) for i in range(options.checkpoints + 1)}
    measure(0)
    begin = time.perf_counter()
    for step, positions in enumerate(task.train.split(options.batch), 1):
        train(*task.at(positions))
        if step in due:
            measure(step)
    seconds = time.perf_counter() - begin - beside_seconds
    drift = compare_drift(
        snapshots,
        start,
        optimizer.state[weight]["exp_avg"][once],
        task.first_touch[once],
        options.lr,
        options.weight_decay,
        weight_decay,
    )

    tuning = [{"step": 0, **{name: history[-1][f"loss {name}"] for name in tests}}]
    every = max(1, options.tune_steps // 10)
    for step, batch in enumerate(task.fine_tuning_batches(options.tune_steps), 1):
        train(*batch)
        if step % every == 0:
            bring_up_to_date()
            losses = {name: model.evaluate(*test) for name, test in tests.items()}
            tuning.append({"step": step, **losses})
    return {
        "arm": arm,
        "name": ARMS[arm],
        "table_weight_decay": weight_decay,
        "rows": {
            "all": task.vocabulary,
            "rare": int(rare.sum()),
            "seen_once": int((task.touches == 1).sum()),
            "seen_once_early": len(once),
            "never_seen": int((task.touches == 0).sum()),
        },
        "test_positions": {name: len(test[1]) for name, test in tests.items()},
        "history": history,
        "drift": drift,
        "fine_tuning": tuning,
        "training_seconds": seconds,
        **({"on_same_gradients": describe(beside_apart)} if beside_apart else {}),
        **({"tables": tables, "once": once.tolist()} if arm in COMPARED else {}),
    }


def compare_drift(
    snapshots: list[tuple[int, Tensor]],
    start: Tensor,
    momentum: Tensor,
    seen: Tensor,
    lr: float,
    weight_decay: float,
    own_weight_decay: float,
) -> list[dict[str, float]]:
    """Return mean |theta| * weight_decay of rows seen once, measured and predicted for dense sign.

    Args:
        snapshots: (step, the rows) over the run.
        start: the rows before the run.
        momentum: of the rows after the run; only its sign is used.
        seen: the step, counted from 1, that saw each row.
        lr: of the sign rule.
        weight_decay: of the sign rule.
        own_weight_decay: of the arm that was measured.
    """
    fixed_point = -momentum.double().sign() / weight_decay
    keep = 1 - lr * weight_decay
    result = []
    for step, measured in snapshots:
        # Until it is seen a row has no momentum and only decays.
        before = start.double() * (keep ** (seen - 1).clamp(max=step).double())[:, None]
        walked = (step - seen + 1).clamp(min=0).double()
        predicted = fixed_point + (before - fixed_point) * (keep**walked)[:, None]
        predicted = torch.where((walked > 0)[:, None], predicted, before)
        values = measured.double() * own_weight_decay
        result.append(
            {
                "step": step,
                "measured": values.abs().mean().item(),
                "predicted": (predicted * weight_decay).abs().mean().item(),
                "largest_error": (values - predicted * weight_decay).abs().max().item(),
            }
        )
    return result


def describe(apart: list[Tensor]) -> list[dict[str, float]]:
    """Return, of each tensor of differences, how many are large, and the largest of the others."""
    return [
        {"elements_far": int((x > FAR).sum()), "largest_of_others": x[x <= FAR].max().item()}
        for x in apart
    ]


def compare_tables(done: dict[str, dict[str, Any]]) -> list[dict[str, float]]:
    """Return how far arm "exact" is from arm "tiger" at each measurement, and drop the tables.

    Differences are multiplied by the weight decay: they are in units of the bound. The arms round
    differently: "exact" takes skipped steps at once, and sparse and dense gradients may add up a
    batch's repeated tokens in different orders. Where a momentum is near 0 that turns a sign; the
    next gradients differ by more than rounding, and the two runs part.
    """
    arms = [done[arm] for arm in COMPARED if arm in done]
    tables = [[torch.from_numpy(t) for t in arm.pop("tables")] for arm in arms]
    once = [arm.pop("once") for arm in arms]
    if len(arms) < len(COMPARED):
        return []
    result = []
    for point, dense, exact in zip(arms[0]["history"], *tables, strict=True):
        apart = (exact.double() - dense.double()).abs() * arms[0]["table_weight_decay"]
        result.append(
            {
                "step": point["step"],
                "largest": apart.max().item(),
                "mean": apart.mean().item(),
                "share_far": (apart > FAR).double().mean().item(),
                "largest_seen_once": apart[once[0]].max().item(),
                "mean_seen_once": apart[once[0]].mean().item(),
            }
        )
    return result


def save_plot(result: dict[str, Any], path: Path) -> None:
    """Draw the six panels of the study into a PNG file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 9), layout="constrained")
    axes = figure.subplots(2, 3).flat
    drift, share, largest, norm, loss, tuning = axes
    styles = ("-", "--", "-.")
    handles = []
    for index, arm in enumerate(result["arms"]):
        style = {"color": f"C{index % 10}", "ls": styles[index % 3], "lw": 1.6}
        history = arm["history"]
        steps = [point["step"] for point in history]
        # Arms on the predicted curve are marks.
        mark = {"tiger": "o", "lion": "o", "exact": "x"}.get(arm["arm"])
        look = {**style, "ls": "none", "marker": mark, "ms": 4 if mark == "o" else 8}
        measured = [point["measured"] for point in arm["drift"]]
        drift.plot(steps, measured, **(look if mark else style))
        for axis, key in (
            (share, "share_090_rare"),
            (largest, "max_bound"),
            (norm, "rare_norm"),
            (loss, "loss rare"),
        ):
            axis.plot(steps, [point[key] for point in history], **style)
        points = arm["fine_tuning"]
        line = tuning.plot([p["step"] for p in points], [p["rare"] for p in points], **style)
        handles.append(line[0])
    dense = [arm for arm in result["arms"] if arm["arm"] in ("tiger", "lion")]
    if dense:
        points = dense[0]["drift"]
        drift.plot(
            [p["step"] for p in points],
            [p["predicted"] for p in points],
            color="black",
            lw=1,
            label=r"predicted: $\theta^*+(\theta_0-\theta^*)(1-\eta\lambda)^t$",
        )
        drift.legend()
    drift.set(title=r"Rows seen in one early step: mean |θ|·λ", xlabel="step")
    share.set(title="Rare rows: share of elements with |θ|·λ ≥ 0.9", xlabel="step")
    largest.set(title="Whole table: largest |θ|·λ", xlabel="step")
    norm.set(title="Mean norm of rare rows", xlabel="step", yscale="log")
    loss.set(title="Loss where the context has a rare token", xlabel="step", ylabel="nats")
    tuning.set(title="The same in fine-tuning: rare tokens frequent", xlabel="step", ylabel="nats")
    for axis in (loss, tuning):
        final = [arm["history"][-1]["loss rare"] for arm in result["arms"]]
        ends = [arm["fine_tuning"][-1]["rare"] for arm in result["arms"]]
        axis.set_ylim(0.95 * min(final + ends), 1.05 * max(final + ends) + 0.3)
    for axis in axes:
        axis.grid(alpha=0.3)
    names = [arm["name"] for arm in result["arms"]]
    figure.legend(handles, names, loc="outside lower center", ncols=6)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def table(result: dict[str, Any]) -> str:
    """Return the closing table, a row an arm."""
    lines = [
        "                               drift  share   norm of rows      loss after training   "
        "   rare, fine-tuned  train\n"
        "arm                            |θ|λ   >=0.9   rare  frequent   all    rare   natural  "
        "  before   after    s"
    ]
    for arm in result["arms"]:
        last, tuned = arm["history"][-1], arm["fine_tuning"]
        lines.append(
            f"{arm['name']:29} {arm['drift'][-1]['measured']:6.3f} {last['share_090_rare']:7.3f} "
            f"{last['rare_norm']:6.2f} {last['frequent_norm']:7.2f}  "
            f"{last['loss all']:6.3f}  {last['loss rare']:6.3f}  {last['loss natural rare']:6.3f}  "
            f"  {tuned[0]['rare']:6.3f}  {tuned[-1]['rare']:6.3f}  {arm['training_seconds']:5.0f}"
        )
    return "\n".join(lines)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="few files, small table, few steps")
    add("--arms", default=",".join(ARMS), help="comma-separated (default %(default)s)")
    add("--steps", type=int, default=2000, help="training steps (default %(default)s)")
    add("--tune-steps", type=int, default=300, help="fine-tuning steps (default %(default)s)")
    add("--batch", type=int, default=128, help="positions per step (default %(default)s)")
    add("--lr", type=float, default=4e-3, help="constant learning rate (default %(default)s)")
    add("--weight-decay", type=float, default=0.5, help="of the table (default %(default)s)")
    add("--dim", type=int, default=32, help="width of the table (default %(default)s)")
    add("--classes", type=int, default=1024, help="outputs (default %(default)s)")
    add("--files", type=int, default=400, help="source files that are read (default %(default)s)")
    add("--planted", type=int, default=400, help="tokens made rare (default %(default)s)")
    add("--test-positions", type=int, default=2048, help="most of a kind (default %(default)s)")
    add("--checkpoints", type=int, default=16, help="measurements (default %(default)s)")
    add("--seed", type=int, default=0, help="of weights and batches (default %(default)s)")
    add("--workers", type=int, default=2, help="arms trained at once (default %(default)s)")
    add("--threads", type=int, default=1, help="torch's threads of each (default %(default)s)")
    add("--cache", type=Path, default=corpus_module.default_cache(), help="folder for the tokens")
    add("--plot", type=Path, default=ROOT / "docs" / "embedding_saturation.png", help="picture")
    results = ROOT / "benchmarks" / "results"
    add("--json", type=Path, default=results / "embedding_saturation.json", help="numbers")
    if parser.parse_known_args(arguments)[0].quick:
        parser.set_defaults(**QUICK)
    options = parser.parse_args(arguments)
    options.arms = options.arms.split(",")
    if unknown := [arm for arm in options.arms if arm not in ARMS]:
        parser.error(f"unknown arms {unknown}; there are {list(ARMS)}")
    return options


def main() -> None:
    """Run the study."""
    options = parse_arguments()
    try:
        import matplotlib  # noqa: F401
        from tqdm import tqdm
    except ModuleNotFoundError as error:
        if error.name not in ("matplotlib", "tqdm"):
            raise
        sys.exit(f"The study needs {error.name}: pip install 'tiger_ext[bench]'")
    begin = time.perf_counter()
    corpus_module.load(options.cache, options.files)  # once, before the workers want it
    done: dict[str, dict[str, Any]] = {}
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(tqdm(total=len(options.arms), unit="arm", dynamic_ncols=True))
        if options.workers > 1:
            spawn = multiprocessing.get_context("spawn")
            pool = stack.enter_context(ProcessPoolExecutor(options.workers, mp_context=spawn))
            # The slow arms first.
            order = sorted(options.arms, key=lambda arm: not arm.startswith("tied"))
            futures = [pool.submit(run_arm, arm, options) for arm in order]
            finished = (future.result() for future in as_completed(futures))
        else:
            torch.set_num_threads(options.threads)
            task = Task.make(options)
            finished = (run_arm(arm, options, task) for arm in options.arms)
        for arm in finished:
            done[arm["arm"]] = arm
            bar.set_postfix_str(arm["name"], refresh=False)
            bar.update()
    setting = {
        name: value
        for name, value in vars(options).items()
        if name not in ("cache", "plot", "json", "arms", "quick")
    }
    apart = compare_tables(done)
    result = {
        "setting": {**setting, "body_weight_decay": BODY_WEIGHT_DECAY, "torch": torch.__version__},
        "seconds": time.perf_counter() - begin,
        "exact_against_tiger": apart,
        "arms": [done[arm] for arm in options.arms],
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=1) + "\n")
    save_plot(result, options.plot)
    rows = result["arms"][0]["rows"]
    print(
        f"{rows['all']:,} rows: {rows['rare']:,} touched by 1 to {RARE_STEPS} steps, "
        f"{rows['seen_once']:,} by one, {rows['never_seen']:,} by none. "
        f"1/weight_decay = {1 / options.weight_decay:g}. {result['seconds']:.0f} s in all.\n"
    )
    print(table(result))
    if "exact" in done:
        last = done["exact"]["on_same_gradients"][-1]
        print(
            f'\nTables of lazy="exact" and of dense Tiger on the same gradients: '
            f"{last['elements_far']} elements differ by more than {FAR:g} of the bound; "
            f"largest difference of the others {last['largest_of_others']:.2g}."
        )
    if apart:
        last = apart[-1]
        print(
            "The two arms, each on its own gradients, in units of the bound: "
            f"largest {last['largest']:.2g}, mean {last['mean']:.2g}, "
            f"{last['share_far']:.2%} above {FAR:g}; "
            f"rows seen once: largest {last['largest_seen_once']:.2g}."
        )
    print(f"\nNumbers: {options.json}. Curves: {options.plot}")


if __name__ == "__main__":
    main()
