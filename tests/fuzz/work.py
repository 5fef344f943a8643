# SPDX-License-Identifier: Apache-2.0
"""Takes seeds one after the other and writes what came of each, a line of JSON each.

A process of its own: what it runs may end it.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from typing import Any

import torch

from fuzz import checkpoints
from fuzz.execute import script
from fuzz.generate import generate
from fuzz.observe import Failure
from fuzz.operations import failure_of
from fuzz.shrink import shrink

_SHRUNK = 2  # programs of a kind that are shrunk in one process


class Work:
    """The seeds of one process."""

    def __init__(self, part: str, without: tuple[str, ...], shrink_seconds: float) -> None:
        self.part = part
        self.without = without
        self.shrink_seconds = shrink_seconds
        self.kinds: Counter[str] = Counter()
        self.begin = time.time()
        self.shrinking = 0.0  # seconds
        torch.set_num_threads(1)

    def until(self, end: float, seeds: range) -> None:
        """Work on seeds until the clock says ``end``; the one begun is finished."""
        for seed in seeds:
            if time.time() > end:
                return
            print(json.dumps({"begin": seed}), flush=True)
            counts: Counter[str] = Counter()
            one = self.checkpoint if self.part == "checkpoints" else self.program
            failures = one(seed, counts, end)
            print(json.dumps({"end": seed, "counts": counts, "failures": failures}), flush=True)

    def _may_shrink(self, failure: Failure, end: float) -> float:
        """Return the seconds there are for shrinking a failure; a third of the time is."""
        self.kinds[failure.kind] += 1
        spare = (time.time() - self.begin) / 3 + self.shrink_seconds - self.shrinking
        if self.kinds[failure.kind] > _SHRUNK or spare < 1.0:
            return 0.0
        seconds = max(1.0, min(self.shrink_seconds, spare, end - time.time()))
        self.shrinking += seconds
        return seconds

    def program(self, seed: int, counts: Counter[str], end: float) -> list[dict[str, Any]]:
        """Run the program of a seed on the native kernels and on the reference."""
        failures = []
        for fused in (None, False):
            program = generate(seed, self.without)
            program.fused = fused
            failure, execution = failure_of(program)
            counts["programs"] += 1
            if execution is not None:
                counts.update(execution.counts)
            if failure is None:
                continue
            kind = failure.kind

            def fails(smaller: Any, kind: str = kind) -> bool:
                found, _ = failure_of(smaller)
                return found is not None and found.kind == kind

            if (seconds := self._may_shrink(failure, end)) > 0:
                program = shrink(program, fails, seconds)
                failure, execution = failure_of(program)
            failures.append(_report(failure, kind, seconds > 0, execution and execution.lines))
        return failures

    def checkpoint(self, seed: int, counts: Counter[str], end: float) -> list[dict[str, Any]]:
        """Run the mutated state dict of a seed."""
        case = checkpoints.case_of(seed, counts)
        if case is None:
            return []
        # If the process ends here, this says what it was about.
        print(json.dumps({"case": script(case.lines(), "not shrunk")}), flush=True)
        failure, lines = checkpoints.run_case(case, counts)
        if failure is None:
            return []
        kind = failure.kind
        if (seconds := self._may_shrink(failure, end)) > 0:
            case = checkpoints.shrink_case(case, kind, seconds)
            failure, lines = checkpoints.run_case(case, Counter())
        return [_report(failure, kind, seconds > 0, lines)]


def _report(failure: Failure | None, kind: str, shrunk: bool, lines: Any) -> dict[str, Any]:
    text = "it did not fail again" if failure is None else str(failure)
    return {"kind": kind, "message": text, "script": script(lines or [], text), "shrunk": shrunk}
