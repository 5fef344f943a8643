from typing import Any

import torch
from torch import Tensor

class UpdateError(Exception):
    """A parameter's update was refused.

    args: "index", "nonfinite", "value" or "runtime"; group; position; text.
    """

Setting = tuple[int, float, float, float, float]

class History:
    """The hyperparameters of a group's steps, where kernels read them."""

    def append(self, setting: Setting, /) -> None:
        """For kernels on the CPU: one setting more."""
    def bring_to(self, steps: int, /) -> None:
        """For kernels on the CPU: rows are to be brought up to this step."""
    def has(self, device: torch.device, /) -> bool:
        """Return whether kernels on ``device`` find it."""
    def place(
        self, device: torch.device, steps: int, settings: list[Setting], many: bool, /
    ) -> bool:
        """Begin a copy on ``device``; return whether its kernels need one."""
    def reserve(self, many: bool, /) -> None:
        """Make room in all copies for one more step; ``many``: for a captured graph's replays."""
    def has_copies(self) -> bool: ...
    def steps(self, device: torch.device | None, /) -> Tensor | None:
        """Return a copy of a device's number of steps, 0-dim, int32; without waiting.

        Of any device if None is given; None if there is no copy of the history.
        """
    def forget(self) -> None: ...
    def rewritten(self, position: int, param: Tensor, /) -> bool:
        """Return whether others have written to a parameter of the group since ``note``."""
    def note(self, position: int, param: Tensor, /) -> None:
        """Note the version of a parameter of the group."""
    def read(self) -> tuple[int, list[Setting]]:
        """Wait for a device and return its steps and settings."""

class Rule:
    """A group's options but the learning rate, for one step.

    family: of which the form is taken that fits the options. group: options that are not there keep
    their defaults. window, micro_steps: of an accumulation window, 0 and 1 without. adds: whether
    there are gradients.
    """

    def __init__(
        self,
        family: str,
        group: dict[str, Any],
        direction_scale: float,
        window: int,
        micro_steps: int,
        adds: bool,
        /,
    ) -> None: ...

class Faults:
    """Where a GPU reports what it found wrong in an optimizer's gradients; raised a step later."""

    def __init__(self) -> None: ...

class Step:
    """One all-or-nothing optimizer step: add_group (each), then prepare, then apply."""

    def __init__(
        self, faults: Faults, grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> None: ...
    def add_group(
        self,
        params: list[Tensor],
        state: dict[Tensor, dict[str, Any]],
        group: int,
        rule: Rule,
        lr: float | Tensor,
        rows: dict[Tensor, Tensor],
        history: History | None,
        positions: list[int] | None,
        /,
    ) -> tuple[list[int], list[int], list[int], list[int], list[int]]:
        """Return positions: without state; without a kernel; with rows that lag behind.

        In a lazy mode also: without a gradient, and not training or without a clock; written to by
        others since the last step.
        """
    def prepare(self) -> None: ...
    def cancelled(self) -> bool | None:
        """Return whether AMP cancels the step; None: only a device knows."""
    def apply(self) -> None:
        """Write; does so once, however often it is called."""
    def will_advance(
        self,
        groups: list[tuple[History, int, float | Tensor, float, float, float]],
        counters: list[Tensor],
        /,
    ) -> None:
        """Prepare ``advance``: of histories that are copied, and of counters of AdamW."""
    def advance(self) -> None:
        """Count the step, after ``apply``, unless AMP cancels it; once, as ``apply``."""

def catch_up(
    param: Tensor,
    states: list[Tensor],
    last_step: Tensor,
    rule: Rule,
    history: History,
    position: int,
    ids: Tensor | None,
    begin: int,
    end: int,
    until: int | None,
    /,
) -> bool:
    """Bring rows ``ids``, or [begin, end), up to date; return whether there is a kernel.

    ``until``: to that step of the past, and not to the present one.
    """

def build_info() -> dict[str, Any]: ...
def cpu_isa() -> str: ...
def is_recorded() -> bool:
    """Return whether a profiler or another observer records functions in this thread."""

def rule_forms() -> dict[str, list[list[str]]]:
    """Return the state names of each form of each family of rules."""

def advise_huge_pages(data: int, bytes: int) -> None:
    """Ask for huge pages behind what is not yet written."""

def huge_pages_wanted() -> bool: ...
def move_to_huge_page(page: int) -> int:
    """Move 2 MiB to a huge page.

    Return 0; -1 if less than half is written; or the number of the system's error.
    """

def row_norms(grads: list[Tensor], p: float) -> Tensor:
    """The p-norms, float64 [grads], of sparse gradients on the CPU; rows are summed on the way."""
