# SPDX-License-Identifier: Apache-2.0
"""Draws docs/step_time.png from the result files: `python benchmarks/plot_step_time.py`.

Four cells of four result files, one a panel, and no number that is not in them. What was drawn is
kept in the picture as text, so that a test sees when the files have newer figures.
"""

from __future__ import annotations

import json
import struct
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from claims import machine_of

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PICTURE = ROOT / "docs" / "step_time.png"
KEY = "Figures"  # of the picture's text

# Names in the result files, and in the picture where that is another. The first is the yardstick.
OURS = {"Tiger": "tiger_ext Tiger", "AdamW": "tiger_ext AdamW"}
SGD_OF_ROWS = {"torch SGD": "torch SGD, no momentum"}
SGD_FUSED = {"torch fused SGD": "torch fused SGD, momentum"}


@dataclass(frozen=True)
class Panel:
    """One cell of a result file: who is shown, and what the dashed line is.

    ``line``: "floor", the time that the bytes of Tiger's step take at the in-place bandwidth of the
    machine, before and after the run; the name of a contender; or None.
    """

    title: str
    script: str
    cell: str
    names: dict[str, str]
    line: str | None
    line_label: str


PANELS = (
    Panel(
        "Step on a sparse gradient",
        "bench_sparse",
        "1e6 x 64, n 65,536, zipf 1.05",
        OURS | SGD_OF_ROWS | {"torch Adagrad": "", "torch SparseAdam": ""},
        "floor",
        "memory limit of Tiger's step",
    ),
    Panel(
        "Embedding: forward, backward, step",
        "bench_embedding_step",
        "1e6 x 64, n 65,536 in bags of 16, zipf 1.05",
        OURS
        | {"FBGEMM SGD": "FBGEMM SGD, no momentum"}
        | {"FBGEMM row-wise Adagrad": "", "FBGEMM Adagrad": "", "torch SparseAdam": ""},
        "no step",
        "forward and backward alone",
    ),
    Panel(
        "Step on a dense gradient",
        "bench_dense",
        "32M float32",
        OURS
        | {"DeepSpeedCPULion": ""}
        | SGD_FUSED
        | {"torch fused AdamW": "", "pytorch-optimizer Tiger": "", "lion-pytorch": ""},
        "floor",
        "memory limit of Tiger's step",
    ),
    Panel(
        "Step on 1,000 small tensors",
        "bench_small_tensors",
        "1,000 tensors of 64",
        OURS
        | {"DeepSpeedCPULion": ""}
        | SGD_FUSED
        | {"torch fused AdamW": "", "pytorch-optimizer Tiger": "", "lion-pytorch": ""},
        None,
        "",
    ),
)
SUBTITLES = {
    "bench_sparse": "table of 1e6 x 64, 65,536 Zipf entries",
    "bench_embedding_step": "table of 1e6 x 64, 65,536 Zipf ids in bags of 16",
    "bench_dense": "32 M float32 parameters in one tensor",
    "bench_small_tensors": "64 float32 parameters each",
}


@dataclass(frozen=True)
class Bar:
    """A contender's median in seconds, and how many times that of Tiger it is."""

    name: str
    seconds: float
    times_tiger: float | None


@dataclass(frozen=True)
class Figures:
    """What one panel shows. ``line``: seconds, from and to."""

    script: str
    cell: str
    machine: str
    bars: list[Bar]
    line: list[float] | None


def figures() -> list[Figures]:
    """Return all figures of the picture, read from the result files."""
    return [_figures_of(panel) for panel in PANELS]


def _figures_of(panel: Panel) -> Figures:
    result = json.loads((RESULTS / f"{panel.script}.json").read_text())
    (cell,) = [c for c in result["cells"] if c["name"] == panel.cell]
    seconds = {name: timing["median"] for name, timing in cell["seconds"].items()}
    bars = [
        Bar(name, seconds[name], cell["times_Tiger"].get(name, {"median": None})["median"])
        for name in panel.names
    ]
    bars.sort(key=lambda bar: bar.seconds)
    return Figures(
        panel.script, panel.cell, machine_of(result), bars, _line(panel, result, cell, seconds)
    )


def _line(
    panel: Panel, result: dict[str, Any], cell: dict[str, Any], seconds: dict[str, float]
) -> list[float] | None:
    if panel.line is None:
        return None
    if panel.line != "floor":
        return [seconds[panel.line]] * 2
    # The share is of the bandwidth before the run; how much the machine has changed since then
    # makes the line a band.
    share = cell.get("floor_share") or cell["floor share Tiger"]
    rates = [rate["median"] for rate in result["in_place_bytes_per_second"].values()]
    before = result["in_place_bytes_per_second"]["before"]["median"]
    floor = share * seconds["Tiger"]
    return sorted(float(f"{floor * before / rate:.4g}") for rate in rates)


