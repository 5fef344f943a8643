# SPDX-License-Identifier: Apache-2.0
"""Writes the README's table of claims from the result files: `python benchmarks/claims.py`."""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
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


def claims_table() -> str:
    """Return the table of every claim that has a bar, in Markdown."""
    rows = ["| claim | measured | wanted | goal | script | result |", "|---|---|---|---|---|---|"]
    machines = set()
    for name in SCRIPTS:
        path = Path("benchmarks/results") / f"{name}.json"
        result = json.loads((ROOT / path).read_text())
        machine = result["machine"]
        machines.add(f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}")
        for bar in result["bars"]:
            if bar["bar"] is None:
                continue
            sign = "≤" if bar["at_most"] else "≥"
            goal = "" if bar["goal"] is None else f"{sign} {bar['goal']:g}"
            missed = " (**not met**)" if bar["verdict"] == "NOT MET" else ""
            rows.append(
                f"| {bar['claim']} | {bar['value']:.3g}{missed} | {sign} {bar['bar']:g} | {goal} "
                f"| benchmarks/{name}.py | {path} |"
            )
    return "\n".join([f"Measured on {' and '.join(sorted(machines))}.", "", *rows])


def readme_with_claims() -> str:
    """Return the README with the table between its markers replaced."""
    before, rest = README.read_text().split(BEGIN)
    return f"{before}{BEGIN}\n{claims_table()}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    README.write_text(readme_with_claims())
