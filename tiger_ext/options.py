# SPDX-License-Identifier: Apache-2.0
"""The algorithms, their options, and what each option may be.

One row of ``ALGORITHMS`` says all of an algorithm that is no mathematics; one table of checks says
what is legal. Constructors, ``add_param_group``, state and error messages all read these tables.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal, get_args

import torch
from torch import Tensor

AlgorithmName = Literal["tiger", "lion", "adamw"]
Lazy = Literal["frozen", "decay", "exact"]
AdamWLazy = Literal["frozen", "decay"]
Rows = Literal["nonzero", "tracked"]
Scale = Literal["rms", "rms_rows"]
Direction = Literal["sign", "clip", "power", "atan"]
Nonfinite = Literal["propagate", "skip", "shrink", "raise"]
SecondMoment = Literal["element", "row"]

_SHARED: dict[str, Any] = {
    "lazy": "frozen",
    "rows": None,
    "nonfinite": "propagate",
    "shrink_ratio": 0.99,
    "momentum_dtype": None,
    "stochastic_rounding": False,
    "maximize": False,
    "capturable": False,
    "fused": None,
}
_SIGN: dict[str, Any] = {
    "scale": None,
    "rms_floor": 1e-3,
    "direction": "sign",
    "direction_scale": None,
}


@dataclass(frozen=True)
class Moment:
    """A state tensor of the parameter's shape.

    Attributes:
        name: its key in the parameter's state.
        beta: which of ``betas`` it decays by.
        optional: whether it is not stored where that beta is 0.
        wide: whether it is stored in the parameter's dtype at least; ``1 - beta`` is too small a
            step for a narrower type.
        reducible: whether ``second_moment="row"`` keeps one number a row of it.
    """

    name: str
    beta: int
    optional: bool = False
    wide: bool = False
    reducible: bool = False


@dataclass(frozen=True)
class Algorithm:
    """An update rule and the options that its parameter groups have, with their defaults.

    Attributes:
        name: what a group's ``algorithm`` calls it.
        family: what the compiled module calls it (csrc/rules/rule_list.h).
        update: the function of ``tiger_ext.reference`` that defines it.
        beta_count: the length of ``betas``.
        moments: its state tensors, in the order of the compiled rule's.
        defaults: its options.
        counts_steps: whether the state has a counter ``step`` for each parameter.
        closed_form: whether skipped steps are sign steps, which ``lazy="exact"`` makes up for; only
            of rules that derive from Momentum (csrc/rules/update_rules.h).
    """

    name: str
    family: str
    update: str
    beta_count: int
    moments: tuple[Moment, ...]
    defaults: Mapping[str, Any]
    counts_steps: bool = False
    closed_form: bool = False


_MOMENTUM: dict[str, Any] = dict(
    family="sign_momentum",
    update="sign_momentum",
    moments=(Moment("exp_avg", -1),),
    closed_form=True,
)

ALGORITHMS: dict[str, Algorithm] = {
    row.name: row
    for row in (
        Algorithm(
            "tiger",
            beta_count=1,
            defaults={
                "lr": 1e-3,
                "betas": (0.965,),
                "weight_decay": 0.01,
                "accumulation_steps": 1,
                **_SIGN,
                **_SHARED,
            },
            **_MOMENTUM,
        ),
        Algorithm(
            "lion",
            beta_count=2,
            defaults={"lr": 1e-4, "betas": (0.9, 0.99), "weight_decay": 0.0, **_SIGN, **_SHARED},
            **_MOMENTUM,
        ),
        Algorithm(
            "adamw",
            family="adamw",
            update="adamw",
            beta_count=2,
            moments=(
                Moment("exp_avg", 0, optional=True),
                Moment("exp_avg_sq", -1, wide=True, reducible=True),
            ),
            defaults={
                "lr": 1e-3,
                "betas": (0.9, 0.999),
                "eps": 1e-8,
                "weight_decay": 0.0,
                "second_moment": "element",
                **_SHARED,
            },
            counts_steps=True,
        ),
    )
}

# What only groups have, where it is not the default.
OTHER_OPTIONS = ("shrink_to", "rounding_seed")

# What parameters, gradients and moments may store.
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# The names of all state tensors of a parameter's shape; of those that may be a number a row.
MOMENTS = tuple(dict.fromkeys(m.name for row in ALGORITHMS.values() for m in row.moments))
REDUCIBLE = {m.name for row in ALGORITHMS.values() for m in row.moments if m.reducible}

# What kappa is when `direction_scale` is None.
DIRECTION_SCALES = {"sign": 1.0, "clip": 1e4, "power": 0.5, "atan": 1e4}

# Keys of a parameter group that are no options of an algorithm but known: torch's own, what LR
# schedulers write, the target of nonfinite="shrink", the seed of stochastic rounding, the clock of
# accumulation windows, and the history of lazy modes.
_OTHER_KEYS = frozenset(
    {
        "params",
        "param_names",
        "algorithm",
        "shrink_to",
        "rounding_seed",
        "initial_lr",
        "swa_lr",
        "max_lr",
        "min_lr",
        "max_momentum",
        "base_momentum",
        "windows",
        "micro_steps",
        "history",
    }
)


def _number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _float(value: Any) -> float:
    """Return a number as groups and kernels use it: inf where no float holds it, NaN for others."""
    if not _number(value):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _finite_at_least_zero(value: Any) -> bool:
    return 0.0 <= _float(value) < math.inf


def _learning_rate(value: Any) -> bool:
    if isinstance(value, Tensor):
        # A value on another device is not read: that would synchronise.
        return (
            value.dim() <= 1
            and value.numel() == 1
            and (value.device.type != "cpu" or _finite_at_least_zero(value.item()))
        )
    return _finite_at_least_zero(value)


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


def _beta(value: Any) -> bool:
    return 0.0 <= _float(value) < 1.0


def numbers_in(value: Any) -> list[Any]:
    """Return the elements of any sequence, array or tensor; none of what is not one."""
    if isinstance(value, (str, bytes, Mapping)) or not hasattr(value, "__getitem__"):
        return []
    if getattr(value, "ndim", 1) != 1:
        return []
    try:
        elements = list(value)
        return [e.item() if isinstance(e, Tensor) else e for e in elements]
    except (TypeError, RuntimeError):  # types and functions, or tensors without values
        return []


def _without_numpy(value: Any) -> Any:
    """Return what a scalar or 0-dim array of numpy holds; anything else as it is."""
    if isinstance(value, Tensor) or getattr(value, "ndim", None) != 0:
        return value
    return value.item() if hasattr(value, "item") else value


def _shown(value: Any) -> str:
    """Return how messages print a value, however long it is."""
    try:
        text = repr(value)
    except ValueError:  # Python prints no integer of more than 4,300 digits
        return f"<{type(value).__name__} too long to print>"
    return text if len(text) <= 160 else f"{text[:80]}...{text[-20:]}"


def _one_of(names: Any, *more: None) -> Callable[[Any], bool]:
    values = get_args(names) + more
    return lambda v: (v is None or isinstance(v, str)) and v in values


_MOMENTUM_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)
_INT32 = torch.iinfo(torch.int32).max  # what the steps of a window are counted in
SEEDS = 2**63 - 1  # the largest seed

# name -> (is it legal?, what is legal)
_CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "lr": (_learning_rate, "a finite number >= 0 or a tensor of one, 0-dim or [1]"),
    "weight_decay": (_finite_at_least_zero, "a finite number >= 0"),
    "eps": (_finite_at_least_zero, "a finite number >= 0"),
    "rms_floor": (_finite_at_least_zero, "a finite number >= 0"),
    "shrink_ratio": (lambda v: 0.0 <= _float(v) <= 1.0, "a number in [0, 1]"),
    "shrink_to": (lambda v: math.isfinite(_float(v)), "a finite number"),
    "momentum_dtype": (
        lambda v: v is None or (isinstance(v, torch.dtype) and v in _MOMENTUM_DTYPES),
        "None, torch.float32, torch.bfloat16, torch.float16 or torch.int8",
    ),
    "stochastic_rounding": (_flag, "True or False"),
    "rounding_seed": (
        lambda v: isinstance(v, Integral) and not isinstance(v, bool) and 0 <= int(v) <= SEEDS,
        f"an integer >= 0 and <= {SEEDS}",
    ),
    "maximize": (_flag, "True or False"),
    "capturable": (_flag, "True or False"),
    "fused": (lambda v: v is None or _flag(v), "None, True or False"),
    "rows": (_one_of(Rows, None), "None, 'nonzero' or 'tracked'"),
    "lazy": (_one_of(Lazy), "one of 'frozen', 'decay', 'exact'"),
    "scale": (_one_of(Scale, None), "None, 'rms' or 'rms_rows'"),
    "second_moment": (_one_of(SecondMoment), "'element' or 'row'"),
    "direction": (_one_of(Direction), "one of 'sign', 'clip', 'power', 'atan'"),
    "nonfinite": (
        _one_of(Nonfinite),
        "one of 'propagate', 'skip', 'shrink', 'raise'",
    ),
    "accumulation_steps": (
        lambda v: isinstance(v, Integral) and not isinstance(v, bool) and 1 <= int(v) <= _INT32,
        f"an integer >= 1 and <= {_INT32}",
    ),
    "direction_scale": (
        lambda v: v is None or 0.0 < _float(v) < math.inf,
        "None or a finite number > 0",
    ),
}


def check_option(name: str, value: Any, algorithm: Algorithm) -> None:
    """Raise ValueError unless ``value`` is legal for the option ``name`` of ``algorithm``."""
    if name == "betas":
        count = algorithm.beta_count
        betas = numbers_in(value)
        if len(betas) != count or not all(map(_beta, betas)):
            numbers = "1 number" if count == 1 else f"{count} numbers"
            raise ValueError(
                f"betas={_shown(value)}: {algorithm.name} expects a tuple of {numbers} in [0, 1)"
            )
        return
    plain = _without_numpy(value)
    legal, expected = _CHECKS[name]
    if not legal(plain):
        raise ValueError(f"{name}={_shown(value)}: expected {expected}")


def plain_option(name: str, value: Any, algorithm: Algorithm) -> Any:
    """Return a legal value as a group keeps it, of types that any state dict may hold.

    ``betas`` become a tuple of floats, scalars of other libraries Python's numbers; a tensor ``lr``
    stays the tensor that it is.

    Raises:
        ValueError: the value is not legal for the option ``name`` of ``algorithm``.
    """
    check_option(name, value, algorithm)
    if name == "betas":
        return tuple(map(float, numbers_in(value)))
    value = _without_numpy(value)
    if isinstance(value, str):
        return str.__str__(value)
    if _number(value) and type(value) not in (int, float):
        return int(value) if isinstance(value, Integral) else float(value)
    return value


def check_lazy(group: Mapping[str, Any]) -> None:
    """Raise ValueError if the group's lazy mode does not exist beside its other options."""
    lazy = group["lazy"]
    if lazy == "frozen":
        return
    legal, expected = _CHECKS["lazy"]
    if not legal(lazy):
        raise ValueError(f"lazy={_shown(lazy)}: expected {expected}")
    if lazy == "exact":
        if not algorithm_of(group["algorithm"]).closed_form:
            raise ValueError(
                f"lazy='exact': {group['algorithm']} has no closed form of skipped steps; expected "
                "'frozen' or 'decay'"
            )
        if group.get("direction", "sign") != "sign":
            raise ValueError(f"lazy='exact' needs direction='sign', got {group['direction']!r}")
        if not all(beta > 0 for beta in group["betas"]):
            raise ValueError(f"lazy='exact' needs betas > 0, got betas={group['betas']!r}")
    if group.get("scale") is not None:
        raise ValueError(f"lazy={lazy!r} needs scale=None, got scale={group['scale']!r}")
    lr = group["lr"]
    if isinstance(lr, Tensor) and lr.device.type != "cpu":
        return
    try:
        rate = float(lr) * group["weight_decay"]
    except OverflowError:  # integers that no float holds
        rate = math.inf
    if not rate < 1.0:
        raise ValueError(f"lazy={lazy!r} needs lr * weight_decay < 1, got {rate}")


