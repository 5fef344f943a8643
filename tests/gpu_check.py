# SPDX-License-Identifier: Apache-2.0
"""Builds, tests, sanitizes and measures the CUDA kernels on the GPU at hand, in under nine minutes.

    python tests/gpu_check.py [--only build|test|sanitize|bench] [--out DIR]

Uses the running interpreter with its torch, and no network. DIR (default: $OUT, else
build/gpu-check) receives a log of each stage, the benchmarks' results, and summary.json.
Exit status: 0; 1 if a stage failed, the others having run all the same; 2 without a GPU.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "gpu"
KERNEL_TESTS = ROOT / "tests" / "cuda_on_cpu"
# Of each stage, the seconds that the stages before it must leave.
STAGES = {"build": 60, "test": 120, "sanitize": 70, "bench": 150}
TOTAL_SECONDS = 530
BENCHMARKS = {"gpu_dense": 40, "gpu_sparse": 100, "gpu_host": 30}
OPTIONAL_PACKAGES = ("hypothesis", "expecttest", "psutil", "matplotlib", "tqdm")
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
# A few tests of every kernel; what they check on the host takes most of their time.
SANITIZED = (
    "test_sizes and (float32-8193 or bfloat16-33) and not lion"
    " or test_large_and_small_tensors_in_turn"
    " or test_row_lengths and (f32-129-tiger or bf16-7-tiger or mix-64-lion or f32-1025-adamw)"
    " or test_patterns and skewed-sorted-tiger"
    " or test_one_row_takes_all and (f32 or f64) and 513-tiger"
    " or test_sorted_unique_rows and 40- and -said-tiger"
    " or test_degenerate_tables and tiger"
    " or test_dense_and_sparse_in_one_step"
    " or test_rows_catch_up and 64-float32 and (tiger-exact or adamw-decay)"
    " or test_tracked_reads and 64-tiger-exact"
    " or test_strided_gradients_after_sparse_ones and contiguous and tiger-exact"
    " or test_sparse_rows and (float32-300-tiger-int8 or bfloat16-64-adamw-row)"
    " or test_blocks_that_begin_anywhere and 8-lion-int8-rounding"
    " or test_a_flush_brings_all_rows_up_to_date and (lion-int8-rounding or adamw-row-int8)"
)
SANITIZER_ERROR = 86
LOG_BYTES = 8 << 20


@dataclass(frozen=True)
class Outcome:
    """How a command ended; ``detail`` is the last line of its output."""

    stage: str
    name: str
    seconds: float
    passed: bool
    detail: str
    output: str = ""


class Round:
    """One run over the stages, with a common end."""

    def __init__(self, out: Path, stages: Sequence[str]) -> None:
        """Start the clock."""
        self.out, self.stages = out, stages
        self.start = time.monotonic()
        self.outcomes: list[Outcome] = []
        self.left_out: list[str] = []

    def seconds_left(self, stage: str) -> float:
        """Return how long a stage may take, if those after it get their share."""
        later = (s for s in self.stages if list(STAGES).index(s) > list(STAGES).index(stage))
        used = time.monotonic() - self.start
        return TOTAL_SECONDS - used - sum(STAGES[s] for s in later)

    def run(
        self,
        stage: str,
        commands: Mapping[str, Sequence[str]],
        limit: float | None = None,
        folder: Path = BUILD / "run",
        **environment: str,
    ) -> list[Outcome]:
        """Run commands side by side, kill them at the limit, append their output to the log."""
        limit = self.seconds_left(stage) if limit is None else limit
        env = {
            **os.environ,
            "PYTHONUNBUFFERED": "1",
            "PYTHONPATH": str(BUILD / "lib"),
            "TIGER_EXT_REQUIRE_NATIVE": "1",
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            **environment,
        }
        (BUILD / "run").mkdir(parents=True, exist_ok=True)
        begin, running = time.monotonic(), {}
        for name, command in commands.items():
            log = (BUILD / f"{stage}-{name}.log").open("w+", errors="replace")
            options = dict(cwd=folder, env=env, stdin=subprocess.DEVNULL, start_new_session=True)
            running[name] = (
                log,
                subprocess.Popen(
                    [str(c) for c in command], stdout=log, stderr=subprocess.STDOUT, **options
                ),
            )
        ends: dict[str, float] = {}
        while len(ends) < len(running):
            now = time.monotonic() - begin
            for name, (_, process) in running.items():
                if name not in ends and (process.poll() is not None or now > limit):
                    ends[name] = now
                    if process.returncode is None:
                        os.killpg(process.pid, signal.SIGKILL)
                        process.wait()
            time.sleep(0.05)
        outcomes = [
            self._outcome(stage, name, ends[name], limit, process.returncode, log)
            for name, (log, process) in running.items()
        ]
        with (self.out / f"{stage}.log").open("a", errors="replace") as stage_log:
            for outcome in outcomes:
                stage_log.write(f"==== {outcome.name}: {_state(outcome)}\n{outcome.output}\n")
        self.outcomes += outcomes
        return outcomes

    @staticmethod
    def _outcome(stage, name, seconds, limit, status, log) -> Outcome:
        with log:
            log.seek(0)
            output = log.read()
        if len(output) > LOG_BYTES:
            output = f"{output[: LOG_BYTES // 4]}\n[...]\n{output[-LOG_BYTES // 2 :]}"
        lines = [line.strip("= ") for line in output.splitlines() if line.strip("= ")]
        detail = lines[-1] if lines else "no output"
        if status == -signal.SIGKILL and seconds > limit:
            detail = f"killed at its limit; last line: {detail}"
        elif status != 0:
            detail = f"exit status {status}: {detail}"
        return Outcome(stage, name, round(seconds, 1), status == 0, detail, output)

    def fail(self, stage: str, name: str, why: str) -> None:
        """Record what could not even be started."""
        self.outcomes.append(Outcome(stage, name, 0.0, False, why))


def _state(outcome: Outcome) -> str:
    return f"{'passed' if outcome.passed else 'FAILED'} in {outcome.seconds:.1f} s"


# --------------------------------------------------------------------------------------- stages


def build(check: Round) -> None:
    shutil.rmtree(BUILD / "lib", ignore_errors=True)
    major, minor = torch.cuda.get_device_capability()
    environment = {
        "TIGER_EXT_CUDA": "1",
        "TORCH_CUDA_ARCH_LIST": f"{major}.{minor}",
        "MAX_JOBS": str(min(os.cpu_count() or 1, 16)),
        **_toolkit(),
    }
    command = [sys.executable, "setup.py", "build"]
    command += ["--build-lib", BUILD / "lib", "--build-temp", BUILD / "temp"]
    check.run("build", {"build": command}, folder=ROOT, **environment)


def _toolkit() -> dict[str, str]:
    """Return the CUDA_HOME of the first toolkit found."""
    nvcc = Path(shutil.which("nvcc") or "/").resolve()
    for place in (os.environ.get("CUDA_HOME", "/"), nvcc.parent.parent, "/usr/local/cuda"):
        if Path(place, "bin/nvcc").exists() and Path(place, "include/cuda_runtime.h").exists():
            return {"CUDA_HOME": str(place)}
    return {}


def _pytest(*arguments: str | Path) -> list[str | Path]:
    options = ["-c", ROOT / "pyproject.toml", "--rootdir", ROOT, "-p", "no:cacheprovider"]
    options += ["-o", "faulthandler_timeout=100", "--tb=short"]
    return [sys.executable, "-m", "pytest", *options, *arguments]


def missing_packages() -> list[str]:
    """Return the optional packages that cannot be imported here."""
    missing = []
    for name in OPTIONAL_PACKAGES:
        try:
            importlib.import_module(name)
        except ImportError:
            missing.append(name)
    return missing


def needs(path: Path, missing: Sequence[str]) -> list[str]:
    """Return which of the missing packages a test file imports."""
    text = path.read_text()
    found = [p for p in missing if re.search(rf"^(import|from) {p}\b", text, re.MULTILINE)]
    if "expecttest" in missing and "torch.testing._internal" in text:
        found.append("expecttest")
    return found


def test(check: Round) -> None:
    kernel_files = sorted(KERNEL_TESTS.glob("test_*.py"))
    limit = check.seconds_left("test") - STAGES["test"] / 2
    check.run("test", {"tiger_ext": [sys.executable, "-m", "tiger_ext"]}, limit)
    check.run("test", {path.stem: _pytest(path) for path in kernel_files}, limit)
    missing = missing_packages()
    rest = {}
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        if why := needs(path, missing):
            check.left_out.append(f"{path.name} (needs {', '.join(why)})")
        else:
            rest[path.stem] = _pytest(path)
    threads = max(1, min(4, (os.cpu_count() or 1) // 4))
    check.run("test", rest, OMP_NUM_THREADS=str(threads))


def sanitize(check: Round) -> None:
    places = [os.environ["PATH"], *(f"{home}/bin" for home in _toolkit().values())]
    program = shutil.which("compute-sanitizer", path=os.pathsep.join(places))
    if program is None:
        check.fail("sanitize", "compute-sanitizer", "not found")
        return
    common = [program, "--error-exitcode", SANITIZER_ERROR, "--launch-timeout", 60]
    common += ["--target-processes", "all", "--print-limit", 1000]
    tests = _pytest(KERNEL_TESTS, "-k", SANITIZED)
    special = {"memcheck": ["--report-api-errors=no"]}
    commands = {tool: [*common, "--tool", tool, *special.get(tool, ()), *tests] for tool in TOOLS}
    outcomes = check.run("sanitize", commands, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    check.outcomes[-len(outcomes) :] = map(_judge_sanitizer, outcomes)


def _judge_sanitizer(outcome: Outcome) -> Outcome:
    """Judge by the tests' result and the errors; CUB's known reads of raw memory do not count.

    initcheck reports some of CUB's kernels, which read what they then ignore (NVIDIA/cccl#1891).
    """
    tests = re.findall(r"^.*\b\d+ passed.*$", outcome.output, re.MULTILINE)
    summary = re.findall(r"SUMMARY: .*", outcome.output)
    if not tests or not summary:
        return replace(outcome, passed=False)
    detail = f"{tests[-1].strip('= ')}; {summary[-1]}"
    passed = outcome.passed and " failed" not in tests[-1]
    if outcome.name == "initcheck" and outcome.detail.startswith(f"exit status {SANITIZER_ERROR}"):
        blocks = re.split(r"^=+ (?=Uninitialized )", outcome.output, flags=re.MULTILINE)[1:]
        places = [b.splitlines()[1] for b in blocks]
        others = sum("cub::" not in place for place in places)
        total = int(re.findall(r"SUMMARY: (\d+) error", outcome.output)[-1])
        passed = others == 0 and len(places) == total and " failed" not in tests[-1]
        detail += f", {others} outside CUB"
    return replace(outcome, passed=passed, detail=detail)


def bench(check: Round) -> None:
    extra = 25  # a script starts, ends, and finishes what it is at
    left = check.seconds_left("bench") - extra * len(BENCHMARKS)
    scale = min(1.0, left / sum(BENCHMARKS.values()))
    for name, seconds in BENCHMARKS.items():
        script = ROOT / "benchmarks" / f"bench_{name}.py"
        arguments = ["--out", check.out, "--seconds", round(scale * seconds)]
        command = [sys.executable, script, *arguments]
        check.run("bench", {name: command}, scale * seconds + extra)


# -------------------------------------------------------------------------------------- summary


def claims(out: Path) -> list[dict]:
    """Return the bars of the benchmarks' result files."""
    files = (out / f"{name}.json" for name in BENCHMARKS)
    return [bar for f in files if f.exists() for bar in json.loads(f.read_text())["bars"]]


