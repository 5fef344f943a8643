# SPDX-License-Identifier: Apache-2.0
"""Random programs against a model in float64, and mutated state dicts; `make fuzz`.

    python -m tests.fuzz --seconds 300              # both parts
    python -m tests.fuzz --seed 7 --programs 1      # one program again
    python -m tests.fuzz --only checkpoints         # under AddressSanitizer: see the Makefile
    python -m tests.fuzz --without freeze,toggle    # leave out operations with known faults

Exit status 1 if anything failed, if a part ran nothing, or if more than a tenth of its seeds were
without meaning. Each seed is one program, or one state dict.
"""

from __future__ import annotations

import argparse
import json
import os
import selectors
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
# `python tests/fuzz` puts this folder first, where its modules would hide others of their names.
sys.path[:] = [str(TESTS), *(p for p in sys.path if Path(p).resolve() != TESTS / "fuzz")]

_PATIENCE = 120.0  # seconds for one seed
_NOTHING = "before the first seed"
_PARTS = ("programs", "checkpoints")
_MEANINGLESS = 0.1  # of the seeds, at most
_CLAIM = "Random programs agree with a model, mutated state dicts are refused or do no harm"


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="fuzz", description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=300.0, help="of all parts together")
    parser.add_argument("--seed", type=int, help="the first; default: by the clock")
    parser.add_argument("--programs", type=int, default=10**9, help="at most so many seeds a part")
    parser.add_argument("--only", choices=_PARTS)
    parser.add_argument("--without", default="", help="kinds of operations, with commas")
    parser.add_argument("--shrink-seconds", type=float, default=10.0, help="for one failure")
    parser.add_argument("--limit", type=int, default=40, help="failures that are printed")
    parser.add_argument("--json", type=Path, help="where the figures go")
    parser.add_argument("--worker", choices=_PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    return parser.parse_args()


class Part:
    """The seeds of one part, worked on in a process that is replaced when it ends."""

    def __init__(self, name: str, first: int, arguments: argparse.Namespace) -> None:
        self.name = name
        self.first = self.next = first
        self.arguments = arguments
        self.counts: Counter[str] = Counter()
        self.failures: list[dict[str, Any]] = []

    def run(self, end: float) -> None:
        last = self.first + self.arguments.programs
        while time.time() < end and self.next < last:
            self._process(end, last - self.next)

    def _process(self, end: float, count: int) -> None:
        command = [sys.executable, str(Path(__file__).resolve()), "--worker", self.name]
        command += ["--seed", str(self.next), "--programs", str(count), "--until", str(end)]
        command += ["--without", self.arguments.without]
        command += ["--shrink-seconds", str(self.arguments.shrink_seconds)]
        with tempfile.TemporaryFile("w+") as errors:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors)
            case = self._listen(process)
            try:
                status = f"ended with status {process.wait(10)}"
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                status = f"was silent for {_PATIENCE} s"
            errors.seek(0)
            self._process_ended(case, process.returncode, status, errors.read())

    def _process_ended(self, case: str | None, code: int, status: str, said: str) -> None:
        """Take in how a process ended; ``case``: as ``_listen`` returned it."""
        if code == 0 and case in (None, _NOTHING):
            return
        _, found, rest = said.partition("ERROR: AddressSanitizer")
        said = found + rest[:3000] if found else said[-3000:]
        if case == _NOTHING:
            sys.exit(said)
        if case is None:  # its seeds were done
            self._failed(self.next - 1, "failure at exit", f"# the process {status}\n{said}", "")
            return
        self._failed(self.next, "crash or hang", f"{case}# the process {status}\n{said}", "")
        self.next += 1

    def _listen(self, process: subprocess.Popen[bytes]) -> str | None:
        """Take in what the process says; return what it did when it fell silent."""
        assert process.stdout is not None
        pipe = process.stdout.fileno()
        case: str | None = _NOTHING
        rest = b""
        with selectors.DefaultSelector() as selector:
            selector.register(pipe, selectors.EVENT_READ)
            while selector.select(_PATIENCE) and (data := os.read(pipe, 1 << 20)):
                *lines, rest = (rest + data).split(b"\n")
                for said in map(json.loads, lines):
                    if "begin" in said:
                        case = ""
                    elif "case" in said:
                        case = said["case"]
                    else:
                        case = None
                        self._ended(said)
        return case

    def _ended(self, said: dict[str, Any]) -> None:
        self.counts.update(said["counts"])
        for each in said["failures"]:
            self._failed(said["end"], each["kind"], each["message"], each["script"])
        self.next = said["end"] + 1

    def _failed(self, seed: int, kind: str, message: str, script: str) -> None:
        failure = dict(part=self.name, seed=seed, kind=kind, message=message, script=script)
        self.failures.append(failure)
        print(f"{self.name}: seed {seed} failed: {kind}", flush=True)

    def report(self, limit: int) -> None:
        """Print the shortest program of each kind of failure, and the seeds of all."""
        by_kind: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for failure in self.failures:
            by_kind[failure["kind"]].append(failure)
        for kind, failures in sorted(by_kind.items(), key=lambda item: -len(item[1]))[:limit]:
            shortest = min(failures, key=lambda f: len(f["script"]))
            seeds = sorted({f["seed"] for f in failures})
            print(f"\n--- {self.name}: {kind}\nseeds {', '.join(map(str, seeds[:30]))}")
            again = f"--only {self.name} --seed {shortest['seed']} --programs 1"
            if self.arguments.without:
                again += f" --without {self.arguments.without}"
            print(f"again: python -m tests.fuzz {again}")
            print(shortest["script"] or shortest["message"])

    def complaint(self) -> str | None:
        """Return what is wrong with a part in which nothing failed: it tried too little."""
        seeds, meaningless = self.next - self.first, self.counts["without meaning"]
        if not self.counts[self.name]:
            return (
                f"{self.name}: nothing ran in {seeds} seeds, expected at least one of {self.name}"
            )
        if meaningless > _MEANINGLESS * seeds:
            return (
                f"{self.name}: {meaningless} of {seeds} seeds were without meaning, expected at "
                f"most {_MEANINGLESS:.0%}"
            )
        return None

    def figures(self) -> dict[str, Any]:
        return {
            "seeds": [self.first, self.next - 1],
            **{k: v for k, v in sorted(self.counts.items())},
            "failures": len(self.failures),
            "kinds of failures": dict(Counter(f["kind"] for f in self.failures)),
        }


