# SPDX-License-Identifier: Apache-2.0
"""examples/next_token.py runs, learns and reports what it promises."""

import json
import math

import pytest
import torch
from example_scripts import ROOT, run_script

SCRIPT = ROOT / "examples" / "next_token.py"
NAMES = ["Tiger", "tiger_ext AdamW", "torch SparseAdam + AdamW"]

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Holds the token cache, which the tests share, and what the smoke run wrote."""
    return tmp_path_factory.mktemp("next_token")


@pytest.fixture(scope="module")
def smoke(folder):
    done = run_script(
        "next_token.py",
        "--smoke",
        *("--threads", "1", "--cache", str(folder)),
        *("--plot", str(folder / "curves.png"), "--json", str(folder / "result.json")),
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads((folder / "result.json").read_text())


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import next_token

    return next_token


def test_loss_falls_for_all_three(smoke):
    _, result = smoke
    assert [run["name"] for run in result["runs"]] == NAMES
    for run in result["runs"]:
        losses = [point["loss"] for point in run["held_out"]]
        assert all(map(math.isfinite, losses))
        assert losses[-1] < losses[0] - 1
    starts = {run["held_out"][0]["loss"] for run in result["runs"]}
    assert len(starts) == 1, "the models must start from the same weights"


def test_all_take_the_same_number_of_steps(smoke):
    _, result = smoke
    for run in result["runs"]:
        assert len(run["optimizer_ms_per_step"]) == result["steps"]
        assert run["held_out"][-1]["step"] == result["steps"]


def test_seconds_are_those_of_the_steps_alone(smoke):
    _, result = smoke
    for run in result["runs"]:
        steps = run["step_ms_per_step"]
        pairs = zip(run["optimizer_ms_per_step"], steps, strict=True)
        assert all(0 < optimizer < whole for optimizer, whole in pairs)
        for point in run["held_out"]:
            assert point["seconds"] == pytest.approx(sum(steps[: point["step"]]) / 1e3)
    assert sum(run["held_out"][-1]["seconds"] for run in result["runs"]) < result["seconds"]


def test_state_is_one_tensor_against_two(smoke):
    _, result = smoke
    tiger, *adams = result["runs"]
    elements = result["dense_parameters"] + result["dim"] * (
        result["rows"] + result["corpus"]["distinct_tokens"]
    )
    assert tiger["state_bytes"] == 4 * elements
    for run in adams:
        assert 8 * elements <= run["state_bytes"] < 8 * elements + 1000


def test_adamw_is_a_drop_in(example, folder, smoke):
    """At the same rates it trains like torch's pair, step for step; Tiger does not."""
    stored = example.corpus_module.load(folder, 200)
    torch.manual_seed(0)
    model = example.NextToken(stored.vocabulary, 2**12, 8, 256)
    task = example.Task(stored, 256, 256, seed=0)
    rates = example.Rates(0.1, 0.1, 6e-3, 0.9)
    runs = [example.Run.start(name, rates, model, steps=30) for name in NAMES]
    example.train(runs, task, "held-out", steps=30, evaluations=30)
    tiger, ours, theirs = (torch.tensor([loss for _, _, loss in run.losses]) for run in runs)
    assert theirs[-1] < theirs[0] - 1
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3)
    assert (tiger - theirs).abs().max() > 0.1


def test_statistics_describe_the_gradient(smoke):
    _, result = smoke
    assert result["corpus"]["files"] == 200
    assert 0 < result["corpus"]["tokens_seen_once"] < result["corpus"]["distinct_tokens"]
    assert result["corpus"]["distinct_bigrams"] > result["corpus"]["distinct_tokens"]
    assert result["entries_per_step"] == 7 * result["batch"]  # 4 tokens, 3 bigrams
    assert 0 < result["rows_per_step"] < result["entries_per_step"]
    assert result["unigram_loss"] < result["uniform_loss"] == math.log(result["classes"])


def test_the_table_and_the_findings_come_last(smoke):
    out, result = smoke
    head, _, *rows, _, title = (lines := out.rstrip().splitlines())[-13:-6]
    assert "held-out loss" in head and "whole step ms" in head and "state MiB" in head
    for row, run in zip(rows, result["runs"], strict=True):
        loss, optimizer, step, seconds, state = row.removeprefix(run["name"]).split()
        assert float(loss) == pytest.approx(run["held_out"][-1]["loss"], abs=1e-3)
        assert float(optimizer) == pytest.approx(run["optimizer_ms"], abs=0.1)
        assert float(step) == pytest.approx(run["step_ms"], abs=0.1)
        assert float(seconds) == pytest.approx(run["held_out"][-1]["seconds"], abs=0.1)
        assert float(state) == pytest.approx(run["state_bytes"] / 2**20, abs=0.1)
    assert title.startswith(f"Against {NAMES[2]}")
    subjects = [line.strip().partition(":")[0] for line in lines[-6:]]
    whats = ("time", "memory", "loss")
    assert subjects == [f"{name}, {what}" for name in NAMES[:2] for what in whats]


