# SPDX-License-Identifier: Apache-2.0
"""What every CUDA kernel needs, as the compiler tells, against a committed baseline.

    python tests/kernel_resources.py BUILD_LOG PTX...            compare; exit status 1 if worse
    python tests/kernel_resources.py BUILD_LOG PTX... --update   write the baseline

BUILD_LOG is the output of a build with TIGER_EXT_STRICT=1, PTX are the kernels compiled with
``nvcc --ptx``. No kernel may spill registers or use local memory. More registers than in the
baseline mean fewer threads at a time, more narrow stores that the compiler took wide ones apart
(it did). If a change is wanted, update the baseline.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

BASELINE = Path(__file__).with_suffix(".json")
_ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(sm_\w+)'")
_LOCAL = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers(?:.*?, (\d+) bytes smem)?")


def readable(names: list[str]) -> dict[str, str]:
    """Return short names: functor and template arguments only."""
    demangled = subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
    ).stdout.splitlines()
    short = {}
    for name, text in zip(names, demangled, strict=True):
        if match := re.fullmatch(r"void tiger_ext::multi_tensor_kernel<(.*)>\(.*\)", text):
            text = re.sub(r"tiger_ext::(\(anonymous namespace\)::)?", "", match[1]).strip()
            text = re.sub(r"\(Storage\)(\d)", r"\1", text)
        short[name] = text.replace(" >", ">")
    return short


def resources(log: str) -> dict[str, dict[str, dict[str, int]]]:
    """Return kernel -> architecture -> registers, local memory and spills in bytes."""
    found: list[tuple[str, str, dict[str, int]]] = []
    for line in log.splitlines():
        if match := _ENTRY.search(line):
            found.append((match[1], match[2], {}))
        elif (match := _LOCAL.search(line)) and found and "stack" not in found[-1][2]:
            numbers = [int(n) for n in match.groups()]
            found[-1][2].update(zip(("stack", "spill_stores", "spill_loads"), numbers, strict=True))
        elif (match := _USED.search(line)) and found:
            found[-1][2]["registers"] = int(match[1])
    # CUB's kernels are the toolkit's, and differ from one toolkit to the next.
    own = [f for f in found if "multi_tensor_kernel" in f[0]]
    short = readable(sorted({name for name, _, _ in own}))
    table: dict[str, dict[str, dict[str, int]]] = {}
    for name, architecture, numbers in own:
        table.setdefault(short[name], {})[architecture] = numbers
    return {name: table[name] for name in sorted(table)}


def stores(ptx: str) -> dict[str, dict[str, int]]:
    """Return kernel -> bytes of a store to global memory -> how many there are."""
    counts: dict[str, Counter[str]] = {}
    for line in ptx.splitlines():
        if match := re.search(r"\.entry (\w+)", line):
            counter = counts.setdefault(match[1], Counter())
        elif match := re.search(r"\bst\.global(?:\.v(\d))?\.[a-z](\d+)", line):
            counter[str(int(match[1] or 1) * int(match[2]) // 8)] += 1
    own = {name: count for name, count in counts.items() if "multi_tensor_kernel" in name}
    short = readable(sorted(own))
    return {short[name]: dict(sorted(count.items())) for name, count in own.items()}


def complaints(table: dict, baseline: dict) -> list[str]:
    """Say what is worse than it may be."""
    worse = []
    for name in sorted(set(table) ^ set(baseline)):
        worse.append(f"{name}: {'new' if name in table else 'gone'}; update the baseline")
    for name, by_architecture in table.items():
        wide = by_architecture["stores"]
        expected = baseline.get(name, {}).get("stores", wide)
        if wide != expected:
            worse.append(f"{name}: stores by bytes {wide}, {expected} in the baseline")
        for architecture, numbers in by_architecture.items():
            if architecture == "stores":
                continue
            where = f"{name} ({architecture})"
            if any(numbers[key] for key in ("stack", "spill_stores", "spill_loads")):
                worse.append(f"{where}: uses local memory: {numbers}")
            before = baseline.get(name, {}).get(architecture, numbers)["registers"]
            if numbers["registers"] > before:
                worse.append(f"{where}: {numbers['registers']} registers, {before} in the baseline")
    return worse


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("log", type=Path)
    parser.add_argument("ptx", type=Path, nargs="+")
    parser.add_argument("--update", action="store_true")
    arguments = parser.parse_args()
    table = resources(arguments.log.read_text())
    if not table:
        print(f"{arguments.log} has no report of ptxas")
        return 1
    for path in arguments.ptx:
        for name, count in stores(path.read_text()).items():
            table[name]["stores"] = count
    if arguments.update:
        BASELINE.write_text(json.dumps(table, indent=1) + "\n")
    architectures = sorted({a for by in table.values() for a in by} - {"stores"})
    print(f"{'registers':<76}", *architectures, "stores by bytes")
    for name, by in table.items():
        registers = (f"{by[a]['registers']:>{len(a)}}" for a in architectures if a in by)
        print(f"{name:<76}", *registers, *(f"{n}x{b}" for b, n in by["stores"].items()))
    worse = complaints(table, json.loads(BASELINE.read_text()))
    print(*worse, sep="\n")
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
