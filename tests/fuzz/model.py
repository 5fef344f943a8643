# SPDX-License-Identifier: Apache-2.0
"""The rules of the specification in float64, taken literally: every step visits every element.

Nothing is shared with the package. A row that a lazy mode leaves behind takes each skipped step
here at once; the product is compared where its rows are current. Every value carries a bound of the
rounding errors of the product's arithmetic; where a direction's argument may be 0 within its bound,
the parameter's bound covers both signs. What was compared is taken over, so bounds do not grow.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fuzz import draws

SCALES = {"sign": 1.0, "clip": 1e4, "power": 0.5, "atan": 1e4}
_ROUNDINGS = 2.0  # of one element's update


@dataclass
class Estimate:
    """Values and the errors that they may have."""

    value: Tensor
    error: Tensor

    @classmethod
    def exact(cls, t: Tensor) -> Estimate:
        value = t.detach().to(torch.float64).clone()
        return cls(value, torch.zeros_like(value))

    def put(self, where: Tensor, new: Estimate) -> None:
        error = torch.where(new.value.isfinite(), new.error, 0.0)
        error = torch.where(error.isnan(), math.inf, error)
        self.value = torch.where(where, new.value, self.value)
        self.error = torch.where(where, error, self.error)


def smallest(dtype: torch.dtype) -> float:
    """Return a bound of the absolute error of storing a number."""
    return {torch.float16: 2.0**-24, torch.float64: 2.0**-1022}.get(dtype, 2.0**-126)


def rounded(dtype: torch.dtype, size: Tensor, share: float = 0.51) -> Tensor:
    """Return a bound of the error of rounding numbers of at most this size to nearest, once.

    ``share``: of the distance of two numbers that the error may have.
    """
    if dtype == torch.int8:  # of its scale, once it has one
        return rounded(torch.float32, size, 1.02) + 2.0**-118
    power = torch.ldexp(torch.ones_like(size), torch.frexp(size).exponent - 1)
    half = torch.where(size.isfinite(), share * torch.finfo(dtype).eps * power, size)
    return half + smallest(dtype)


def over_units(t: Tensor, dims: int) -> Tensor:
    """Return t as [units, elements]; a unit is an index of the first ``dims`` dimensions."""
    units = math.prod(t.shape[:dims])
    return t.reshape(units, -1) if t.numel() else t.reshape(units, 0)


def to_elements(units: Tensor, shape: torch.Size, dims: int) -> Tensor:
    return units.reshape((*shape[:dims], *[1] * (len(shape) - dims))).expand(shape)


def sign(t: Tensor) -> Tensor:
    return torch.where(t.isnan(), t, t.sign())


@dataclass
class Gradient:
    """A gradient by elements, and what of it counts."""

    sum: Estimate
    touched: Tensor
    unit_dims: int
    finite: Tensor  # of the unit of each element


@dataclass
class Parameter:
    """One parameter and its state."""

    dtype: torch.dtype
    value: Estimate
    exp_avg: Estimate
    exp_avg_sq: Estimate
    in_window: Tensor
    behind: Tensor  # has skipped steps since it was compared
    moved: Tensor  # may have been written by the last step
    touched: Tensor  # must be current after the last step
    unit_dims: int = 0
    steps: int = 0
    divided_anew: bool = False  # all rows were caught up, and rounded
    # How the state stores moments: the dtype and scales' shape of the first, the second's shape and
    # dtype.
    form: tuple[Any, ...] = (None, None, None, None)
    row_dims: int = 0  # of what the state has by rows
    blocks: Tensor | None = None  # the block of each element
    drawn: Tensor | None = None  # what the last step's update has written, if not in a window
    written_by_rows: int = 0  # dimensions of the rows in which it did
    sparse_once: bool = False  # has had a sparse gradient
    changed_by_hand: bool = False  # options of how its state is stored
    was_frozen: bool = False

    @classmethod
    def of(cls, p: Tensor) -> Parameter:
        zeros = Estimate.exact(torch.zeros(p.shape))
        flags = [torch.zeros(p.shape, dtype=torch.bool) for _ in range(4)]
        again = Estimate.exact(torch.zeros(p.shape))
        return cls(p.dtype, Estimate.exact(p), zeros, again, *flags)

    @property
    def eps(self) -> float:
        return torch.finfo(torch.float64 if self.dtype == torch.float64 else torch.float32).eps


def per_scale(p: Parameter, t: Tensor) -> Tensor:
    """Return the largest of the numbers that share an int8 momentum's scale."""
    if t.numel() == 0:
        return t
    if p.row_dims:
        return to_elements(over_units(t, p.row_dims).amax(1), t.shape, p.row_dims)
    assert p.blocks is not None
    most = t.new_zeros(int(p.blocks.max()) + 1)
    most.scatter_reduce_(0, p.blocks.flatten(), t.flatten(), "amax")
    return most[p.blocks]


