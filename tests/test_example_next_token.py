# SPDX-License-Identifier: Apache-2.0
"""examples/next_token.py runs, learns and reports what it promises."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tiger_ext

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "examples" / "next_token.py"

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")


PACKAGE = Path(tiger_ext.__file__).resolve().parents[1]  # the one under test


def run_script(*arguments: str, path: Path = PACKAGE) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(path), str(PACKAGE)])},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Holds the token cache, which the tests share, and what the smoke run wrote."""
    return tmp_path_factory.mktemp("next_token")


@pytest.fixture(scope="module")
def smoke(folder):
    done = run_script(
        "--smoke",
        *("--threads", "1", "--cache", str(folder)),
        *("--plot", str(folder / "curves.png"), "--json", str(folder / "result.json")),
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads((folder / "result.json").read_text())


def test_loss_falls_for_both_optimizers(smoke):
    _, result = smoke
    assert [run["name"] for run in result["runs"]] == ["Tiger", "SparseAdam + AdamW"]
    for run in result["runs"]:
        losses = [loss for _, loss in run["held_out"]]
        assert all(map(math.isfinite, losses))
        assert losses[-1] < losses[0] - 1
    starts = {run["held_out"][0][1] for run in result["runs"]}
    assert len(starts) == 1, "the models must start from the same weights"


def test_both_take_the_same_number_of_steps(smoke):
    _, result = smoke
    for run in result["runs"]:
        assert len(run["optimizer_ms_per_step"]) == result["steps"]
        assert run["held_out"][-1][0] == result["steps"]


def test_state_is_one_tensor_against_two(smoke):
    _, result = smoke
    ours, peer = result["runs"]
    elements = result["dense_parameters"] + result["dim"] * (
        result["rows"] + result["corpus"]["distinct_tokens"]
    )
    assert ours["state_bytes"] == 4 * elements
    assert peer["state_bytes"] >= 8 * elements
    assert result["state_ratio"] == pytest.approx(2, rel=1e-3)


def test_statistics_describe_the_gradient(smoke):
    _, result = smoke
    assert result["corpus"]["files"] == 200
    assert 0 < result["corpus"]["tokens_seen_once"] < result["corpus"]["distinct_tokens"]
    assert result["corpus"]["distinct_bigrams"] > result["corpus"]["distinct_tokens"]
    assert result["entries_per_step"] == 7 * result["batch"]  # 4 tokens, 3 bigrams
    assert 0 < result["rows_per_step"] < result["entries_per_step"]
    assert result["unigram_loss"] < result["uniform_loss"] == math.log(result["classes"])


def test_the_table_comes_last(smoke):
    out, result = smoke
    lines = out.rstrip().splitlines()[-6:]
    assert "held-out loss" in lines[0] and "state MiB" in lines[0]
    assert lines[2].startswith("Tiger ")
    assert lines[3].startswith("SparseAdam + AdamW ")
    assert f"{result['time_ratio']:.2f} x" in lines[5]
    assert f"{result['state_ratio']:.2f} x" in lines[5]


def test_picture_is_a_png(smoke, folder):
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG\r\n")


def test_tune_writes_every_trial(smoke, folder):
    path = folder / "sweep.json"
    done = run_script(
        *("--smoke", "--tune", "--tune-trials", "2", "--threads", "1"),
        *("--cache", str(folder), "--tune-json", str(path)),
    )
    assert done.returncode == 0, done.stderr
    for search in json.loads(path.read_text())["searches"]:
        assert len(search["trials"]) == 2
        best = min(search["trials"], key=lambda trial: trial["validation_loss"])
        assert search["best"] == best["lr"]


@pytest.mark.parametrize("name", ["matplotlib", "tqdm"])
def test_missing_package_is_one_sentence(name, tmp_path):
    (tmp_path / f"{name}.py").write_text(
        f"raise ModuleNotFoundError(\"No module named '{name}'\", name='{name}')\n"
    )
    done = run_script("--smoke", path=tmp_path)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines() == [
        f"The demo needs {name}: pip install 'tiger_ext[demo]'"
    ]


def test_cache_holds_the_corpus(folder, smoke, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import corpus

    monkeypatch.setattr(corpus, "_tokenise", None)  # it must not be needed again
    stored = corpus.load(folder, 200)
    assert len(stored.tokens) == stored.statistics["tokens"]
    (_, first), (second, third), (fourth, last) = stored.splits.values()
    assert 0 < first == second < third == fourth < last == len(stored.tokens)
    counts = torch.bincount(stored.tokens)
    assert len(counts) == stored.vocabulary
    assert (counts[:-1] >= counts[1:]).all(), "ids must be ranks of frequency"
