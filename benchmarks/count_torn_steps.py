# SPDX-License-Identifier: Apache-2.0
"""How often a signal's handler that raises tears a step: writes benchmarks/results/torn_steps.json.

In each mode a timer interrupts steps at random moments; what is found then, parameters, state and
counters, must be what it was before the step or what it is after it, bit by bit.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from harness import describe_machine
from test_interrupts import MODES, take_interrupted_steps


def main() -> int:
    """Count in every mode; the exit status is 1 if a step was torn."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=3000, help="in each mode")
    steps = parser.parse_args().steps
    results = {mode: take_interrupted_steps(mode, steps, seed=5) for mode in MODES}
    for mode, found in results.items():
        print(mode, found)
    path = Path(__file__).resolve().parent / "results" / "torn_steps.json"
    path.parent.mkdir(exist_ok=True)
    written = {
        "script": Path(__file__).name,
        "claim": "Steps torn by signals whose handlers raise",
        "machine": {k: v for k, v in describe_machine().items() if k != "peers"},
        "options": {"steps": steps},
        "modes": results,
    }
    path.write_text(json.dumps(written, indent=1) + "\n")
    return 1 if any(found["torn"] for found in results.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
