# SPDX-License-Identifier: Apache-2.0
"""Runs the scripts of examples/ as a user does, with the package under test."""

import os
import subprocess
import sys
from pathlib import Path

import tiger_ext

ROOT = Path(__file__).parents[1]
PACKAGE = Path(tiger_ext.__file__).resolve().parents[1]


def run_script(name: str, *arguments: str, path: Path = PACKAGE) -> subprocess.CompletedProcess:
    """Run examples/NAME; what is under ``path`` is imported before anything else."""
    return subprocess.run(
        [sys.executable, str(ROOT / "examples" / name), *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(path), str(PACKAGE)])},
        capture_output=True,
        text=True,
        timeout=600,
    )
