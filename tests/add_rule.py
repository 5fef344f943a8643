# SPDX-License-Identifier: Apache-2.0
"""Adds a rule to a copy of the project as docs/design.md says, builds the copy and tests the rule.

    python tests/add_rule.py build/add-rule

The copy is built twice: with the CPU's kernels, and with the CUDA kernels emulated on the CPU.
Exit status 1 if the diff does not apply, something does not build, or the rule is wrong.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("csrc", "tiger_ext", "setup.py", "pyproject.toml", "README.md", "LICENSE")
EMULATION = "tests/cuda_on_cpu"

# Runs in the copy. The native steps must agree with the rule's reference in every road and mode.
CHECK = """
import itertools, sys
import torch
import tiger_ext
from tiger_ext import Tiger, _native

if sys.argv[1] == "emulated":
    import ctypes
    ctypes.CDLL(_native.C.__file__).cuda_on_cpu_select(1)

def run(fused, lazy, rows, layouts, dtype):
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(50, 33, dtype=dtype))
    group = {"params": [p], "algorithm": "heavy_ball", "lr": 0.1, "weight_decay": 0.1}
    opt = Tiger([{**group, "lazy": lazy, "rows": rows, "fused": fused}])
    for layout in layouts:
        ids = torch.randint(50, (1, 40))
        g = torch.sparse_coo_tensor(ids, torch.randn(40, 33, dtype=dtype), p.shape)
        p.grad = g if layout == "sparse" else g.to_dense()
        opt.step()
    opt.flush()
    return p.detach(), opt.state[p]["exp_avg"]

cases = itertools.product(
    ("frozen", "decay"), (None, "nonzero"), (torch.float32, torch.float64, torch.bfloat16)
)
for lazy, rows, dtype in cases:
    for layouts in (["sparse"] * 3, ["dense"] * 3, ["sparse", "dense", "sparse"]):
        native, reference = (run(f, lazy, rows, layouts, dtype) for f in (True, False))
        for got, wanted in zip(native, reference, strict=True):
            # Sums in another order may round a bfloat16 the other way.
            tolerance = dict(atol=0.01, rtol=0.02) if dtype == torch.bfloat16 else {}
            torch.testing.assert_close(got, wanted, **tolerance)
        assert not torch.equal(native[0], torch.zeros_like(native[0]))

p, m = torch.ones(3), torch.full((3,), 2.0)
numbers = dict(lr=0.5, beta1=0.25, beta2=0.25, weight_decay=0.5)
torch.ops.tiger_ext.heavy_ball_dense_([p], [torch.ones(3)], [m], **numbers)
assert m.tolist() == [1.5] * 3 and p.tolist() == [0.0] * 3, (m, p)
try:
    Tiger([{"params": [p], "algorithm": "heavy_ball", "lazy": "exact"}])
except ValueError as error:
    assert "heavy_ball has no closed form" in str(error)
else:
    raise AssertionError("lazy='exact' was not refused")
print(f"heavy_ball on the {sys.argv[1]} kernels: as its reference")
"""


def documented_diff() -> str:
    """Return the diff of docs/design.md."""
    blocks = re.findall(r"```diff\n(.*?)```", (ROOT / "docs/design.md").read_text(), re.DOTALL)
    (diff,) = blocks
    return diff


def added_lines(diff: str) -> list[str]:
    """Return the lines that a diff adds, but for blank ones."""
    lines = (line[1:].strip() for line in diff.splitlines() if re.match(r"\+(?!\+\+ )", line))
    return [line for line in lines if line]


def copy_with_diff(folder: Path) -> None:
    """Make ``folder`` a copy of the project with the rule added."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    ignored = shutil.ignore_patterns("*.so", "__pycache__", "build")
    for name in (*COPIED, EMULATION):
        source, target = ROOT / name, folder / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=ignored)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)
    # With a ceiling: git would otherwise look at the project around the copy.
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.parent)}
    command = ["git", "apply", "-"]
    subprocess.run(
        command, input=documented_diff(), text=True, cwd=folder, env=environment, check=True
    )


def main() -> None:
    folder = Path(sys.argv[1]).resolve()
    copy_with_diff(folder)
    for kernels, setup, options in (
        ("native", "setup.py", {"TIGER_EXT_CUDA": "0"}),
        ("emulated", f"{EMULATION}/setup.py", {}),
    ):
        build = ["-q", "build", "--build-lib", f"build/{kernels}", "--build-temp", f"tmp/{kernels}"]
        command = [sys.executable, setup, *build]
        subprocess.run(command, cwd=folder, env={**os.environ, **options}, check=True)
        environment = {
            **os.environ,
            "PYTHONPATH": str(folder / "build" / kernels),
            "TIGER_EXT_REQUIRE_NATIVE": "1",
        }
        command = [sys.executable, "-W", "ignore", "-c", CHECK, kernels]
        subprocess.run(command, cwd=folder / "build", env=environment, check=True)


if __name__ == "__main__":
    main()