def run_of(name, *, loss, optimizer_ms, step_ms, seconds, state_bytes):
    return {
        "name": name,
        "held_out": [{"loss": 9.0, "seconds": 0.0}, {"loss": loss, "seconds": seconds}],
        "optimizer_ms": optimizer_ms,
        "step_ms": step_ms,
        "state_bytes": state_bytes,
    }


def test_findings_follow_the_figures(example):
    peer = run_of(
        "P", loss=2.0, optimizer_ms=20.0, step_ms=100.0, seconds=50.0, state_bytes=2 * 2**20
    )
    good = run_of("G", loss=1.9, optimizer_ms=2.0, step_ms=80.0, seconds=45.0, state_bytes=2**20)
    bad = run_of(
        "B", loss=2.1, optimizer_ms=40.0, step_ms=125.0, seconds=60.0, state_bytes=3 * 2**20
    )
    same = run_of(
        "S", loss=2.004, optimizer_ms=20.0, step_ms=100.0, seconds=50.0, state_bytes=2 * 2**20
    )
    assert example.findings({"runs": [good, bad, same, peer]}) == [
        "G, time: the optimizer is 10.0 times faster, the whole step 20% shorter, "
        "all steps with the first ones, which allocate the state, 10% shorter.",
        "G, memory: 1.0 MiB less optimizer state, 50% of it.",
        "G, loss: 0.100 nats per token lower.",
        "B, time: the optimizer is 2.0 times slower, the whole step 25% longer, "
        "all steps with the first ones, which allocate the state, 20% longer.",
        "B, memory: 1.0 MiB more optimizer state, 150% of it.",
        "B, loss: 0.100 nats per token higher.",
        "S, time: the optimizer is 1.0 times faster, the whole step 0% shorter, "
        "all steps with the first ones, which allocate the state, 0% shorter.",
        "S, memory: as much optimizer state.",
        "S, loss: the same to two decimals (2.004 and 2.000 nats per token).",
    ]


def test_picture_is_a_png(smoke, folder):
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG\r\n")


def test_tune_writes_every_trial(folder, smoke):
    path = folder / "sweep.json"
    done = run_script(
        "next_token.py",
        *("--smoke", "--tune", "--tune-trials", "2", "--threads", "1"),
        *("--cache", str(folder), "--tune-json", str(path)),
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(path.read_text())
    assert result["steps"] == smoke[1]["steps"]
    assert [search["name"] for search in result["searches"]] == [NAMES[0], NAMES[2]]
    for search in result["searches"]:
        assert len(search["trials"]) == 2
        best = min(search["trials"], key=lambda trial: trial["validation_loss"])
        assert search["best"] == best["rates"]


def test_search_goes_to_the_minimum_and_ends_in_time(example):
    start = example.START[example.TIGER]
    goal = start.moved("tokens", 4).moved("dense", 1 / 2).moved("beta", 2)

    def loss(rates):
        if rates.bigrams > start.bigrams:
            return math.nan
        horizon = math.log((1 - goal.beta) / (1 - rates.beta))
        others = (math.log(getattr(rates, k) / getattr(goal, k)) for k in example.KNOBS[:3])
        return horizon**2 + sum(x**2 for x in others)

    counts = []
    search = example.Search(example.TIGER, loss, limit=17)
    search.run(lambda: counts.append(len(search.losses)))
    assert search.best == goal
    assert counts == list(range(1, 18))
    assert len(search.result()["trials"]) == 17


def test_rates_are_the_best_of_the_committed_search(example):
    """Which took as many trials for each, of the length that the demo runs."""
    sweep = json.loads(example.SWEEP_FILE.read_text())
    assert sweep["steps"] == example.STEPS
    assert len({len(search["trials"]) for search in sweep["searches"]}) == 1
    for search in sweep["searches"]:
        best = min(search["trials"], key=lambda trial: trial["validation_loss"])
        assert search["best"] == best["rates"] == vars(example.TUNED[search["name"]])
        assert search["trials"][0]["rates"] == vars(example.START[search["name"]])
    assert [search["name"] for search in sweep["searches"]] == [NAMES[0], NAMES[2]]
    assert example.TUNED[NAMES[1]] == example.TUNED[NAMES[2]]


@pytest.mark.parametrize("name", ["matplotlib", "tqdm"])
def test_missing_package_is_one_sentence(name, tmp_path):
    (tmp_path / f"{name}.py").write_text(
        f"raise ModuleNotFoundError(\"No module named '{name}'\", name='{name}')\n"
    )
    done = run_script("next_token.py", "--smoke", path=tmp_path)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines() == [
        f"The demo needs {name}: pip install 'tiger_ext[demo]'"
    ]


def test_cache_holds_the_corpus(example, folder, smoke, monkeypatch):
    corpus = example.corpus_module
    monkeypatch.setattr(corpus, "_tokenise", None)  # it must not be needed again
    stored = corpus.load(folder, 200)
    assert len(stored.tokens) == stored.statistics["tokens"]
    (_, first), (second, third), (fourth, last) = stored.splits.values()
    assert 0 < first == second < third == fourth < last == len(stored.tokens)
    counts = torch.bincount(stored.tokens)
    assert len(counts) == stored.vocabulary
    assert (counts[:-1] >= counts[1:]).all(), "ids must be ranks of frequency"