def algorithm_of(name: Any) -> Algorithm:
    """Return the algorithm called ``name``; ValueError for any other value."""
    if not isinstance(name, str) or name not in ALGORITHMS:
        raise ValueError(
            f"algorithm={_shown(name)}: expected one of {', '.join(map(repr, ALGORITHMS))}"
        )
    return ALGORITHMS[name]


def moments_of(group: Mapping[str, Any]) -> tuple[Moment, ...]:
    """Return the state tensors that the parameters of a group have."""
    moments = algorithm_of(group["algorithm"]).moments
    betas = group["betas"]
    return tuple(m for m in moments if not (m.optional and betas[m.beta] == 0))


def direction_scale(group: Mapping[str, Any]) -> float:
    """Return the group's kappa; 1 where its algorithm has no direction."""
    if "direction" not in group:
        return 1.0
    if group["direction"] not in DIRECTION_SCALES:
        check_option("direction", group["direction"], algorithm_of(group["algorithm"]))
    scale: float | None = group["direction_scale"]
    return DIRECTION_SCALES[group["direction"]] if scale is None else scale


def complete_group(
    group: Mapping[str, Any], class_defaults: Mapping[str, Any], default: str
) -> dict[str, Any]:
    """Return a checked copy of a parameter group with every option of its algorithm filled in.

    An omitted option takes the optimizer's own value where the group uses the optimizer's
    algorithm, else the group algorithm's default.

    Other keys are kept, as torch keeps them: schedulers and trainers write "name", "lr_scale" and
    the like.

    Raises:
        ValueError: an option has an illegal value.
        TypeError: a key belongs to other algorithms only, or is nearly an option's name.
    """
    algorithm = algorithm_of(group.get("algorithm", default))
    for key in group:
        if key not in algorithm.defaults and key not in _OTHER_KEYS:
            _check_unknown(key, algorithm)
    defaults = class_defaults if algorithm.name == default else algorithm.defaults
    complete = dict(group)
    complete["algorithm"] = algorithm.name
    for name, value in algorithm.defaults.items():
        complete[name] = plain_option(
            name, complete.get(name, defaults.get(name, value)), algorithm
        )
    check_lazy(complete)
    for name in OTHER_OPTIONS:
        if name in complete:
            complete[name] = plain_option(name, complete[name], algorithm)
    return complete


def _check_unknown(key: Any, algorithm: Algorithm) -> None:
    """Raise TypeError where a key that is no option was probably meant as one."""
    owners = [a.name for a in ALGORITHMS.values() if key in a.defaults]
    if owners:
        raise TypeError(f"{algorithm.name} has no option {key!r} (only {', '.join(owners)} has it)")
    options = ["params", "algorithm", *OTHER_OPTIONS, *algorithm.defaults]
    options += [name for a in ALGORITHMS.values() for name in a.defaults]
    near = difflib.get_close_matches(key, options, 1, 0.8) if isinstance(key, str) else []
    # Trainers write "weight_decay_mult" beside "weight_decay"; "betas_" has no word more.
    words = str(key).strip("_")
    if near and (near[0] == words or f"_{near[0]}_" not in f"_{words}_"):
        raise TypeError(
            f"unknown key {key!r} in a parameter group of {algorithm.name}: did you mean "
            f"{near[0]!r}?"
        )
