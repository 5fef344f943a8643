from enum import Enum
from typing import Any

from torch import Tensor

class UpdateError(Exception):
    """A parameter's update was refused.

    args: "index", "nonfinite" or "runtime"; group; position; text.
    """

class RuleKind(Enum):
    SIGN_MOMENTUM = ...
    ADAMW = ...
    ADAMW_WITHOUT_MOMENT1 = ...
    MOMENTUM = ...

class History:
    """The hyperparameters of a group's steps."""

    def append(
        self, step: int, lr: float, weight_decay: float, beta1: float, beta2: float, /
    ) -> None:
        """From step number ``step`` on these are in force."""
    def use(self, rule: Rule, mode: str, current: int, /) -> None:
        """Make ``rule`` one of a lazy mode that brings rows up to step ``current``."""

class Rule:
    """A group's options but the learning rate, for one step."""

    def __init__(
        self,
        kind: RuleKind,
        beta1: float,
        beta2: float,
        eps: float,
        weight_decay: float,
        maximize: bool,
        rows: str | None,
        nonfinite: str,
        shrink_ratio: float,
        shrink_to: float,
        scale: str | None,
        rms_floor: float,
        direction: str,
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
        positions: list[int] | None,
        /,
    ) -> tuple[list[int], list[int], list[int]]:
        """Return the positions without state, without a kernel, and with rows that lag behind."""
    def prepare(self) -> None: ...
    def cancelled(self) -> bool: ...
    def apply(self) -> None: ...

def catch_up(
    param: Tensor,
    states: list[Tensor],
    last_step: Tensor,
    rule: Rule,
    ids: Tensor | None,
    begin: int,
    end: int,
    /,
) -> int | None:
    """Bring rows ``ids``, or [begin, end), up to date; return how many were written.

    None: there is no kernel for the parameter.
    """

def build_info() -> dict[str, Any]: ...
def cpu_isa() -> str: ...
def advise_huge_pages(data: int, bytes: int, in_use: bool) -> None: ...
def row_norms(grads: list[Tensor], p: float) -> Tensor:
    """The p-norms, float64 [grads], of sparse gradients on the CPU; rows are summed on the way."""