def drawn_figures() -> list[dict[str, Any]]:
    """Return the figures that the picture was drawn from."""
    picture = PICTURE.read_bytes()
    begin = len(b"\x89PNG\r\n\x1a\n")
    while begin < len(picture):  # a chunk: length, kind, data, checksum
        length, kind = struct.unpack_from(">I4s", picture, begin)
        key, _, text = picture[begin + 8 : begin + 8 + length].partition(b"\0")
        if kind == b"tEXt" and key.decode() == KEY:
            return json.loads(text)
        begin += length + 12
    raise ValueError(f"{PICTURE.name} was not drawn by this script")


def plain_figures() -> list[dict[str, Any]]:
    """Return the result files' figures in the form that the picture keeps."""
    return [asdict(f) for f in figures()]


# -------------------------------------------------------------------------------------- drawing

INK, GREY, PEER, LIMIT = "#1f2328", "#59636e", "#b4bcc6", "#c2410c"
COLOURS = {"Tiger": "#0b5cad", "AdamW": "#7fb0de"}


def _digits(value: float, count: int) -> str:
    return f"{value:#.{count}g}".rstrip(".")


def _ms(seconds: float) -> str:
    return f"{_digits(seconds * 1e3, 3)} ms"


def _draw_panel(axes: Any, panel: Panel, shown: Figures) -> None:
    bars = shown.bars
    longest = max(bar.seconds for bar in bars)
    axes.barh(
        range(len(bars)),
        [bar.seconds for bar in bars],
        height=0.68,
        color=[COLOURS.get(bar.name, PEER) for bar in bars],
    )
    for y, bar in enumerate(bars):
        ratio = "" if bar.times_tiger is None else f"   {_digits(bar.times_tiger, 2)}×"
        axes.text(
            bar.seconds + 0.015 * longest,
            y,
            _ms(bar.seconds) + ratio,
            va="center",
            fontsize=9,
            color=INK,
            weight="bold" if bar.name == "Tiger" else "normal",
            bbox=dict(facecolor="white", edgecolor="none", pad=0.5),
            zorder=3,
        )
    if shown.line is not None:
        low, high = shown.line
        if high > 1.02 * low:
            when = f"{_ms(low)} to {_ms(high)}"
            axes.axvspan(low, high, color=LIMIT, alpha=0.25, linewidth=0, zorder=2)
        else:
            when = _ms(high)
            axes.axvline(high, color=LIMIT, linewidth=1.5, linestyle=(0, (3, 2)), zorder=2)
        axes.text(
            high + 0.015 * longest,
            len(bars) - 0.35,
            f"{panel.line_label}: {when}",
            fontsize=8,
            color=LIMIT,
            va="center",
        )
    axes.set_yticks(
        range(len(bars)), [panel.names[bar.name] or bar.name for bar in bars], fontsize=9
    )
    for label, bar in zip(axes.get_yticklabels(), bars, strict=True):
        label.set_color(INK)
        label.set_weight("bold" if bar.name == "Tiger" else "normal")
    axes.set_ylim(len(bars) - 0.1, -0.6)
    axes.set_xlim(0, 1.28 * longest)
    axes.set_xticks([])
    axes.tick_params(length=0)
    for side in ("top", "right", "bottom"):
        axes.spines[side].set_visible(False)
    axes.spines["left"].set_color(GREY)
    axes.set_title(f"{panel.title}\n", loc="left", fontsize=11, weight="bold", color=INK, pad=4)
    axes.text(0, 1.03, SUBTITLES[panel.script], transform=axes.transAxes, fontsize=8.5, color=GREY)


def draw() -> None:
    """Write the picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    shown = figures()
    picture, grid = pyplot.subplots(2, 2, figsize=(11, 6.4), layout="constrained")
    picture.patch.set_facecolor("white")
    for axes, panel, each in zip(grid.flat, PANELS, shown, strict=True):
        _draw_panel(axes, panel, each)
    machines = " and ".join(dict.fromkeys(each.machine for each in shown))
    picture.suptitle(
        f"Median time, shorter is better; ×: times tiger_ext's Tiger.  {machines}",
        x=0.01,
        ha="left",
        fontsize=9.5,
        color=GREY,
    )
    pixels = BytesIO()
    picture.savefig(pixels, dpi=140)
    pyplot.close(picture)
    text = PngInfo()
    text.add_text(KEY, json.dumps([asdict(each) for each in shown]))
    # A palette: a third of the bytes.
    Image.open(pixels).convert("RGB").quantize(64).save(PICTURE, optimize=True, pnginfo=text)


if __name__ == "__main__":
    draw()
