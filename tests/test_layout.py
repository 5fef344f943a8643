# SPDX-License-Identifier: Apache-2.0
"""Which part of the project may use which: includes of csrc/, imports of tiger_ext/."""

import ast
import re
from pathlib import Path

import add_rule
import pytest

ROOT = Path(__file__).resolve().parents[1]
CSRC, PACKAGE = ROOT / "csrc", ROOT / "tiger_ext"
MAY_INCLUDE = {
    "rules": {"rules"},
    "step": {"rules", "step"},
    "cpu": {"rules", "step", "cpu"},
    "cuda": {"rules", "step", "cuda"},
    "bindings": {"rules", "step", "cpu", "cuda", "bindings"},
}
CODE = sorted(p for p in CSRC.rglob("*") if p.suffix in (".h", ".cuh", ".inl", ".cpp", ".cu"))
# A module imports only from lines above its own.
ORDER = """
_native options parameters
rounding
capture
reference history tracking progress finish files row_numbers
clocks
huge_pages group_step tracking_hooks
tables
moments
state
windows reference_step observers state_memory
lazy loading
passes reading
step
optimizer
tiger lion adamw
clip groups nn health_findings archive
health
change_file
positions
changes applying
checkpoint
__init__
__main__
"""
LINES = {name: i for i, line in enumerate(ORDER.strip().splitlines()) for name in line.split()}


def included(code: str) -> list[str]:
    return re.findall(r'^#\s*include "([^"]+)"', code, re.MULTILINE)


def wrong_includes(folder: str, code: str) -> list[str]:
    """Return the project's includes that a file of a folder must not have."""
    return [name for name in included(code) if name.split("/")[0] not in MAY_INCLUDE[folder]]


def folder_of(path: Path) -> str:
    return path.relative_to(CSRC).parts[0]


def test_every_file_stands_in_a_folder():
    assert {p.name for p in CSRC.iterdir()} == {*MAY_INCLUDE, "README.md"}
    assert len(CODE) > 40


@pytest.mark.parametrize("path", CODE, ids=lambda path: str(path.relative_to(CSRC)))
def test_includes_go_one_way(path):
    code = path.read_text()
    assert wrong_includes(folder_of(path), code) == []
    for name in included(code):
        assert (CSRC / name).is_file(), f"{name} does not say which folder it stands in"


def test_a_wrong_include_is_noticed():
    assert wrong_includes("rules", '#include "step/items.h"\n') == ["step/items.h"]
    assert wrong_includes("cpu", '#include "cuda/roads.h"\n#include "step/items.h"\n') == [
        "cuda/roads.h"
    ]
    assert wrong_includes("step", '#include "items.h"\n') == ["items.h"]


@pytest.mark.parametrize(
    "path",
    [p for p in CODE if folder_of(p) == "rules" or "kernels" in p.parts or p.suffix == ".cu"],
    ids=lambda path: str(path.relative_to(CSRC)),
)
def test_what_knows_no_torch(path):
    assert not re.search(r"#include <(ATen|torch|c10)/(?!cuda/CUDAException)", path.read_text())


def imports_of(code: str) -> set[str]:
    """Return the modules of tiger_ext that code imports anywhere."""
    found = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            found |= {
                a.name.split(".", 1)[1] for a in node.names if a.name.startswith("tiger_ext.")
            }
            found |= {"__init__" for a in node.names if a.name == "tiger_ext"}
        elif isinstance(node, ast.ImportFrom) and node.module:
            if node.module == "tiger_ext":
                names = {a.name for a in node.names} - {"_C"}
                found |= {name if name in LINES else "__init__" for name in names}
            elif node.module.startswith("tiger_ext."):
                found.add(node.module.split(".", 1)[1])
    return found


def wrong_imports(module: str, code: str) -> set[str]:
    return {name for name in imports_of(code) if LINES.get(name, 99) >= LINES[module]}


def test_every_module_has_its_line():
    assert {p.stem for p in PACKAGE.glob("*.py")} == set(LINES)


@pytest.mark.parametrize("module", LINES)
def test_imports_go_one_way(module):
    code = (PACKAGE / f"{module}.py").read_text()
    assert wrong_imports(module, code) == set()
    assert len(code.splitlines()) <= 450


def test_a_wrong_import_is_noticed():
    assert wrong_imports("state", "def f():\n    from tiger_ext.step import Step\n") == {"step"}
    assert wrong_imports("lazy", "from tiger_ext import options, step\n") == {"step"}
    assert wrong_imports("lazy", "import tiger_ext\n") == {"__init__"}


def test_the_table_of_the_readme_is_the_one_tested():
    rows = re.findall(r"^\| `(\w+)/` \|.*\| (.*) \|$", (CSRC / "README.md").read_text(), re.M)
    table = {name: set(re.findall(r"`(\w+)/`", may)) for name, may in rows}
    assert table == {**MAY_INCLUDE, "bindings": set()}  # all
    text = (CSRC / "README.md").read_text()
    for path in CODE:
        named = f"`{path.name}`" in text or f"`{path.stem}`" in text
        assert named or path.suffix == ".inl" or path.with_suffix(".cpp").exists(), path


def test_adding_a_rule_is_as_short_as_the_docs_say(tmp_path):
    diff = add_rule.documented_diff()
    assert len(add_rule.added_lines(diff)) <= 40
    add_rule.copy_with_diff(tmp_path / "copy")
    options = (tmp_path / "copy" / "tiger_ext" / "options.py").read_text()
    assert '"heavy_ball",' in options


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.name)
def test_files_that_the_docs_name_exist(page):
    for name in re.findall(r"`((?:csrc|tiger_ext|tests|benchmarks)/[\w/.]*)`", page.read_text()):
        assert (ROOT / name).exists(), name
