# SPDX-License-Identifier: Apache-2.0
"""Every line of docs/torch_contract.md names tests, and these exist."""

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
TABLE = (TESTS.parent / "docs" / "torch_contract.md").read_text()
LINES = [line for line in TABLE.splitlines() if re.match(r"\| (?!\*\*|Line)", line)]


def test_the_table_has_lines():
    assert len(LINES) >= 40


@pytest.mark.parametrize("line", LINES, ids=lambda line: line.split("|")[1].strip()[:40])
def test_named_tests_exist(line):
    cells = line.split("|")
    assert len(cells) == 5 and all(cell.strip() for cell in cells[1:4])
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", cells[3])
    assert named and not re.sub(r"`[\w/]+\.py::\w+`|\s", "", cells[3])
    for file, name in named:
        body = ast.parse((TESTS / file).read_text()).body
        assert name in {f.name for f in body if isinstance(f, ast.FunctionDef)}, f"{file}::{name}"
