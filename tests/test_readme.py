# SPDX-License-Identifier: Apache-2.0
"""README.md and docs/ say what the result files and the code say; their links lead somewhere."""

import importlib
import json
import re
import sys
from pathlib import Path

import pytest
import torch

import tiger_ext

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGE_NAMES = [str(page.relative_to(ROOT)) for page in PAGES]


@pytest.fixture
def benchmark_script(monkeypatch):
    """Import a script of benchmarks/ by name."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if str(ROOT / "benchmarks") in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


# --------------------------------------------------------------------------------------- claims


def test_claims_are_those_of_the_result_files(benchmark_script):
    claims = benchmark_script("claims")
    for path, text in claims.pages().items():
        assert path.read_text() == text, f"{path.name}: run python benchmarks/claims.py"


def test_the_readme_quotes_at_most_eight_claims_and_hides_no_miss(benchmark_script):
    claims = benchmark_script("claims")
    table = claims.headline_table()
    rows = [line for line in table.splitlines() if line.startswith("| ")][1:]
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows] == list(claims.HEADLINES)
    assert 1 <= len(rows) <= 8
    missed = [bar for _, bar in claims.claims() if bar["verdict"] == "NOT MET"]
    if missed:
        assert any(bar["claim"] in claims.HEADLINES for bar in missed)
    assert table.count("**not met**") == sum(
        bar is not None and bar["verdict"] == "NOT MET"
        for machine in claims.machines()
        for name, of_newest in claims.claims()
        if of_newest["claim"] in claims.HEADLINES
        for bar in [machine.bar(name, of_newest["claim"])]
    )


def test_the_costs_of_large_tables_are_those_of_the_result_files():
    def rounded(number):
        return float(f"{number:.2g}" if number < 100 else f"{number:.3g}")

    text = (ROOT / "docs/large_tables.md").read_text()
    rows = re.findall(r"^\| \[.*?, (\d)\]\(\.\./(.*?)\) \| (.*) \|$", text, re.MULTILINE)
    assert len(rows) == 3
    for threads, path, figures in rows:
        result = json.loads((ROOT / path).read_text())
        cell = result["cells"][0]
        moving = cell["1e8 rows: steps while moving to huge pages, seconds"]
        milliseconds = (
            cell["seconds"]["1e8 rows"]["median"],
            max(cell["1e8 rows: first steps, state unwritten, seconds"]),
            moving["percentile_99"],
            moving["longest"],
        )
        ratio, *others = map(float, figures.split(" | "))
        assert int(threads) == result["options"]["threads"]
        assert ratio == round(result["bars"][0]["value"], 2)
        assert others == [
            *(rounded(1000 * each) for each in milliseconds),
            rounded(cell["1e8 rows: seconds until moved"]),
        ]


def test_peers_that_are_faster_are_told(benchmark_script):
    claims = benchmark_script("claims")
    for path in (claims.RESULTS / "bench_dense.json", claims.RESULTS / "bench_sparse.json"):
        ours = {"Lion", "AdamW"}
        peers = {
            peer
            for cell in json.loads(path.read_text())["cells"]
            for peer, timing in cell["seconds"].items()
            if peer not in ours
            and "Tiger" in cell["seconds"]
            and timing["median"] < cell["seconds"]["Tiger"]["median"]
        }
        told = re.findall(rf"\| {path.stem} \| (.*?) \| A \|", claims.BENCHMARKS.read_text())
        assert set(told) == peers


# -------------------------------------------------------------------------------------- picture


def test_the_picture_shows_the_figures_of_the_result_files(benchmark_script):
    plot = benchmark_script("plot_step_time")
    for panel, shown in zip(plot.PANELS, plot.figures()):
        result = json.loads((ROOT / f"benchmarks/results/{panel.script}.json").read_text())
        (cell,) = [c for c in result["cells"] if c["name"] == panel.cell]
        assert {bar.name for bar in shown.bars} == set(panel.names)
        for bar in shown.bars:
            assert bar.seconds == cell["seconds"][bar.name]["median"]
            if bar.name != "Tiger":
                assert bar.times_tiger == cell["times_Tiger"][bar.name]["median"]
        if panel.line == "floor":
            rate = result["in_place_bytes_per_second"]["before"]["median"]
            elements = 32 * 2**20  # of the dense cell
            floor = cell.get("floor_bytes", 20 * elements) / rate
            assert any(seconds == pytest.approx(floor, rel=2e-3) for seconds in shown.line)
        elif panel.line:
            assert shown.line == 2 * [cell["seconds"][panel.line]["median"]]


def test_the_picture_is_of_the_present_result_files(benchmark_script):
    plot = benchmark_script("plot_step_time")
    assert plot.drawn_figures() == plot.plain_figures(), "run python benchmarks/plot_step_time.py"
    assert plot.PICTURE.stat().st_size <= 150_000
    assert f"]({plot.PICTURE.relative_to(ROOT)})" in README


# ------------------------------------------------------------------------------------------ text


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 150


def test_snippets_run():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 2
    names: dict = {}
    exec(blocks[0], names)
    model = names["model"]
    assert model["table"].weight.grad.layout == torch.sparse_coo
    names["model"] = torch.nn.Module()
    names["model"].head, names["model"].table = model["head"], model["table"]
    exec(blocks[1], names)


def _state_bytes(algorithm, **options):
    rows, dim = 1000, 64
    table = torch.nn.Parameter(torch.zeros(rows, dim))
    optimizer = getattr(tiger_ext, algorithm)([table], **options)
    table.grad = torch.sparse_coo_tensor([[1]], torch.ones(1, dim), (rows, dim))
    optimizer.step()
    state = optimizer.state[table].values()
    return (
        sum(t.nbytes for t in state if t.shape == table.shape) / table.numel(),
        sum(t.nbytes for t in state if t.shape == (rows,)) / rows,
    )


def test_bytes_of_state_are_what_the_table_says():
    def figures(label):
        (row,) = [line for line in README.splitlines() if line.startswith(f"| {label}")]
        return [int(cell) for cell in row.strip(" |").split(" | ")[1:]]

    algorithms = "Tiger", "Lion", "AdamW"
    assert figures("state, bytes a float32") == [_state_bytes(a)[0] for a in algorithms]
    assert figures("the same with `momentum_dtype=torch.bfloat16`") == [
        _state_bytes(a, momentum_dtype=torch.bfloat16)[0] for a in algorithms
    ]
    assert README.count("4 bytes a row more") == 2
    for algorithm, lazy in [("Tiger", "decay"), ("Lion", "exact"), ("AdamW", "decay")]:
        assert _state_bytes(algorithm, lazy=lazy)[1] == 4
    assert _state_bytes("Tiger")[1] == 0


# ----------------------------------------------------------------------------------------- links


def _anchors(page):
    """Return the anchors that GitHub gives to a page's headings."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES, ids=PAGE_NAMES)
