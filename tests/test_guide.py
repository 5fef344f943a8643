# SPDX-License-Identifier: Apache-2.0
"""Every snippet of the guides runs on its own; docs/usage.md names every option there is."""

import re
from pathlib import Path

import pytest
import torch

from tiger_ext.options import ALGORITHMS

DOCS = Path(__file__).resolve().parents[1] / "docs"
LEAST_SNIPPETS = {"checkpoints.md": 1, "embeddings.md": 5, "large_tables.md": 5, "usage.md": 6}


def _blocks(page):
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)


SNIPPETS = [
    pytest.param(page, block, id=f"{page}-{block.strip().splitlines()[-1][:40]}")
    for page in LEAST_SNIPPETS
    for block in _blocks(page)
]


@pytest.mark.parametrize("page, least", LEAST_SNIPPETS.items())
def test_the_guide_has_snippets(page, least):
    assert len(_blocks(page)) >= least


@pytest.mark.parametrize("page, block", SNIPPETS)
def test_snippet_runs(page, block, tmp_path, monkeypatch, run_python):
    monkeypatch.chdir(tmp_path)  # a snippet may write files
    if "__main__" in block:  # processes that it spawns import it
        (tmp_path / "snippet.py").write_text(block)
        run_python("import runpy\nrunpy.run_path('snippet.py', run_name='__main__')")
        return
    torch.manual_seed(0)
    exec(compile(block, str(DOCS / page), "exec"), {"__name__": "guide"})


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_option_is_in_the_table(algorithm):
    text = (DOCS / "usage.md").read_text()
    table = text[text.index("## Options") : text.index("## State")]
    rows = [line.split("|")[1:] for line in table.splitlines() if line.startswith("| `")]
    named = {
        name
        for options, _, owners, *_ in rows
        if owners.strip() == "all" or algorithm in owners.lower()
        for name in re.findall(r"`(\w+)`", options)
    }
    assert named == set(ALGORITHMS[algorithm].defaults)
