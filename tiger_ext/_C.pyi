from enum import Enum
from typing import Any

from torch import Tensor

class UpdateError(Exception):
    """A parameter's update was refused; args: "index" or "runtime", group, position, text."""

class RuleKind(Enum):
    SIGN_MOMENTUM = ...
    ADAMW = ...
    ADAMW_WITHOUT_MOMENT1 = ...

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
        kind: RuleKind,
        lr: float | Tensor,
        beta1: float,
        beta2: float,
        eps: float,
        weight_decay: float,
        maximize: bool,
        positions: list[int] | None,
        /,
    ) -> tuple[list[int], list[int]]: ...
    def prepare(self) -> None: ...
    def cancelled(self) -> bool: ...
    def apply(self) -> None: ...

def build_info() -> dict[str, Any]: ...
def cpu_isa() -> str: ...
def advise_huge_pages(data: int, bytes: int, in_use: bool) -> None: ...
def row_norms(grads: list[Tensor], p: float) -> Tensor:
    """The p-norms, float64 [grads], of sparse gradients on the CPU; rows are summed on the way."""