def quantum(p: Parameter, m: Estimate) -> Tensor:
    """Return a bound of an int8 momentum's scale, and of the error of quantising it."""
    return per_scale(p, m.value.abs() + m.error) / 127 * (1 + 1e-5) + 2.0**-125


def row_means(t: Tensor, dims: int) -> Tensor:
    return to_elements(over_units(t, dims).mean(1), t.shape, dims).clone() if t.numel() else t


def stored_anew(group: Group, p: Parameter, form: tuple[Any, ...], tensor: Tensor) -> None:
    """Note how the state stores moments, and what follows for those that were stored otherwise."""
    dtype, scales, second, _ = form
    shape = p.value.value.shape
    by_rows = scales is not None and scales != block_scales(shape)
    p.row_dims = len(scales) if by_rows else 0
    if second is not None and group.row_wise(p):
        p.row_dims = len(second)
    p.blocks = draws.places(tensor, 0)[0]
    if form[:2] != p.form[:2] and dtype == torch.int8:
        p.exp_avg.error = p.exp_avg.error + quantum(p, p.exp_avg)
        zero = per_scale(p, p.exp_avg.value.abs() + p.exp_avg.error) < 2.0**-124
        p.exp_avg.error = torch.where(zero & (p.exp_avg.value == 0), 0.0, p.exp_avg.error)
    if dtype not in (p.form[0], torch.int8) and p.form[0] == torch.int8:
        p.exp_avg.error = p.exp_avg.error + rounded(dtype, p.exp_avg.value.abs())
    if second != p.form[2] and second is not None and len(second) < len(shape) and second:
        v = p.exp_avg_sq
        p.exp_avg_sq = Estimate(row_means(v.value, len(second)), row_means(v.error, len(second)))
    p.form = form


