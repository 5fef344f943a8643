# SPDX-License-Identifier: Apache-2.0
"""The README says what the result files say, and its snippets run."""

import re
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]


def test_claims_are_those_of_the_result_files(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import claims

    assert claims.README.read_text() == claims.readme_with_claims()
    sys.modules.pop("claims")


def test_snippets_run():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 2
    names: dict = {}
    exec(blocks[0], names)
    model = names["model"]
    assert model["table"].weight.grad.layout == torch.sparse_coo
    names["params"] = list(model.parameters())
    names["model"] = torch.nn.Module()
    names["model"].head, names["model"].table = model["head"], model["table"]
    exec(blocks[1], names)
