# SPDX-License-Identifier: Apache-2.0
"""What examples/next_token.py shows at the end: a picture and a table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

__all__ = ["save_plot", "table"]

_COLORS = ("tab:orange", "tab:blue")


def save_plot(result: dict[str, Any], path: Path) -> None:
    """Draw held-out loss and optimizer time per step of the run ``result`` into a PNG file."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    loss, time = figure.subplots(1, 2)
    for run, color in zip(result["runs"], _COLORS, strict=True):
        steps, losses = zip(*run["held_out"], strict=True)
        loss.plot(steps, losses, "o-", ms=4, color=color, label=f"{run['name']}: {losses[-1]:.3f}")
        label = f"{run['name']}: median {run['optimizer_ms']:.1f} ms"
        times = run["optimizer_ms_per_step"]
        time.plot(range(1, len(times) + 1), times, ".", ms=3, color=color, label=label)
        time.axhline(run["optimizer_ms"], color=color, lw=1)
    unigram = result["unigram_loss"]
    loss.axhline(unigram, color="gray", ls="--", lw=1, label=f"token frequencies: {unigram:.3f}")
    loss.set(title="Held-out files", xlabel="step", ylabel="loss, nats per token")
    time.set(
        title=f"Optimizer alone, threads: {result['threads']}",
        xlabel="step",
        ylabel="milliseconds per step",
        yscale="log",
    )
    for axes in (loss, time):
        axes.grid(alpha=0.3)
        axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def table(result: dict[str, Any]) -> str:
    """Return the closing table of the run ``result``: a row an optimizer, and their ratios."""
    head = ("optimizer", "steps", "lr rows/dense", "held-out loss", "ms per step", "state MiB")
    lines = [head]
    for run in result["runs"]:
        lines.append(
            (
                run["name"],
                str(result["steps"]),
                f"{run['lr']['rows']:g} / {run['lr']['dense']:g}",
                f"{run['held_out'][0][1]:.3f} -> {run['held_out'][-1][1]:.3f}",
                f"{run['optimizer_ms']:.2f}",
                f"{run['state_bytes'] / 2**20:.1f}",
            )
        )
    ours, peer = result["runs"]
    lines.append(
        (
            f"{peer['name']} / {ours['name']}",
            "",
            "",
            f"difference {peer['held_out'][-1][1] - ours['held_out'][-1][1]:+.3f}",
            f"{result['time_ratio']:.2f} x",
            f"{result['state_ratio']:.2f} x",
        )
    )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    text = []
    for line in lines:
        name, *cells = (cell for cell in line)
        cells = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        text.append("  ".join([name.ljust(widths[0]), *cells]).rstrip())
    return "\n".join([text[0], rule, *text[1:-1], rule, text[-1]])
