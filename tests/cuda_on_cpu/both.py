# SPDX-License-Identifier: Apache-2.0
"""Runs one problem on the CPU's own kernels and on the CUDA kernels, and compares bit by bit.

The CUDA kernels run on a GPU, or, in the test build of the module, emulated on CPU tensors.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import emulation
import torch
from cases import Rule, set_grad
from oracle import bits
from torch import Tensor
from torch.nn import Parameter

from tiger_ext import _native
from tiger_ext import step as step_module
from tiger_ext.group_step import GroupStep
from tiger_ext.passes import Pass
from tiger_ext.step import Step

CPU = torch.device("cpu")
#: Where the CUDA kernels find their tensors.
DEVICE = CPU if emulation.active else torch.device("cuda")
ON_GPU = DEVICE.type == "cuda"


def available() -> bool:
    """Return whether this process can run the CUDA kernels at all."""
    if _native.C is None:
        return False
    return emulation.active or (torch.cuda.is_available() and _native.C.build_info()["cuda"])


def synchronize() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


def cpu_kernels() -> contextlib.AbstractContextManager[None]:
    """Update CPU tensors by the CPU's own kernels."""
    return contextlib.nullcontext() if ON_GPU else emulation.cpu_kernels()


# --------------------------------------------------------------------------------------- copying


