# SPDX-License-Identifier: Apache-2.0
"""Writes the README's table of claims from the result files: `python benchmarks/claims.py`."""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- claims: begin -->", "<!-- claims: end -->"
SCRIPTS = (
    "bench_sparse",
    "bench_embedding_step",
    "bench_dense",
    "bench_small_tensors",
    "bench_embedding_options",
    "bench_lazy",
    "bench_clip",
)


def _machine(result: dict) -> str:
    machine = result["machine"]
    return f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}"


def claims_table() -> str:
    """Return the table of every claim that has a bar, in Markdown.

    The newest results lie in ``results``; folders in it hold those of other machines, maybe of
    older code.
    """
    folders = [RESULTS, *sorted(p for p in RESULTS.iterdir() if p.is_dir())]
    files = {
        (folder, name): json.loads((folder / f"{name}.json").read_text())
        for folder in folders
        for name in SCRIPTS
        if (folder / f"{name}.json").exists()
    }
    lines = []
    for letter, folder in zip("ABCDEFG", folders, strict=False):
        own = [result for (place, _), result in files.items() if place == folder]
        machines = " and ".join(sorted({_machine(result) for result in own}))
        dates = sorted({result["machine"]["date"][:10] for result in own})
        when = " to ".join(dict.fromkeys((dates[0], dates[-1])))
        lines.append(f"* **{letter}**: {machines}; {when}, in {folder.relative_to(ROOT)}")
    letters = " | ".join("ABCDEFG"[: len(folders)])
    lines += ["", f"| claim | {letters} | wanted | goal | script |"]
    lines.append("|---" * (len(folders) + 4) + "|")
    for name in SCRIPTS:
        measured = [
            {bar["claim"]: bar for bar in files.get((folder, name), {"bars": []})["bars"]}
            for folder in folders
        ]
        for claim, bar in measured[0].items():
            if bar["bar"] is None:
                continue
            sign = "≤" if bar["at_most"] else "≥"
            goal = "" if bar["goal"] is None else f"{sign} {bar['goal']:g}"
            values = " | ".join(_value(bars.get(claim)) for bars in measured)
            lines.append(
                f"| {claim} | {values} | {sign} {bar['bar']:g} | {goal} | benchmarks/{name}.py |"
            )
    return "\n".join(lines)


def _value(bar: dict | None) -> str:
    if bar is None:
        return ""
    return f"{bar['value']:.3g}" + (" (**not met**)" if bar["verdict"] == "NOT MET" else "")


def readme_with_claims() -> str:
    """Return the README with the table between its markers replaced."""
    before, rest = README.read_text().split(BEGIN)
    return f"{before}{BEGIN}\n{claims_table()}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    README.write_text(readme_with_claims())
