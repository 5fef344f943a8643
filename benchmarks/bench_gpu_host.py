# SPDX-License-Identifier: Apache-2.0
"""What a step on a GPU costs the host: 1,000 small tensors, and one sparse table.

Host time is that of ``step()`` alone: the device is idle before it and not waited for after it.
Also measured: the device's own time, the replay of a captured step, the kernels that a step
launches, and how many kinds of steps wait for the device, which none may.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import bench_gpu_dense
import bench_gpu_sparse
import gpu_harness
import harness
import torch
from bench_sparse import SparseCell, Tables
from gpu_harness import GpuReport, Method
from harness import Bar, Cell, Contender, Race
from torch import Tensor
from torch.autograd import DeviceType
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.profiler import ProfilerActivity, profile

from tiger_ext import AdamW, Lion, Tiger

_SHAPES = 1000 * ((1024,),)
_BUSY_SECONDS = 0.2  # how long the device is kept busy to see whether a step waits for it
_FUSED = "torch fused AdamW"


def random(shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    return [torch.randn(s, device=gpu_harness.DEVICE) for s in shapes]


def on_host(tables: Tables, inputs: Sequence[Sequence[Tensor]], budget: float) -> Race:
    """Time ``step()`` on the host, in turn; the device has nothing queued when it starts."""

    def idle_first(contender: Contender) -> Contender:
        def prepare(rotation: int) -> None:
            torch.cuda.synchronize()
            contender.prepare(rotation)

        return replace(contender, prepare=prepare)

    contenders = [idle_first(c) for c in tables.contenders(inputs)]
    return harness.alternate(contenders, len(inputs), budget=budget)


def count_kernels(tables: Tables, cell: Cell, report: GpuReport) -> None:
    """Add to a cell how many kernels a step launches, where the profiler works."""
    for name, optimizer in tables.optimizers.items():
        try:
            for _ in range(2):  # the first only starts the profiler
                with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
                    optimizer.step()
                    torch.cuda.synchronize()
            cell.figures[f"kernels {name}"] = sum(map(_is_kernel, profiler.events()))
        except Exception as error:
            report.note(f"kernels of {name} not counted: {harness.one_line(error)}")


def _is_kernel(event) -> bool:
    annotation = getattr(event, "is_user_annotation", False) or event.name.startswith("Optimizer.")
    copy = event.name.startswith(("Memcpy", "Memset"))
    return event.device_type == DeviceType.CUDA and not annotation and not copy


# -------------------------------------------------------------------------------------- capture


def capture(optimizer: Optimizer) -> Callable[[], object]:
    """Take three steps on a side stream, capture one more, return the replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    return graph.replay


def measure_graphs(
    name: str,
    methods: Mapping[str, Method],
    inputs: Sequence[Tensor],
    report: GpuReport,
    budget: float,
) -> Cell:
    """Time the replay of captured steps on the device; first check that a replay is a step."""
    start = random([g.shape for g in inputs])

    def begin(method: Method) -> tuple[list[Parameter], Optimizer]:
        params = [Parameter(t.clone()) for t in start]
        Tables(params).set_gradients(inputs)
        lr = torch.tensor(1e-4, device=gpu_harness.DEVICE)
        return params, method.make(params, lr=lr, capturable=True)

    contenders, left_out, kept = [], {}, []  # a graph does not keep the tensors it was captured on
    for method_name, method in methods.items():
        try:
            sides = [begin(method) for _ in range(2)]
            kept.append(sides)
            (captured, optimizer), (eager, other) = sides
            replay = capture(optimizer)
            replay()
            for _ in range(4):
                other.step()
            for p, q in zip(captured, eager, strict=True):
                harness.check_close("a replayed step", p, q, rtol=0, atol=0)
            contenders.append(Contender(method_name, lambda _, replay=replay: replay()))
        except Exception as error:
            left_out[method_name] = harness.one_line(error)
    race = gpu_harness.alternate(contenders, 2, budget=budget, max_rounds=100)
    race.left_out.update(left_out)
    return report.add(name, race, "Tiger")


# -------------------------------------------------------------------------------------- waiting