def block_scales(shape: Any) -> tuple[int, ...]:
    blocks = (-(-math.prod(shape) // draws.BLOCK), 1)
    return blocks if tuple(shape[:2]) != blocks else (*blocks, *[1] * (len(shape) - 1))


@dataclass
class Group:
    """A parameter group; ``options`` are complete."""

    options: dict[str, Any]
    params: dict[str, Parameter] = field(default_factory=dict)
    micro_steps: int = 0
    steps: int = 0

    # What the options say, in numbers.

    @property
    def lr(self) -> float:
        return float(self.options["lr"])

    @property
    def accumulation(self) -> int:
        return self.options.get("accumulation_steps", 1)

    @property
    def lazy(self) -> str:
        return self.options["lazy"]

    def storage(self, p: Parameter, name: str) -> torch.dtype:
        if p.changed_by_hand and (found := p.form[0 if name == "exp_avg" else 3]) is not None:
            return found  # a moment is not stored anew in another floating point format
        if name == "exp_avg_sq" and self.row_wise(p):
            return torch.float64 if p.dtype == torch.float64 else torch.float32
        dtype = self.options["momentum_dtype"] or p.dtype
        if dtype == torch.int8 and name == "exp_avg_sq":
            dtype = torch.float32
        return torch.promote_types(dtype, p.dtype) if name == "exp_avg_sq" else dtype

    @property
    def counts(self) -> bool:
        """Whether parameters have a counter."""
        rounds = self.options["stochastic_rounding"] or self.quantises
        return self.options["algorithm"] == "adamw" or rounds

    @property
    def quantises(self) -> bool:
        return self.options["momentum_dtype"] == torch.int8

    def at_random(self, p: Parameter) -> bool:
        """Return whether the parameter's own numbers are rounded at random."""
        return bool(self.options["stochastic_rounding"]) and p.dtype in draws.HALVES

    def row_wise(self, p: Parameter) -> bool:
        return self.options.get("second_moment") == "row" and p.value.value.dim() >= 2

    def rounding(self, p: Parameter, name: str, size: Tensor) -> Tensor:
        """Return a bound of the error of storing numbers of at most this size, unscaled ones."""
        if name == "value":
            return rounded(p.dtype, size, 1.01 if self.at_random(p) else 0.51)
        return rounded(self.storage(p, name), size)

    def moments(self) -> list[str]:
        if self.options["algorithm"] != "adamw":
            return ["exp_avg"]
        return ["exp_avg", "exp_avg_sq"] if self.options["betas"][0] > 0 else ["exp_avg_sq"]

    # ------------------------------------------------------------------------------- a step

    def step(self, grads: dict[str, Tensor | None], training: dict[str, bool], used: Any) -> None:
        """Take a step; ``used``: a mask of the used rows of tracked parameters."""
        closes = self.micro_steps + 1 >= self.accumulation
        for name, p in self.params.items():
            g = grads.get(name)
            p.moved = torch.zeros_like(p.moved)
            p.touched = torch.zeros_like(p.touched)
            p.drawn = None
            if g is not None or training[name] or (closes and bool(p.in_window.any())):
                self._step_parameter(p, g, used.get(name), closes)
        self.micro_steps = 0 if closes else self.micro_steps + 1
        self.steps += closes

    def close_window(self, training: dict[str, bool]) -> None:
        """End an open accumulation window early."""
        if self.micro_steps:
            self.micro_steps = self.accumulation - 1
            self.step({}, training, {})

    def _step_parameter(self, p: Parameter, g: Any, used: Tensor | None, closes: bool) -> None:
        adamw = self.options["algorithm"] == "adamw"
        if self.counts and (g is not None or self.lazy != "frozen"):
            p.steps += 1
        if p.value.value.numel() == 0:
            return
        if p.divided_anew:
            self._round_stale(p, torch.ones_like(p.moved))
        if g is not None:
            gradient = self._gradient(p, g, used)
            if not bool(gradient.finite.all()):
                self._judge(p, gradient)
            self._round_stale(p, gradient.touched)
            p.touched = gradient.touched.clone()
            if self.accumulation > 1:
                self._gather(p, gradient)
            elif not bool(gradient.touched.any()):
                pass  # the first steps may all have been skipped, and none been counted
            elif adamw:
                self._adamw(p, gradient)
            else:
                self._sign_momentum(p, gradient)
            p.moved |= gradient.touched
            if self.accumulation == 1:
                p.drawn, p.written_by_rows = gradient.touched.clone(), gradient.unit_dims
            if self.quantises:
                self._spread(p, gradient)
        if not closes:
            return
        moved = p.touched
        if self.accumulation > 1:
            moved = p.in_window
            self._move(p, moved, self._stored(p), p.unit_dims)
            p.in_window = torch.zeros_like(moved)
            p.touched = moved
            p.moved |= moved
        if self.lazy != "frozen":
            self._skip(p, ~moved)

    def _gradient(self, p: Parameter, g: Tensor, used: Tensor | None) -> Gradient:
        shape, options = p.value.value.shape, self.options
        if g.layout == torch.sparse_coo:
            dims = g.sparse_dim()
            where = tuple(g._indices())
            values = g._values().to(torch.float64)
            total, size, count = (torch.zeros(shape, dtype=torch.float64) for _ in range(3))
            total.index_put_(where, values, accumulate=True)
            size.index_put_(where, values.abs(), accumulate=True)
            count.index_put_(where, torch.ones_like(values), accumulate=True)
            touched = count > 0
            error = p.eps * count * torch.where(count > 1, size, 0.0)
        else:
            total = g.detach().to(torch.float64)
            error = torch.zeros_like(total)
            dims = 1 if options["rows"] is not None and len(shape) >= 2 else 0
            touched = torch.ones(shape, dtype=torch.bool)
            if dims and options["rows"] == "nonzero":
                touched = to_elements(over_units(total != 0, 1).any(1), shape, 1)
            elif dims:
                assert used is not None
                touched = to_elements(used, shape, 1)
            if options.get("scale") == "rms_rows" and len(shape) > 0:
                dims = 1
            dims = dims or p.row_dims
        finite = to_elements(over_units(total.isfinite(), dims).all(1), shape, dims)
        total = -total if options["maximize"] else total
        p.unit_dims = dims
        return Gradient(Estimate(total, error), touched.clone(), dims, finite)

    def _judge(self, p: Parameter, g: Gradient) -> None:
        if self.options["nonfinite"] not in ("skip", "shrink"):
            return
        bad = g.touched & ~g.finite
        p.moved |= bad
        g.touched &= g.finite
        self._round_stale(p, bad)
        if g.unit_dims == 0 and bool(bad.any()):
            p.steps -= 1  # a parameter that is skipped whole does not advance its counter
        if self.options["nonfinite"] == "shrink" and bool(bad.any()):
            ratio, to = self.options["shrink_ratio"], self.options.get("shrink_to", 0.0)
            new = to + ratio * (p.value.value - to)
            error = p.value.error + 4 * p.eps * (p.value.value.abs() + abs(to))
            error = error + self.rounding(p, "value", new.abs())  # of rows that lag, unseen
            p.value.put(bad, Estimate(new, error))

    def _round_stale(self, p: Parameter, where: Tensor) -> None:
        """Allow for the rounding of rows that were caught up before they are updated."""
        where = where & p.behind
        for name in ("value", *self.moments()):
            e: Estimate = getattr(p, name)
            error = e.error + self.rounding(p, name, e.value.abs() + e.error)
            e.put(where & (e.value != 0), Estimate(e.value, error))

    def _mix(self, p: Parameter, old: Estimate, beta: Any, g: Estimate, weight: float) -> Estimate:
        size = (beta * old.value).abs() + (weight * g.value).abs()
        error = beta * old.error + weight * g.error + _ROUNDINGS * p.eps * size
        return Estimate(beta * old.value + weight * g.value, error + (size > 0) * 2.0**-126)

    def _sign_momentum(self, p: Parameter, g: Gradient) -> None:
        betas = self.options["betas"]
        c = self._mix(p, p.exp_avg, betas[0], g.sum, 1 - betas[0])
        new = self._mix(p, p.exp_avg, betas[-1], g.sum, 1 - betas[-1])
        self._move(p, g.touched, c, g.unit_dims)
        p.exp_avg.put(g.touched, new)

    def _gather(self, p: Parameter, g: Gradient) -> None:
        (beta,) = self.options["betas"]
        factor = torch.where(p.in_window, torch.ones(()).double(), beta)
        weight = (1 - beta) / self.accumulation
        p.exp_avg.put(g.touched, self._mix(p, p.exp_avg, factor, g.sum, weight))
        p.in_window |= g.touched

    def _spread(self, p: Parameter, g: Gradient) -> None:
        """Let a NaN or Inf make NaN of all that has the same scale."""
        bad = g.touched & ~p.exp_avg.value.isfinite()
        bad = per_scale(p, bad.double()) > 0
        p.exp_avg.value = torch.where(bad & g.touched, torch.nan, p.exp_avg.value)

    def _stored(self, p: Parameter) -> Estimate:
        m, dtype = p.exp_avg, self.storage(p, "exp_avg")
        if dtype == torch.int8:
            return Estimate(m.value, m.error + quantum(p, m))
        rounding = rounded(dtype, m.value.abs() + m.error)
        return Estimate(m.value, m.error + (m.value != 0) * rounding)

    def _direction(self, c: Estimate) -> Estimate:
        kind = self.options["direction"]
        kappa = self.options["direction_scale"] or SCALES[kind]

        def of(x: Tensor) -> Tensor:
            if kind == "clip":
                return (kappa * x).clamp(-1, 1)
            if kind == "power":
                return sign(x) * x.abs() ** kappa
            if kind == "atan":
                return 2 / math.pi * torch.atan(kappa * x)
            return sign(x)

        d = of(c.value)
        error = torch.maximum((of(c.value + c.error) - d).abs(), (of(c.value - c.error) - d).abs())
        return Estimate(d, error + (0.0 if kind == "sign" else 4e-6) * d.abs())

    def _move(self, p: Parameter, where: Tensor, c: Estimate, dims: int) -> None:
        """Move elements by the direction of c, with this step's hyperparameters."""
        options, theta = self.options, p.value
        d, weight_decay = self._direction(c), options["weight_decay"]
        zero = torch.zeros_like(theta.value)
        rate = decay = Estimate(zero + self.lr, zero)
        if options["scale"] is not None:
            size, norm = self._rms(theta, dims), Estimate(zero + 1, zero)
            if options["direction"] != "sign":
                norm = self._rms(d, dims)
            nothing = (norm.value == 0) & (norm.error == 0)
            norm.value = torch.where(nothing, 1.0, norm.value)
            size.value = size.value.clamp(min=options["rms_floor"])
            decay = Estimate(self.lr * size.value, self.lr * size.error)
            low, high = norm.value - norm.error, norm.value + norm.error
            middle = decay.value / norm.value
            top, bottom = (decay.value + decay.error) / low, (decay.value - decay.error) / high
            rate = Estimate(middle, torch.maximum(top - middle, middle - bottom) + 1e-6 * middle)
            lost = low <= 0
            rate.error = torch.where(lost, math.inf, rate.error)
        shrunk = (decay.value * weight_decay).clamp(max=1.0)
        new = (1 - shrunk) * theta.value - rate.value * d.value
        error = (1 - shrunk) * theta.error + rate.value * d.error
        error = error + decay.error * weight_decay * theta.value.abs() + rate.error * d.value.abs()
        error = error + _ROUNDINGS * p.eps * (theta.value.abs() + (rate.value * d.value).abs())
        unknown = rate.error == math.inf
        new, error = torch.where(unknown, 0.0, new), torch.where(unknown, math.inf, error)
        theta.put(where, Estimate(new, error))

    @staticmethod
    def _rms(x: Estimate, dims: int) -> Estimate:
        def rms(t: Tensor) -> Tensor:
            each = over_units(t * t, dims).mean(1).sqrt()
            return to_elements(each, t.shape, dims).clone()

        return Estimate(rms(x.value), rms(x.error) + 1e-6 * rms(x.value))

    def _adamw(self, p: Parameter, g: Gradient) -> None:
        options, t = self.options, p.steps
        beta1, beta2 = options["betas"]
        m = self._mix(p, p.exp_avg, beta1, g.sum, 1 - beta1)
        square = g.sum.value * g.sum.value
        square_error = 2 * g.sum.value.abs() * g.sum.error + g.sum.error**2 + p.eps * square
        if self.row_wise(p):
            square, square_error = (row_means(t, p.row_dims) for t in (square, square_error))
        v = self._mix(p, p.exp_avg_sq, beta2, Estimate(square, square_error), 1 - beta2)

        def change(size: Tensor, second: Tensor) -> Tensor:
            root = (second.clamp(min=0) / (1 - beta2**t)).sqrt() + options["eps"]
            return self.lr / (1 - beta1**t) * size / root

        middle = change(m.value, v.value)
        most = change(m.value.abs() + m.error, v.value - v.error)
        least = change((m.value.abs() - m.error).clamp(min=0), v.value + v.error)
        spread = torch.maximum(most - middle.abs(), middle.abs() - least)
        theta = p.value
        factor = 1 - self.lr * options["weight_decay"]
        new = factor * theta.value - middle
        error = abs(factor) * theta.error + spread + 8 * 2.0**-126
        error = error + p.eps * (_ROUNDINGS * theta.value.abs() + 6 * middle.abs())
        theta.put(g.touched, Estimate(new, error))
        p.exp_avg.put(g.touched, m)
        p.exp_avg_sq.put(g.touched, v)

    def _skip(self, p: Parameter, where: Tensor) -> None:
        """Take a step with a gradient of zero, as a lazy mode does when it catches up."""
        options, theta = self.options, p.value
        factor = 1 - self.lr * options["weight_decay"]
        new, push = factor * theta.value, 0.0
        if self.lazy == "exact":
            push = self.lr
            new = new - push * sign(p.exp_avg.value)
        error = abs(factor) * theta.error + p.eps * (theta.value.abs() + push)
        if self.lazy == "exact" and self.quantises:  # since it was quantised anew
            error = error + 2 * push * (p.exp_avg.error >= p.exp_avg.value.abs())
        theta.put(where, Estimate(new, error))
        betas = options["betas"]
        decays = {"exp_avg": betas[0] if options["algorithm"] == "adamw" else betas[-1]}
        decays["exp_avg_sq"] = betas[-1]
        for name in self.moments():
            e: Estimate = getattr(p, name)
            error = decays[name] * e.error + p.eps * e.value.abs()
            e.put(where, Estimate(decays[name] * e.value, error))
        p.behind = p.behind | where
