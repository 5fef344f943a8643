# SPDX-License-Identifier: Apache-2.0
"""How often a signal's handler that raises tears a step: writes benchmarks/results/torn_steps.json.

In each mode a timer interrupts steps at random moments; what is found then, parameters, state and
counters, must be what it was before the step or what it is after it, bit by bit.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from test_interrupts import MODES, Interrupt, Run, same, states_after_each_step


def count(mode: str, steps: int) -> dict[str, int]:
    """Return how many steps were interrupted, happened nevertheless, and were torn."""
    cls, options = MODES[mode]
    expected = states_after_each_step(cls, options, steps)
    run = Run(cls, options)
    generator = torch.Generator().manual_seed(5)
    found = {"steps": steps, "interrupts": 0, "happened": 0, "torn": 0}
    while run.number < steps:
        run.next_gradients()
        delay = float(torch.rand((), generator=generator)) * 300e-6 + 1e-6
        try:
            try:
                signal.setitimer(signal.ITIMER_REAL, delay)
                run.optimizer.step()
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            run.number += 1
        except Interrupt:
            found["interrupts"] += 1
            now = run.everything()
            if same(now, expected[run.number + 1]):
                found["happened"] += 1
                run.number += 1
            elif not same(now, expected[run.number]):
                found["torn"] += 1
                break
    return found


def main() -> None:
    """Count in every mode."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=3000, help="in each mode")
    steps = parser.parse_args().steps

    def handler(*_: Any) -> None:
        raise Interrupt

    signal.signal(signal.SIGALRM, handler)
    results = {mode: count(mode, steps) for mode in MODES}
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    for mode, found in results.items():
        print(mode, found)
    path = Path(__file__).resolve().parent / "results" / "torn_steps.json"
    version = {"torch": torch.__version__, "python": sys.version.split()[0]}
    with contextlib.suppress(FileExistsError):
        path.parent.mkdir()
    path.write_text(
        json.dumps({"claim": "steps torn by signals", **version, "modes": results}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
