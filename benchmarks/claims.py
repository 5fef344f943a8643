# SPDX-License-Identifier: Apache-2.0
"""Writes the tables of claims from the result files: `python benchmarks/claims.py`.

README.md has the claims of ``HEADLINES``; docs/benchmarks.md has all claims with a bar, and where
peers are faster.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
BENCHMARKS = ROOT / "docs" / "benchmarks.md"
RESULTS = ROOT / "benchmarks" / "results"
SCRIPTS = (
    "bench_sparse",
    "bench_embedding_step",
    "bench_dense",
    "bench_small_tensors",
    "bench_embedding_options",
    "bench_lazy",
    "bench_compact_state",
    "bench_clip",
)
# Contenders that are ours, or no optimizer.
NO_PEERS = ("Lion", "AdamW", "no step")
# What the README quotes, met or not: a figure of each kind, at most eight.
HEADLINES = (
    "Tiger vs SparseAdam, geometric mean",
    "floor share, uniform, D >= 64",
    "time, 1e8 rows over 1e6 rows",
    "Tiger vs FBGEMM Adagrad, geometric mean",
    "Tiger vs torch fused AdamW",
    "Tiger vs DeepSpeedCPULion",
    "1,000 tensors, Tiger vs torch fused AdamW",
    'time of "exact" over "frozen", Tiger, uniform, D = 64',
)


def machine_of(result: dict) -> str:
    """Return what a result was measured on."""
    machine = result["machine"]
    return f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}"


@dataclass(frozen=True)
class Machine:
    """A folder of result files: the newest, or those of another machine, maybe of older code."""

    letter: str
    folder: Path
    results: dict[str, dict]  # by script

    def bar(self, script: str, claim: str) -> dict | None:
        """Return the measured claim, if it was."""
        bars = self.results.get(script, {"bars": []})["bars"]
        return next((bar for bar in bars if bar["claim"] == claim), None)

    def line(self) -> str:
        """Return the legend."""
        machines = " and ".join(sorted({machine_of(result) for result in self.results.values()}))
        dates = sorted({result["machine"]["date"][:10] for result in self.results.values()})
        when = " to ".join(dict.fromkeys((dates[0], dates[-1])))
        return f"* **{self.letter}**: {machines}; {when}, in {self.folder.relative_to(ROOT)}"


def machines() -> list[Machine]:
    """Return the machines, that of the newest results first."""
    folders = [RESULTS, *sorted(p for p in RESULTS.iterdir() if p.is_dir())]
    return [
        Machine(
            letter,
            folder,
            {
                name: json.loads((folder / f"{name}.json").read_text())
                for name in SCRIPTS
                if (folder / f"{name}.json").exists()
            },
        )
        for letter, folder in zip("ABCDEFG", folders, strict=False)
    ]


def claims() -> list[tuple[str, dict]]:
    """Return script and bar of every claim that something was promised for.

    Of each script those of the first machine that has run it.
    """
    found = []
    for name in SCRIPTS:
        results = [machine.results[name] for machine in machines() if name in machine.results]
        found += [(name, bar) for bar in results[0]["bars"] if bar["bar"] is not None]
    return found


def full_table() -> str:
    """Return every claim with its goal, in Markdown, and how many are not met."""
    lines = _table(claims(), ("goal", "script"), lambda name: f"benchmarks/{name}.py")
    counts = []
    for machine in machines():
        bars = [machine.bar(name, bar["claim"]) for name, bar in claims()]
        measured = [bar for bar in bars if bar is not None]
        missed = [bar for bar in measured if _missed(bar)]
        counts.append(f"{len(missed)} of {len(measured)} on {machine.letter}")
    return "\n".join([*lines, "", f"Not met: {', '.join(counts)}."])


def headline_table() -> str:
    """Return the claims of ``HEADLINES``, in Markdown."""
    rows = {bar["claim"]: (name, bar) for name, bar in claims()}
    return "\n".join(_table([rows[claim] for claim in HEADLINES], ("script",), lambda name: name))


def _table(
    rows: Iterable[tuple[str, dict]], more: tuple[str, ...], link: Callable[[str], str]
) -> list[str]:
    all_machines = machines()
    headers = ["claim", *(m.letter for m in all_machines), "wanted", *more]
    lines = [machine.line() for machine in all_machines]
    lines += ["", f"| {' | '.join(headers)} |", "|---" * len(headers) + "|"]
    for name, bar in rows:
        sign = "≤" if bar["at_most"] else "≥"
        cells = {
            "wanted": f"{sign} {bar['bar']:g}",
            "goal": "" if bar["goal"] is None else f"{sign} {bar['goal']:g}",
            "script": link(name),
        }
        values = [_value(machine.bar(name, bar["claim"])) for machine in all_machines]
        columns = [bar["claim"], *values, *(cells[h] for h in ("wanted", *more))]
        lines.append(f"| {' | '.join(columns)} |")
    return lines


def faster_peers_table() -> str:
    """Return where peers are faster than Tiger, in Markdown: script, peer, how often, the worst."""
    lines = ["| script | peer | machine | cells where it is faster | slowest |", "|---" * 5 + "|"]
    for name in SCRIPTS:
        for machine in machines():
            cells = machine.results.get(name, {"cells": []})["cells"]
            ratios: dict[str, list[tuple[float, str]]] = {}
            for cell in cells:
                for peer, ratio in cell.get("times_Tiger", {}).items():
                    if peer not in NO_PEERS:
                        ratios.setdefault(peer, []).append((ratio["median"], cell["name"]))
            for peer, all_ratios in ratios.items():
                faster = [each for each in all_ratios if each[0] < 1]
                if faster:
                    worst, where = min(faster)
                    lines.append(
                        f"| {name} | {peer} | {machine.letter} | {len(faster)} of "
                        f"{len(all_ratios)} | {worst:.3g}: {where} |"
                    )
    return "\n".join(lines)


def _missed(bar: dict) -> bool:
    return bar["verdict"] == "NOT MET"


def _value(bar: dict | None) -> str:
    if bar is None:
        return ""
    return f"{bar['value']:.3g}" + (" (**not met**)" if _missed(bar) else "")


def pages() -> dict[Path, str]:
    """Return the pages that have a table of claims, with the table between its markers replaced."""
    readme = _between_markers(README.read_text(), "claims", headline_table())
    benchmarks = _between_markers(BENCHMARKS.read_text(), "claims", full_table())
    benchmarks = _between_markers(benchmarks, "faster", faster_peers_table())
    return {README: readme, BENCHMARKS: benchmarks}


def _between_markers(text: str, name: str, table: str) -> str:
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, rest = text.split(begin)
    return f"{before}{begin}\n{table}\n{end}{rest.split(end)[1]}"


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text)