def test_links_lead_to_files_and_headings(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        goal = (page.parent / path).resolve() if path else page
        assert goal.exists(), target
        assert not anchor or anchor in _anchors(goal), target


def test_the_index_has_every_page():
    listed = re.findall(
        r"^\| \[.*?\]\((.*?)\)", (ROOT / "docs/README.md").read_text(), re.MULTILINE
    )
    assert sorted(listed) == sorted(p.name for p in PAGES if p.name != "README.md")


def test_words_of_the_glossary_are_in_use():
    """A word that the project gave up leaves the glossary."""
    sources = [p for p in (ROOT / "csrc").rglob("*") if p.is_file()]
    sources += [*(ROOT / "tiger_ext").glob("*.py"), *(ROOT / "benchmarks").glob("*.py"), *PAGES]
    sources += [p for p in (ROOT / "tests").glob("*.py") if p != Path(__file__)]
    used = "\n".join(p.read_text() for p in sources if p.name != "glossary.md").lower()
    rows = re.findall(
        r"^\| (\*\*.*?) \| (.*) \|$", (ROOT / "docs/glossary.md").read_text(), re.MULTILINE
    )
    words = [word for cell, _ in rows for word in re.findall(r"\*\*(.*?)\*\*", cell)]
    assert len(words) == len(set(words)) > 40
    for word in words:
        pattern = re.escape(word).replace(r"\ ", r"[\s_]+").replace(r"\-", r"[-_\s]")
        assert re.search(rf"(?<![a-z]){pattern}", used), f"{word!r} is used nowhere"
