# SPDX-License-Identifier: Apache-2.0
"""Every snippet of docs/embeddings.md runs on its own."""

import re
from pathlib import Path

import pytest
import torch

GUIDE = Path(__file__).resolve().parents[1] / "docs" / "embeddings.md"
BLOCKS = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)


def test_the_guide_has_snippets():
    assert len(BLOCKS) >= 5


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.strip().splitlines()[-1][:40])
def test_snippet_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a snippet may write files
    torch.manual_seed(0)
    exec(compile(block, str(GUIDE), "exec"), {"__name__": "guide"})