def memory(t: Tensor) -> Tensor:
    """Return the whole memory that a strided tensor is a view of, as a vector."""
    t = t.detach()
    return torch.as_strided(t, (t.untyped_storage().nbytes() // t.element_size(),), (1,), 0)


def moved(t: Tensor, device: torch.device) -> Tensor:
    """Return a copy of ``t``, and of all that is beside it in its memory."""
    if t.layout == torch.sparse_coo:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.sparse_coo_tensor(
                moved(t._indices(), device),
                moved(t._values(), device),
                t.shape,
                is_coalesced=t.is_coalesced(),
                check_invariants=False,
            )
    whole = memory(t).to(device, copy=True)
    return torch.as_strided(whole, t.shape, t.stride(), t.storage_offset())


def shifted(t: Tensor, elements: int) -> Tensor:
    """Return a copy that starts ``elements`` into its memory; NaNs lie before and behind it."""
    whole = torch.full((t.numel() + elements + 9,), torch.nan, dtype=t.dtype)
    view = whole[elements : elements + t.numel()].view(t.shape)
    view.copy_(t)
    return view


def shifts(*elements: int) -> Callable[[Tensor], Tensor]:
    """Return a function that copies like ``shifted``, by another of ``elements`` each time."""
    unused = iter(elements)
    return lambda t: shifted(t, next(unused))


def entries(
    p: Tensor,
    rows: Any,
    *,
    dtype: torch.dtype | None = None,
    values: Tensor | None = None,
    coalesced: bool | None = None,
) -> Tensor:
    """Make a gradient with these indices, ``[nnz]`` or ``[sparse_dim, nnz]``, good or bad."""
    rows = torch.as_tensor(rows, dtype=torch.int64)
    rows = rows.reshape(1, -1) if rows.dim() < 2 else rows
    if values is None:
        values = torch.randn(rows.shape[1], *p.shape[len(rows) :], dtype=torch.float64)
        values = values.to(dtype or p.dtype)
    return torch.sparse_coo_tensor(
        rows, values, p.shape, is_coalesced=coalesced, check_invariants=False
    )


# -------------------------------------------------------------------------------------- comparing


def agree(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors have the same bits; all NaNs are the same."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if not a.dtype.is_floating_point:
        return torch.equal(a, b)
    return bool(((bits(a) == bits(b)) | (a.isnan() & b.isnan())).all())


def assert_agree(actual: Tensor, expected: Tensor, label: str) -> None:
    actual, expected = actual.detach().cpu(), expected.detach().cpu()
    if not agree(actual, expected):
        both = f"{label}: {actual.dtype} {list(actual.shape)}"
        assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape), both
        differ = (bits(actual) != bits(expected)) & ~(actual.isnan() & expected.isnan())
        at = tuple(differ.nonzero()[0].tolist())
        raise AssertionError(
            f"{both}: {int(differ.sum())} elements differ, first {at}: "
            f"{actual[at].item()!r}, expected {expected[at].item()!r}"
        )


def assert_close(actual: Tensor, expected: Tensor, steps: int, label: str) -> None:
    """Allow what ``steps`` bias corrections by another pow() may change in a parameter."""
    narrow = actual.dtype in (torch.bfloat16, torch.float16)
    tolerance = 2 * steps * torch.finfo(actual.dtype if narrow else torch.float32).eps
    torch.testing.assert_close(
        actual.detach().cpu(),
        expected.detach().cpu(),
        rtol=tolerance,
        atol=0.1 * tolerance,  # no step is longer
        equal_nan=True,
        msg=lambda m: f"{label}: {m}",
    )


# --------------------------------------------------------------------------------------- problems


@dataclass
class Group:
    rule: Rule
    params: list[Tensor]
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class Problem:
    """Parameters, what their state is at first, and their gradients in each step; on the CPU."""

    groups: list[Group]
    steps: list[list[Tensor | None]]
    states: dict[int, dict[str, Tensor]] = field(default_factory=dict)

    @property
    def params(self) -> list[Tensor]:
        return [p for g in self.groups for p in g.params]


def problem(
    rule: Rule,
    params: Sequence[Tensor],
    steps: Sequence[Sequence[Tensor | None]],
    states: dict[int, dict[str, Tensor]] | None = None,
    **options: Any,
) -> Problem:
    return Problem([Group(rule, list(params), options)], [list(s) for s in steps], states or {})


def repeat(make: Any, params: Sequence[Tensor], steps: int = 3) -> list[list[Tensor]]:
    """Make the gradients of some steps."""
    return [[make(p) for p in params] for _ in range(steps)]


def momenta(
    rule: Rule, p: Tensor, dtype: torch.dtype, make: Callable[[Tensor], Tensor] = torch.Tensor.clone
) -> dict[str, Tensor]:
    """Return random first states of a parameter, each copied by ``make``."""
    names = {"tiger": ["exp_avg"], "lion": ["exp_avg"], "adamw": ["exp_avg", "exp_avg_sq"]}
    wanted = names.get(rule.name, ["exp_avg_sq"])
    state = {}
    for name in wanted:
        square = name == "exp_avg_sq"
        wide = torch.promote_types(dtype, p.dtype) if square else dtype
        value = torch.randn(p.shape, dtype=torch.float64).to(wide)
        state[name] = make(value.square() if square else value)
    if rule.name.startswith("adamw"):
        state["step"] = torch.tensor(3)
    return state


class Side:
    """An optimizer over copies of a problem's tensors."""

    def __init__(self, task: Problem, device: torch.device) -> None:
        self.task, self.device = task, device
        self.params = [Parameter(moved(p, device)) for p in task.params]
        unused = iter(self.params)
        groups = [
            {
                "params": [next(unused) for _ in g.params],
                "algorithm": g.rule.name.split("-")[0],
                "fused": True,
                **g.rule.options,
                **g.options,
            }
            for g in task.groups
        ]
        self.opt = task.groups[0].rule.cls(groups)
        self.opt.state.update(
            {
                self.params[k]: {n: moved(t, device) for n, t in s.items()}
                for k, s in task.states.items()
            }
        )

    def step(self, number: int, advance: Callable[[Any], Any] | None = None) -> None:
        """Take a step, by ``advance`` if given; no gradient may change."""
        grads = self.task.steps[number]
        for p, grad in zip(self.params, grads, strict=True):
            set_grad(p, None if grad is None else moved(grad, self.device))
        (advance or type(self.opt).step)(self.opt)
        for k, (p, grad) in enumerate(zip(self.params, grads, strict=True)):
            if grad is not None:
                parts = zip(_parts(p.grad), _parts(grad), strict=True)
                assert all(agree(memory(a).cpu(), memory(b)) for a, b in parts), f"gradient {k}"

    def written(self) -> dict[str, Tensor]:
        """Return parameters and states under their names."""
        tensors = {}
        for k, p in enumerate(self.params):
            tensors[f"parameter {k}"] = p.detach()
            for name, t in sorted(self.opt.state.get(p, {}).items()):
                tensors[f"parameter {k}'s {name}"] = t
        return tensors

    def snapshot(self) -> dict[str, Tensor]:
        return {name: t.to(CPU, copy=True) for name, t in self.written().items()}


def _parts(grad: Tensor) -> list[Tensor]:
    return [grad._indices(), grad._values()] if grad.layout == torch.sparse_coo else [grad]


def assert_sides_agree(actual: Side, expected: dict[str, Tensor], label: str, steps: int) -> None:
    """Compare with the other side's snapshot after so many ``steps``."""
    found = actual.snapshot()
    assert found.keys() == expected.keys()
    for name, t in found.items():
        if ON_GPU and f"{name}'s step" in found:
            assert_close(t, expected[name], steps, f"{label}: {name}")
        else:
            assert_agree(t, expected[name], f"{label}: {name}")


def assert_same(actual: Side, expected: Side) -> None:
    """Compare two optimizers that took the same kernels."""
    found, wanted = actual.snapshot(), expected.snapshot()
    assert found.keys() == wanted.keys()
    for name, t in found.items():
        assert_agree(t, wanted[name], name)


def compare(task: Problem) -> Side:
    """Take a problem's steps on both sides; after each they must agree. Return the device's."""
    with cpu_kernels():
        cpu = Side(task, CPU)
        before = _launches()
        expected = []
        for number in range(len(task.steps)):
            cpu.step(number)
            expected.append(cpu.snapshot())
        assert _launches() == before, "the CPU's own kernels were meant to run"
    device = Side(task, DEVICE)
    start = {name: memory(t).clone() for name, t in device.written().items()}
    for number, values in enumerate(expected):
        device.step(number)
        assert_sides_agree(device, values, f"step {number}", number + 1)
    if ON_GPU:
        assert all(t.is_cuda for t in device.written().values())
    elif any(_work(g) for grads in task.steps for g in grads):
        assert _launches() > before, "the CUDA kernels were meant to run"
    _assert_rest_unchanged(device, start)
    return device


def _launches() -> int:
    return 0 if ON_GPU else emulation.launches()


def _work(grad: Tensor | None) -> bool:
    if grad is None or grad.numel() == 0:
        return False
    return grad.layout == torch.strided or grad._nnz() > 0


def _assert_rest_unchanged(side: Side, start: dict[str, Tensor]) -> None:
    """Check untouched rows of parameters and states, and all that lies beside them."""
    for k, p in enumerate(side.params):
        touched = torch.zeros(p.shape, dtype=torch.bool, device=p.device)
        for grads in side.task.steps:
            grad = grads[k]
            if grad is not None:
                sparse = grad.layout == torch.sparse_coo
                touched[tuple(grad._indices().to(p.device)) if sparse else ...] = True
        for name, t in {"": p.detach(), **side.opt.state.get(p, {})}.items():
            if name == "step":
                continue
            label = f"parameter {k}'s {name}" if name else f"parameter {k}"
            after = memory(t)
            before = start.get(label, torch.zeros_like(after))
            mine = torch.zeros(after.shape, dtype=torch.bool, device=p.device)
            own = touched if t.shape == p.shape else _touched_units(touched, t)
            torch.as_strided(mine, t.shape, t.stride(), t.storage_offset())[own] = True
            assert agree(after[~mine], before[~mine]), f"{label}: written where nothing was touched"


def _touched_units(touched: Tensor, t: Tensor) -> Tensor:
    """Return which numbers of a state that has one a row, or one a block, may have changed."""
    if t.shape == touched.shape[: t.dim()]:
        return touched.flatten(t.dim()).any(-1)
    return torch.ones(t.shape, dtype=torch.bool, device=t.device)


# ------------------------------------------------------------------------ what kernels read at once


def device_step(
    opt: Any, *, grad_scale: Tensor | None = None, found_inf: Tensor | None = None
) -> None:
    """Take a step whose AMP tensors, and lr where it is a tensor, are read by the kernels.

    ``opt.step`` itself reads such tensors on the host where they are on the CPU.
    """
    if ON_GPU:
        opt.grad_scale, opt.found_inf = grad_scale, found_inf
        opt.step()
        del opt.grad_scale, opt.found_inf
        return
    with (
        mock.patch.object(GroupStep, "lr", property(lambda group: group.options["lr"])),
        mock.patch.object(Step, "_host_reads_found_inf", lambda step: False),
        mock.patch.object(Pass, "cancelled", device_cancels),
        mock.patch.object(step_module, "check_lazy", lambda options: None),
    ):
        opt._step_with(grad_scale, found_inf)


def device_cancels(this: Pass, found_inf: Tensor | None) -> bool | None:
    """Check that the host does not know whether a step with ``found_inf`` happens."""
    assert this.on_reference == []
    assert this.native.cancelled() is None
    return None


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Let torch fill new memory with NaNs and large numbers."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
