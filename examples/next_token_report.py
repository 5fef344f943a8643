# SPDX-License-Identifier: Apache-2.0
"""What examples/next_token.py shows at the end: a picture, a table, and what it comes to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

__all__ = ["findings", "save_plot", "table"]

_COLORS = ("tab:orange", "tab:green", "tab:blue")
# The second covers the third wherever their losses agree.
_STYLES = ("o-", "o-", "s:")
# Above the best final loss: the first points lie far above, and the last ones close together.
_SHOWN_NATS = 1.3
_MIB = 2**20


def save_plot(result: dict[str, Any], path: Path) -> None:
    """Draw the held-out loss of ``result`` against steps and against seconds into a PNG file."""
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, key, unit in zip(panels, ("step", "seconds"), ("steps", "s"), strict=True):
        for run, color, style in zip(result["runs"], _COLORS, _STYLES, strict=True):
            x, losses = ([point[name] for point in run["held_out"]] for name in (key, "loss"))
            label = f"{run['name']}: {losses[-1]:.3f} after {x[-1]:.3g} {unit}"
            axes.plot(x, losses, style, ms=4, color=color, label=label)
        axes.grid(alpha=0.3)
        axes.legend()
    finals = [run["held_out"][-1]["loss"] for run in result["runs"]]
    panels[0].set_ylim(min(finals) - 0.1, min(finals) + _SHOWN_NATS)
    panels[0].set(
        title="The same steps", xlabel="step", ylabel="loss on held-out files, nats per token"
    )
    panels[1].set(
        title=f"The same time, threads: {result['threads']}",
        xlabel="seconds of forward, backward and optimizer",
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def table(result: dict[str, Any]) -> str:
    """Return the closing table of the run ``result``, a row an optimizer."""
    lines = [
        (
            "",
            "held-out loss",
            "optimizer ms",
            "whole step ms",
            f"{result['steps']} steps, s",
            "state MiB",
        )
    ]
    for run in result["runs"]:
        last = run["held_out"][-1]
        lines.append(
            (
                run["name"],
                f"{last['loss']:.3f}",
                f"{run['optimizer_ms']:.1f}",
                f"{run['step_ms']:.1f}",
                f"{last['seconds']:.1f}",
                f"{run['state_bytes'] / _MIB:.1f}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = []
    for name, *cells in lines:
        cells = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        text.append("  ".join([name.ljust(widths[0]), *cells]))
    return "\n".join([text[0], "-" * len(text[0]), *text[1:]])


def findings(result: dict[str, Any]) -> list[str]:
    """Return what a user of each of the others gains or loses against the last run."""
    *others, peer = result["runs"]
    sentences = []
    for run in others:
        sentences += [
            f"{run['name']}, time: {_time(run, peer)}.",
            f"{run['name']}, memory: {_memory(run, peer)}.",
            f"{run['name']}, loss: {_loss(run, peer)}.",
        ]
    return sentences


def _time(run: dict[str, Any], peer: dict[str, Any]) -> str:
    speedup = peer["optimizer_ms"] / run["optimizer_ms"]
    optimizer = f"{speedup:.1f} times faster" if speedup >= 1 else f"{1 / speedup:.1f} times slower"
    whole = _shorter(run["step_ms"], peer["step_ms"])
    total = _shorter(*(r["held_out"][-1]["seconds"] for r in (run, peer)))
    return (
        f"the optimizer is {optimizer}, the whole step {whole}, all steps with the first ones, "
        f"which allocate the state, {total}"
    )


def _shorter(ours: float, theirs: float) -> str:
    return f"{abs(1 - ours / theirs):.0%} {'shorter' if ours <= theirs else 'longer'}"


def _memory(run: dict[str, Any], peer: dict[str, Any]) -> str:
    ours, theirs = run["state_bytes"], peer["state_bytes"]
    if abs(ours - theirs) < 0.001 * theirs:
        return "as much optimizer state"
    difference = f"{abs(ours - theirs) / _MIB:.1f} MiB {'less' if ours < theirs else 'more'}"
    return f"{difference} optimizer state, {ours / theirs:.0%} of it"


def _loss(run: dict[str, Any], peer: dict[str, Any]) -> str:
    ours, theirs = (r["held_out"][-1]["loss"] for r in (run, peer))
    if abs(ours - theirs) < 0.005:
        return f"the same to two decimals ({ours:.3f} and {theirs:.3f} nats per token)"
    difference = f"{abs(ours - theirs):.3f} nats per token"
    return f"{difference} {'lower' if ours < theirs else 'higher'}"