def print_summary(check: Round) -> None:
    bars = claims(check.out)
    print("\nfigures without a bar")
    print("\n".join(f"  {b['claim']}: {_number(b['value'])}" for b in bars if b["bar"] is None))
    for o in check.outcomes:
        if not o.passed:
            print(f"\n---- {o.stage} {o.name}: {_state(o)}")
            print("\n".join(line[:160] for line in o.output.splitlines()[-12:]))
    print("\nstage, command, result")
    for o in check.outcomes:
        print(f"  {o.stage:8} {o.name:26} {_state(o):18} {o.detail[:100]}")
    for text in check.left_out:
        print(f"  test     left out: {text}")
    print("\nclaim, value, bar, goal, verdict")
    for b in bars:
        if b["bar"] is not None:
            limits = f"{'<=' if b['at_most'] else '>='} {b['bar']:g}, {b['goal']:g}"
            print(f"  {b['claim']}: {_number(b['value'])}, {limits}, {b['verdict']}")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=STAGES)
    default = Path(os.environ.get("OUT") or ROOT / "build" / "gpu-check")
    parser.add_argument("--out", type=Path, default=default)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("There is no CUDA GPU here that torch can use.")
        return 2
    stages = [args.only] if args.only else list(STAGES)
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    check = Round(out, stages)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, results in {out}")
    for stage in stages:
        (out / f"{stage}.log").unlink(missing_ok=True)
        begin = len(check.outcomes)
        try:
            globals()[stage](check)
        except Exception as error:  # the other stages, and the summary, shall not be lost
            check.fail(stage, "gpu_check", f"{type(error).__name__}: {error}")
        passed = all(o.passed for o in check.outcomes[begin:])
        print(f"{stage}: {'passed' if passed else 'FAILED'}", flush=True)
    failed = list(dict.fromkeys(o.stage for o in check.outcomes if not o.passed))
    summary = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "seconds": round(time.monotonic() - check.start, 1),
        "failed": failed,
        "missing_packages": missing_packages(),
        "left_out": check.left_out,
        "commands": [{k: v for k, v in asdict(o).items() if k != "output"} for o in check.outcomes],
        "claims": claims(out),
    }
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    print_summary(check)
    verdict = f"FAILED ({', '.join(failed)})" if failed else "passed"
    print(f"\ngpu-check: {verdict} in {summary['seconds']:.0f} s")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
