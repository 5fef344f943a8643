# SPDX-License-Identifier: Apache-2.0
"""examples/ngram_memory.py trains its memory, in one process and in two, and counts its bytes."""

import json
import math
import sys
from dataclasses import replace

import pytest
import torch
from example_scripts import ROOT, run_script

SCRIPT = ROOT / "examples" / "ngram_memory.py"
RESULTS = ROOT / "benchmarks" / "results"
GUIDE = (ROOT / "docs" / "large_tables.md").read_text()

pytest.importorskip("tqdm")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Holds the token cache, which the tests share."""
    return tmp_path_factory.mktemp("ngram_memory")


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import ngram_memory

    return ngram_memory


@pytest.fixture
def setting(example, folder):
    options = example.parse_arguments(["--smoke", "--cache", str(folder)])
    return replace(example.base_setting(options), files=20)


def hashed(example, tokens, rows=4000):
    return example.Memory(torch.zeros(rows, 2), 1000).ids(torch.tensor([tokens]))[:, :, 0]


def test_rows_are_those_of_the_last_two_and_the_last_three_tokens(example):
    ids = hashed(example, [5, 6, 7, 8, 6, 7])
    pairs, triples = ids
    assert torch.equal(pairs[:, 0], pairs[:, 3])  # (6, 7) both times
    assert not triples[:, 0].eq(triples[:, 3]).any()  # (5, 6, 7) and (8, 6, 7)
    assert torch.equal(triples[:, 0], hashed(example, [1, 5, 6, 7])[1, :, 1])
    assert not pairs[:, 0].eq(hashed(example, [0, 7, 6])[0, :, 0]).any()  # order counts


def test_every_hash_has_rows_of_its_own_and_uses_them_evenly(example):
    rows = 400
    ids = hashed(example, torch.randint(1000, (20_002,)).tolist(), rows).flatten(0, 1)
    for index, of_hash in enumerate(ids):
        assert of_hash.min() >= 100 * index and of_hash.max() < 100 * (index + 1)
        counts = torch.bincount(of_hash - 100 * index, minlength=100)
        assert counts.min() > 120 and counts.max() < 290  # 200 each, six standard deviations
    assert (ids[0] - ids[1] + 100).ne(0).double().mean() > 0.95  # the heads differ


def test_no_position_sees_a_later_token(example, setting):
    model = example.Model(setting, 1000, torch.randn(4000, setting.dim))
    tokens = torch.randint(1000, (1, example.REACH + setting.context))
    logits = model(tokens)
    for position in (0, 7):
        other = tokens.clone()
        other[:, example.REACH + position + 1 :] += 1
        changed = (model(other) != logits).any(-1)[0]
        assert not changed[: position + 1].any() and changed[position + 1]


def test_the_gradient_of_the_table_has_the_rows_that_were_read(example, setting):
    model = example.Model(setting, 1000, torch.zeros(4000, setting.dim, dtype=torch.bfloat16))
    windows = torch.randint(1000, (2, example.REACH + setting.context + 1))
    model.loss(windows).backward()
    gradient = model.memory.table.grad
    assert gradient.is_sparse and gradient.dtype == torch.bfloat16
    read = model.memory.ids(windows[:, :-1])
    assert torch.equal(gradient.coalesce().indices()[0], read.unique())


def test_the_memory_learns_what_the_transformer_cannot_see(example, setting, monkeypatch):
    """Each frequent token follows a rare one, and which one it is says which."""
    vocabulary, period = 1000, 200
    text = torch.empty(period, dtype=torch.int32)
    text[::2] = torch.randint(setting.classes, vocabulary, (period // 2,))
    text[1::2] = torch.randint(setting.classes - 1, (period // 2,))
    splits = {"held-out": (0, period), "train": (period, 10 * period)}
    corpus = example.corpus_module.Corpus(text.repeat(10), splits, vocabulary, {})
    monkeypatch.setattr(example.corpus_module, "load", lambda *_: corpus)
    setting = replace(setting, steps=150)
    losses = [example.run(replace(setting, rows=rows))["loss"] for rows in (0, 4000)]
    assert losses[1] < losses[0] / 2


def test_rowwise_adagrad_is_fbgemms_rule(example):
    table = torch.nn.Parameter(torch.arange(12.0).view(4, 3))
    adagrad = example.RowwiseAdagrad(table)
    optimizer = example.tiger_ext.Tiger([table], lr=0.5)
    optimizer.register_step_pre_hook(adagrad)
    expected, total = table.detach().clone(), 0.0
    for _ in range(2):
        table.grad = torch.sparse_coo_tensor([[2, 2]], [[1.0, 2, 2], [0, 0, 1]], (4, 3))
        optimizer.step()
        g = torch.tensor([1.0, 2, 3])
        total += float(g @ g) / 3
        expected[2] -= 0.5 * g / (total**0.5 + 1e-8)
    torch.testing.assert_close(table.detach(), expected)
    assert adagrad.sums.tolist() == pytest.approx([0, 0, total, 0]) and not optimizer.state


@pytest.mark.parametrize(
    ("dtype", "state", "expected"),
    [
        ("float32", "float32", 8),
        ("bfloat16", "float32", 6),
        ("bfloat16", "bfloat16", 4),
        ("bfloat16", "int8", 3 + 4 / 8),
        ("float32", "element", 8),
        ("bfloat16", "row", 2 + 4 / 8),
        ("float32", "adagrad", 4 + 4 / 8),
    ],
)
def test_bytes_are_those_of_table_and_state(example, setting, dtype, state, expected):
    setting = replace(setting, rows=4000, dtype=dtype, state=state, steps=2)
    result = example.run(setting)
    assert result["bytes_per_parameter"] == expected
    assert result["table_bytes"] + result["state_bytes"] == expected * 4000 * setting.dim
    assert 0 < result["optimizer_share"] < 1
    assert result["state"] == state and "cache" not in result


def test_two_workers_train_what_the_parent_evaluates(folder):
    path = folder / "result.json"
    done = run_script(
        "ngram_memory.py",
        "--smoke",
        *("--rows", "4e3", "--workers", "2", "--steps", "60", "--files", "20"),
        *("--cache", str(folder), "--json", str(path)),
    )
    assert done.returncode == 0, done.stderr
    (result,) = json.loads(path.read_text())["runs"]
    assert result["rows"] == 4000 and result["workers"] == 2 and result["steps"] == 60
    assert math.log(result["classes"]) - 1 > result["loss"] > 0
    assert result["resident_bytes"] > 2 * 50 * 2**20
    assert "| 4,000 | 2 | " in done.stdout
    if "Curves" in done.stdout:
        assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG\r\n")
    else:
        assert "matplotlib is not there" in done.stdout


def test_compare_trains_every_arm_with_every_seed(example, folder, monkeypatch, capsys):
    path = folder / "compare.json"
    arguments = ["--smoke", "--compare", "--seeds", "2", "--processes", "1", "--steps", "3"]
    arguments += ["--files", "20", "--cache", str(folder), "--json", str(path)]
    monkeypatch.setattr(sys, "argv", ["ngram_memory.py", *arguments])
    monkeypatch.setattr(example, "run_apart", example.run)  # a process each takes seconds
    example.main()
    result = json.loads(path.read_text())
    assert [arm["name"] for arm in result["arms"]] == list(example.ARMS)
    first = result["arms"][0]
    for index, options in enumerate(example.ARMS.values()):
        arm, runs = result["arms"][index], result["runs"][index :: len(example.ARMS)]
        assert [r["seed"] for r in runs] == [0, 1]
        assert [r["loss"] for r in runs] == arm["losses"]
        for r in runs:
            assert {name: r[name] for name in options} == options
        assert arm["mean"] == pytest.approx(sum(arm["losses"]) / 2)
        assert arm["spread"] == pytest.approx(abs(arm["losses"][0] - arm["losses"][1]))
        assert arm["against_first"] == pytest.approx(arm["mean"] - first["mean"])
    assert example.compare_table(result) in capsys.readouterr().out


def test_missing_package_is_one_sentence(tmp_path):
    (tmp_path / "tqdm.py").write_text(
        "raise ModuleNotFoundError(\"No module named 'tqdm'\", name='tqdm')\n"
    )
    done = run_script("ngram_memory.py", "--smoke", path=tmp_path)
    assert done.returncode == 1
    assert done.stderr.strip() == "The demo needs tqdm: pip install 'tiger_ext[demo]'"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--rows", "3"],
        ["--workers", "0"],
        ["--rows", "-1"],
        ["--state", "adagrad", "--workers", "2"],
    ],
)
def test_what_cannot_be_run_is_refused(example, arguments, capsys):
    with pytest.raises(SystemExit):
        example.parse_arguments(arguments)
    assert "expected" in capsys.readouterr().err


def test_the_guide_shows_the_tables_of_the_result_files(example):
    paths = sorted(RESULTS.glob("ngram_memory*.json"))
    for path in paths:
        result = json.loads(path.read_text())
        table = example.compare_table if "arms" in result else example.sweep_table
        assert table(result) in GUIDE
        assert f"results/{path.name})" in GUIDE
    assert ("no figure is claimed" in guide_section()) == (not paths)


def guide_section():
    return GUIDE[GUIDE.index("examples/ngram_memory.py") : GUIDE.index("## What it costs")]