def watched_steps() -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield steps of all kinds: dense and sparse, lr on the host and on the device, with AMP."""
    device = gpu_harness.DEVICE
    cell = SparseCell((1000,), 64, 5000, "zipf 1.05")
    inputs = random([(1000, 64)])
    for coalesced in (False, True):
        inputs += bench_gpu_sparse.gradients(replace(cell, coalesced=coalesced), 1)[0]
    for cls in (Tiger, Lion, AdamW):
        for capturable in (False, True):
            params = [Parameter(t) for t in random([g.shape for g in inputs])]
            Tables(params).set_gradients(inputs)
            lr = torch.tensor(1e-3, device=device) if capturable else 1e-3
            optimizer = cls(params, lr=lr, capturable=capturable)
            yield f"{cls.__name__}, capturable={capturable}", optimizer.step
            optimizer.grad_scale = torch.tensor(2.0, device=device)
            optimizer.found_inf = torch.tensor(0.0, device=device)
            yield f"{cls.__name__}, capturable={capturable}, AMP", optimizer.step


def count_waiting_steps(report: GpuReport) -> int:
    """Count the kinds of steps that wait for the device, whether torch sees it or not."""
    count = 0
    for name, step in watched_steps():
        for _ in range(2):  # the state, and the allocator's memory
            step()
        torch.cuda.synchronize()
        done = torch.cuda.Event()
        torch.cuda._sleep(int(_BUSY_SECONDS * gpu_harness.CYCLES_PER_SECOND))
        done.record()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the debug mode is experimental
            torch.cuda.set_sync_debug_mode("error")
        try:
            step()
            waited = "it returned when the device was done" if done.query() else None
        except RuntimeError as error:
            waited = harness.one_line(error)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
        if waited is not None:
            count += 1
            report.note(f"a step waits for the device: {name}: {waited}")
    return count


# ----------------------------------------------------------------------------------------- main


def bars(cells: Mapping[str, Cell], waiting: int) -> list[Bar]:
    def over(key: str, ours: str, peer: str, *limits: float) -> Bar:
        ratio = cells[key].race.ratio(ours, peer)
        value = ratio.median if ratio else math.nan
        return Bar(f"GPU {cells[key].name}: {ours} over {peer}", value, *limits, at_most=True)

    def microseconds(key: str) -> Bar:
        timing = cells[key].race.timings.get("Tiger")
        value = timing.median * 1e6 if timing else math.nan
        return Bar(f"GPU {cells[key].name}: Tiger, microseconds", value, at_most=True)

    def kernels(key: str) -> Bar:
        value = cells[key].figures.get("kernels Tiger", math.nan)
        return Bar(f"GPU {cells[key].name}: Tiger, kernels a step", value, at_most=True)

    return [
        over("many", "Tiger", _FUSED, 0.3, 0.15),
        Bar("GPU: kinds of steps that wait for the device", waiting, 0, 0, at_most=True),
        over("many", "AdamW", _FUSED),
        over("many", "Tiger", "torch foreach AdamW"),
        *(microseconds(key) for key in cells),
        over("device", "Tiger", _FUSED),
        over("graph", "Tiger", _FUSED),
        *(over(f"n = {n}", "Tiger", "torch SparseAdam") for n in (1, 8192)),
        *(kernels(key) for key in ("many", "n = 1", "n = 8192")),
    ]


def main() -> None:
    args = gpu_harness.parse_arguments(__doc__, 30)
    report = GpuReport("gpu_host", "Host time of an optimizer step on a GPU", args)
    bench_gpu_dense.verify(report)
    bench_gpu_sparse.verify(report)
    waiting = count_waiting_steps(report)
    budget = max(0.2, 0.1 * gpu_harness.seconds_left(args))

    cells, tables = {}, {}
    inputs = [random(_SHAPES) for _ in range(4)]
    params = [Parameter(t) for t in random(_SHAPES)]
    methods = bench_gpu_dense.METHODS
    many = gpu_harness.create_optimizers(params, methods, inputs[0], report)
    race = on_host(many, inputs, 2 * budget)
    cells["many"] = report.add("1,000 tensors of 1,024, host time", race, "Tiger")
    tables["many"] = many
    lead = 2 * max(t.median for t in race.timings.values())
    race = gpu_harness.alternate(many.contenders(inputs), 4, lead=lead, budget=budget / 4)
    cells["device"] = report.add("1,000 tensors of 1,024, device time", race, "Tiger")
    for n in (1, 8192):
        cell, key = SparseCell((1 << 20,), 128, n, "uniform"), f"n = {n}"
        tables[key] = bench_gpu_sparse.create_tables(cell, report)
        race = on_host(tables[key], bench_gpu_sparse.gradients(cell, 8), budget)
        cells[key] = report.add(f"{cell.name}, host time", race, "Tiger")

    dense = {name: methods[name] for name in ("Tiger", _FUSED, "AdamW")}
    sparse = {name: bench_gpu_sparse.METHODS[name] for name in ("Tiger", "AdamW")}
    for key, name, contenders, gradients in (
        ("graph", "1,000 tensors of 1,024, graph replay", dense, inputs[0]),
        (
            "sparse graph",
            f"{cell.name}, graph replay",
            sparse,
            [p.grad for p in tables["n = 8192"].params],
        ),
    ):
        cells[key] = measure_graphs(name, contenders, gradients, report, budget / 2)
    for key, of_cell in tables.items():  # last: it may slow down the launches after it
        count_kernels(of_cell, cells[key], report)
    report.finish(bars(cells, waiting))


if __name__ == "__main__":
    main()