def described(arguments: argparse.Namespace, parts: list[Part]) -> dict[str, Any]:
    """Return what a result file holds: the claim, what it depends on, and the figures."""
    sys.path.append(str(TESTS.parent / "benchmarks"))
    from harness import describe_machine

    from tiger_ext import _native

    compiled = b"" if _native.C is None else Path(_native.C.__file__).read_bytes()
    sanitizers = {"address": b"__asan_init", "undefined": b"__ubsan_handle"}
    return {
        "script": "tests/fuzz",
        "claim": _CLAIM,
        "machine": {k: v for k, v in describe_machine().items() if k != "peers"},
        "options": {k: getattr(arguments, k) for k in ("seconds", "seed", "only", "without")},
        "sanitizers": [name for name, symbol in sanitizers.items() if symbol in compiled],
        **{part.name: part.figures() for part in parts},
    }


def main() -> int:
    arguments = options()
    if arguments.worker:
        from fuzz.work import Work

        without = tuple(filter(None, arguments.without.split(",")))
        seeds = range(arguments.seed, arguments.seed + arguments.programs)
        Work(arguments.worker, without, arguments.shrink_seconds).until(arguments.until, seeds)
        return 0
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    first = int(time.time()) % 10**8 * 10 if arguments.seed is None else arguments.seed
    names = [arguments.only] if arguments.only else list(_PARTS)
    parts = []
    for name in names:
        parts.append(Part(name, first, arguments))
        print(f"{name}: from seed {first}", flush=True)
        parts[-1].run(time.time() + arguments.seconds / len(names))
    for part in parts:
        part.report(arguments.limit)
    if arguments.json:
        arguments.json.write_text(json.dumps(described(arguments, parts), indent=1) + "\n")
    for part in parts:
        c = part.counts
        print(
            f"{part.name}: seeds {part.first} to {part.next - 1}: {c[part.name]} {part.name}, "
            f"{c['steps']} steps, {c['faults']} faults injected, {c['refused']} inputs refused, "
            f"{len(part.failures)} failures; "
            + ("nothing lost" if not part.failures else "see above")
        )
    complaints = [text for part in parts if (text := part.complaint()) is not None]
    for text in complaints:
        print(text)
    return 1 if complaints or any(part.failures for part in parts) else 0


if __name__ == "__main__":
    sys.exit(main())
