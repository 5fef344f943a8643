# SPDX-License-Identifier: Apache-2.0
"""What the GPU benchmarks share beyond harness.py: the device's clock, its bandwidth, its checks.

A step is timed between two events on the device, behind a short kernel that only waits: meanwhile
the host launches the step, as it does in training while the backward pass runs. A step that waits
for the device pays for it all the same. Bandwidth is that of a large device-to-device copy.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import harness
import torch
from bench_sparse import Tables
from harness import Bar, Contender, Race, Report, Timing
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from tiger_ext import _native

DEVICE = torch.device("cuda")
_START = time.monotonic()
CYCLES_PER_SECOND = 2e9  # at least the device's clock
_SHARED_STATE = {"exp_avg": "exp_avg", "momentum_buffer": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
# Share of elements that may differ by more than the tolerance: where a momentum is within rounding
# of zero, either sign is right.
_TOLERANCE = {torch.float32: (1e-4, 1e-3), torch.bfloat16: (0.06, 0.03)}


def parse_arguments(description: str | None, seconds: float) -> argparse.Namespace:
    """Parse the options of a GPU benchmark; exit unless there is a GPU and kernels for it."""

    def options(parser: argparse.ArgumentParser) -> None:
        text = "folder of the result file (default: results; nothing is saved with --quick)"
        parser.add_argument("--out", type=Path, help=text)
        text = f"aim at this duration (default: {seconds:g}, with --quick 15)"
        parser.add_argument("--seconds", type=float, help=text)

    args = harness.parse_arguments(description, options)
    args.seconds = args.seconds or (15.0 if args.quick else seconds)
    if not torch.cuda.is_available():
        print("There is no CUDA GPU here that torch can use.", file=sys.stderr)
        sys.exit(2)
    if _native.C is None or not _native.C.build_info()["cuda"]:
        sys.exit(f"tiger_ext has no CUDA kernels here: {_native.unavailable or 'built without'}")
    return args


def seconds_left(args: argparse.Namespace) -> float:
    """Return what is left of the duration aimed at."""
    return args.seconds - (time.monotonic() - _START)


def free_bytes() -> int:
    """Return how much device memory can be allocated."""
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


# --------------------------------------------------------------------------------------- timing


def _device_seconds(contender: Contender, rotation: int, lead: float) -> float:
    if contender.prepare is not None:
        contender.prepare(rotation)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(int(lead * CYCLES_PER_SECOND))
    begin.record()
    contender.run(rotation)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def alternate(
    contenders: Iterable[Contender], rotations: int, *, lead: float = 5e-4, **limits: Any
) -> Race:
    """Time the contenders in turn as ``harness.alternate`` does, by the device's clock.

    Args:
        contenders: who runs.
        rotations: how many inputs there are to rotate.
        lead: for how many seconds the device waits while the host launches a step.
        limits: ``budget``, ``min_rounds``, ``max_rounds``.
    """
    with mock.patch.object(harness, "_timed", partial(_device_seconds, lead=lead)):
        return harness.alternate(contenders, rotations, **limits)


def copy_bandwidth(gigabytes: float = 4.0, repeats: int = 30) -> Timing:
    """Time a copy from device to device; returns bytes per second, read plus written."""
    source = torch.randn(int(min(gigabytes * 1e9, free_bytes() / 4)) // 4, device=DEVICE)
    target = torch.empty_like(source)
    moved = 2 * source.nbytes
    copy = Contender("copy", lambda _: target.copy_(source))
    seconds = [_device_seconds(copy, 0, 1e-4) for _ in range(repeats + 3)][3:]
    rates = Timing.of([moved / s for s in seconds])
    return Timing(rates.median, rates.quartile1, rates.quartile3, moved / min(seconds), repeats)


# ----------------------------------------------------------------------------------- contenders


@dataclass(frozen=True)
class Method:
    """An optimizer, made by ``make(params, lr=...)``.

    ``reference`` makes one that computes the same on the CPU in float64. ``ours``: a failure is an
    error, and not a peer's that is left out.
    """

    make: Callable[..., Optimizer]
    reference: Callable[..., Optimizer]
    ours: bool = False


def ours(cls: type[Optimizer], **options: Any) -> Method:
    """Return an optimizer of tiger_ext, on its kernels."""
    make = partial(cls, fused=True, **options)
    return Method(make, partial(cls, fused=False, **options), ours=True)


def torchs(
    cls: type[Optimizer], *, way: Mapping[str, bool] | None = None, **options: Any
) -> Method:
    """Return an optimizer of torch; ``way``: which of its implementations."""
    return Method(partial(cls, **options, **(way or {})), partial(cls, **options))


def verify(
    methods: Mapping[str, Method],
    gradients: Sequence[Tensor],
    report: Report,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Check three steps of each against float64; a peer that fails becomes a note."""
    start = torch.randn(gradients[0].shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    tolerance, allowed = _TOLERANCE[dtype]
    for name, method in methods.items():
        tested, expected = Parameter(start.to(DEVICE, copy=True)), Parameter(start.double())
        try:
            pair = method.make([tested], lr=0.1), method.reference([expected], lr=0.1)
            for gradient in gradients:
                tested.grad = gradient.to(DEVICE, dtype)
                expected.grad = gradient.to(dtype).double()
                for optimizer in pair:
                    optimizer.step()
            difference = (tested.detach().cpu().double() - expected.detach()).abs()
            wrong = 1 - (difference <= tolerance).double().mean().item()  # NaN is wrong
            if wrong > allowed:
                raise AssertionError(f"{wrong:.1%} of the parameter is wrong")
            if not (expected.detach() - start.double()).abs().max() > 2 * tolerance:
                raise AssertionError("nothing moved")
        except Exception as error:
            if method.ours:
                raise AssertionError(f"verification of {name}, {dtype}") from error
            report.note(f"verification of {name}, {dtype}: {harness.one_line(error)}")


@torch.no_grad()
def create_optimizers(
    params: Sequence[Parameter],
    methods: Mapping[str, Method],
    gradients: Sequence[Tensor],
    report: Report,
) -> Tables:
    """Return the parameters with all optimizers, each of which has made a step.

    They share first and second moments of equal dtype, so that many fit into memory at once, and
    the shared ones are random.
    """
    tables = Tables(list(params))
    shared: dict[tuple[int, str, torch.dtype], Tensor] = {}
    for name, method in methods.items():
        try:
            optimizer = method.make(tables.params, lr=1e-4)
            tables.set_gradients(gradients)
            optimizer.step()
        except Exception as error:
            if method.ours:
                raise
            report.note(f"{name} left out: {harness.one_line(error)}")
            continue
        for p in tables.params:
            for key in _SHARED_STATE.keys() & optimizer.state[p].keys():
                value = optimizer.state[p][key]
                place = id(p), _SHARED_STATE[key], value.dtype
                optimizer.state[p][key] = shared.setdefault(place, value)
        tables.add(name, optimizer)
    for (_, moment, _), value in shared.items():
        value.normal_(0, 1e-3) if moment == "exp_avg" else value.uniform_(1e-7, 1e-5)
    return tables


def dense_step_bytes(tables: Tables, name: str) -> int:
    """Return ``N·(size(g) + 2·size(θ) + 2·size(state))``: 20 B a float32 element for Tiger."""
    state = tables.optimizers[name].state
    return sum(
        p.grad.nbytes + 2 * p.nbytes + 2 * sum(_nbytes_like(p, s) for s in state[p].values())
        for p in tables.params
    )


def _nbytes_like(p: Tensor, state: Any) -> int:
    return state.nbytes if isinstance(state, Tensor) and state.shape == p.shape else 0


# --------------------------------------------------------------------------------------- report


def _describe_machine() -> dict[str, Any]:
    machine = harness.describe_machine()
    device = torch.cuda.get_device_properties(DEVICE)
    peers = {**machine["peers"], "bitsandbytes": harness._version("bitsandbytes")}
    return {
        **machine,
        "peers": peers,
        "gpu": device.name,
        "gpu_memory_gib": round(device.total_memory / 2**30, 1),
        "multiprocessors": device.multi_processor_count,
        "compute_capability": f"{device.major}.{device.minor}",
        "cuda": torch.version.cuda,
    }


class GpuReport(Report):
    """A report whose bandwidth is that of a copy on the device."""

    def __init__(self, script: str, claim: str, args: argparse.Namespace) -> None:
        """Describe the machine and measure its bandwidth."""
        self.script, self.claim, self.args = script, claim, args
        self.machine = _describe_machine()
        self.cells, self.bars, self.notes = [], [], []
        self.bandwidth = copy_bandwidth()

    def share(self, byte_count: int, race: Race, name: str) -> float:
        """Return which share of the bandwidth a contender reaches; NaN if it did not run."""
        if name not in race.timings:
            return math.nan
        return self.floor_share(byte_count, race.timings[name])

    def finish(self, bars: Iterable[Bar]) -> None:
        """Write the result file; print the cells and, last, the bars."""
        self.bars = list(bars)
        after = copy_bandwidth()
        drift = after.median / self.bandwidth.median
        if abs(drift - 1) > 0.05:
            self.note(f"the bandwidth after the run was {drift:.2f} times that before it")
        target = self._target()
        if target is not None:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(json.dumps(harness._plain(self._contents(after)), indent=1) + "\n")
        print(f"\n{self.claim}\n{self.machine['gpu']}, torch {self.machine['torch']}; ", end="")
        print(f"copy bandwidth {self.bandwidth.median / 1e12:.3f} TB/s")
        print("median ms (times the first contender's; ?: the best runs disagree by over 20 %)")
        for first in dict.fromkeys(c.ours for c in self.cells):
            print("\n" + harness._table_of_cells([c for c in self.cells if c.ours == first]))
        print(f"\n{f'wrote {target.name}' if target else 'quick run: nothing saved'}\n")
        print(bars_table(self.bars))

    def _target(self) -> Path | None:
        if self.args.json is not None:
            return self.args.json
        if self.args.quick and self.args.out is None:
            return None
        return (self.args.out or harness._RESULTS) / f"{self.script}.json"

    def _contents(self, bandwidth_after: Timing) -> dict[str, Any]:
        contents = super()._contents(bandwidth_after)
        contents["script"] = f"bench_{self.script}.py"
        contents["copy_bytes_per_second"] = contents.pop("in_place_bytes_per_second")
        del contents["options"]["out"]
        return contents


def bars_table(bars: Iterable[Bar]) -> str:
    """Return the table of claims."""
    number, limit = harness.format_number, harness._limit
    return harness.format_table(
        ["claim", "value", "bar", "goal", "verdict"],
        (
            [b.claim, number(b.value), limit(b.bar, b.at_most), limit(b.goal, b.at_most), b.verdict]
            for b in bars
        ),
    )
