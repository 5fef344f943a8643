# SPDX-License-Identifier: Apache-2.0
"""examples/embedding_saturation.py shows the predicted drift, and remedies that stop it."""

import json

import pytest
from example_scripts import run_script

ARMS = ["tiger", "lion", "lazy", "decay", "exact", "nonzero"]

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("embedding_saturation")


@pytest.fixture(scope="module")
def study(folder):
    done = run_script(
        "embedding_saturation.py",
        "--quick",
        *("--arms", ",".join(ARMS), "--cache", str(folder)),
        *("--plot", str(folder / "study.png"), "--json", str(folder / "study.json")),
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((folder / "study.json").read_text())
    assert [arm["arm"] for arm in result["arms"]] == ARMS
    return {arm["arm"]: arm for arm in result["arms"]} | {"apart": result["exact_against_tiger"]}


@pytest.mark.parametrize("arm", ["tiger", "lion", "exact"])
def test_dense_rules_follow_the_prediction(study, arm):
    assert study[arm]["rows"]["seen_once_early"] >= 20
    drift = study[arm]["drift"]
    for point in drift:
        assert point["largest_error"] < 1e-3
        assert point["measured"] == pytest.approx(point["predicted"], abs=1e-3)
    assert drift[0]["measured"] < 0.1
    assert drift[-1]["measured"] > 0.9, "the run must be long enough to reach the fixed point"


def test_lazy_rows_stay_away_from_the_bound(study):
    for arm in ("lazy", "nonzero", "decay"):
        assert study[arm]["drift"][-1]["measured"] < 0.1
        assert study[arm]["history"][-1]["share_090_rare"] < 0.01
        assert study[arm]["history"][-1]["rare_norm"] < study["tiger"]["history"][-1]["rare_norm"]
    assert study["tiger"]["history"][-1]["share_090_rare"] > 0.2


def test_exact_rows_are_dense_tigers_at_every_measurement(study):
    exact, tiger = study["exact"], study["tiger"]
    assert len(study["apart"]) == len(tiger["history"])
    for ours, dense, apart in zip(exact["drift"], tiger["drift"], study["apart"], strict=True):
        assert ours["measured"] == pytest.approx(dense["measured"], abs=1e-4)
        assert apart["largest_seen_once"] < 1e-4
    assert study["apart"][-1]["mean"] > 0, "the two arms' tables must come from two runs"
    # Later the two runs may part, when rounding turns signs; stale reads would part them at once.
    assert study["apart"][1]["share_far"] < 0.001
    last = exact["history"][-1]
    for key in ("share_090_rare", "rare_norm", "max_bound"):
        assert last[key] == pytest.approx(tiger["history"][-1][key], rel=0.02)


def test_exact_is_dense_tiger_on_the_same_gradients(study):
    points = study["exact"]["on_same_gradients"]
    assert len(points) == len(study["exact"]["history"])
    # Rounding turns the sign of a momentum that a gradient cancels, of one element or the other.
    assert all(point["elements_far"] <= 5 for point in points)
    assert 0 < points[-1]["largest_of_others"] < 1e-5


def test_decay_shrinks_untouched_rows_as_the_dense_rule_does(study):
    arm, steps = study["decay"], len(study["decay"]["drift"])
    shares = [point["measured"] for point in arm["drift"]]
    assert steps > 4
    assert shares == sorted(shares, reverse=True), "no drift, at any measurement"
    # lr * weight_decay is 0.01 in --quick; all but the one touched of 400 steps only shrink.
    assert shares[-1] == pytest.approx(shares[0] * 0.99**400, rel=0.5)
    assert arm["history"][-1]["rare_norm"] < 0.2 * study["lazy"]["history"][-1]["rare_norm"]


def test_sparse_gradients_and_nonzero_rows_are_the_same_rule(study):
    lazy, nonzero = (study[arm]["history"][-1] for arm in ("lazy", "nonzero"))
    assert nonzero["loss all"] == pytest.approx(lazy["loss all"], abs=0.02)
    assert nonzero["rare_norm"] == pytest.approx(lazy["rare_norm"], rel=0.02)


def test_every_arm_learns_and_is_fine_tuned(study):
    starts = set()
    for arm in (study[name] for name in ARMS):
        first, last = arm["history"][0], arm["history"][-1]
        starts.add(first["loss all"])
        assert last["loss all"] < first["loss all"] - 1
        tuning = arm["fine_tuning"]
        assert tuning[0]["rare"] == last["loss rare"]
        assert tuning[-1]["rare"] < tuning[0]["rare"]
    assert len(starts) == 1, "the arms must start from the same weights"


def test_picture_is_a_png(study, folder):
    assert (folder / "study.png").read_bytes().startswith(b"\x89PNG\r\n")


def test_tied_arms_run(folder):
    done = run_script(
        "embedding_saturation.py",
        "--quick",
        *("--arms", "tied,tied-plain", "--steps", "4", "--tune-steps", "2", "--checkpoints", "2"),
        *("--cache", str(folder), "--plot", str(folder / "tied.png")),
        *("--json", str(folder / "tied.json")),
    )
    assert done.returncode == 0, done.stderr
    assert len(json.loads((folder / "tied.json").read_text())["arms"]) == 2


def test_unknown_arm_is_named():
    done = run_script("embedding_saturation.py", "--quick", "--arms", "tiger,sgd")
    assert done.returncode == 2
    assert "unknown arms ['sgd']" in done.stderr


@pytest.mark.parametrize("name", ["matplotlib", "tqdm"])
def test_missing_package_is_one_sentence(name, tmp_path):
    (tmp_path / f"{name}.py").write_text(
        f"raise ModuleNotFoundError(\"No module named '{name}'\", name='{name}')\n"
    )
    done = run_script("embedding_saturation.py", "--quick", path=tmp_path)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines() == [
        f"The study needs {name}: pip install 'tiger_ext[bench]'"
    ]
