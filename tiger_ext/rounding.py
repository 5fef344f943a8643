# SPDX-License-Identifier: Apache-2.0
"""Stochastic rounding, in plain PyTorch: the definition that the native kernels are tested against.

A number between two that can be stored becomes the upper one with the probability of its distance
from the lower one, so that the mean over many roundings is the number itself. The random bits are a
function of (seed, step, position of the parameter, place in it) alone: a step is reproducible, and
the same for any number of threads and on any device.

The bits are those of a counter that is mixed twice: 64 bits for each unit (a row, or 256
neighbouring elements), by the finaliser of splitmix64 (Steele, Lea & Flood 2014, "Fast splittable
pseudorandom number generators"), and from these 32 bits for each two elements of it, by a finaliser
of two multiplications (Wellons 2018, "Prospecting for hash functions").
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tiger_ext.options import SEEDS, algorithm_of

__all__ = [
    "BLOCK",
    "CATCH_UP",
    "MOMENTUM",
    "PARAMETER",
    "REQUANTISED",
    "Draws",
    "counts_steps",
    "keep_seed",
    "memory_order",
    "quantised",
    "round_to",
    "rounds",
]

BLOCK = 256  # how many neighbouring elements make a unit where the update does not go by rows
# What bits are for: each has its own. That of a write which is a catch-up alone is CATCH_UP more.
PARAMETER, MOMENTUM, CATCH_UP = 0, 1, 2
REQUANTISED = MOMENTUM + 4  # an int8 momentum that gets scales for other units

_GOLDEN = 0x9E3779B97F4A7C15
_ALL = (1 << 64) - 1
_LOW = (1 << 32) - 1
# Factors and shifts of the finaliser of 64 bits.
_MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))


@dataclass(frozen=True)
class Draws:
    """The random bits of one parameter in one step.

    Attributes:
        seed: the group's ``rounding_seed``.
        step: the parameter's counter; of a catch-up alone the step up to which rows are brought.
        position: the parameter's number in the optimizer.
    """

    seed: int
    step: int
    position: int

    def bits(self, stream: int, p: Tensor, where: tuple[Tensor, ...] | None) -> Tensor:
        """Return 16 random bits, as int64, for each element of units of ``p``.

        Args:
            stream: what for.
            p: the parameter.
            where: the indices of its rows, one tensor for each dimension that rows have; None: the
                whole parameter, in blocks of 256 elements in the order of ``memory_order``.

        Returns:
            ``[rows, ...]``, or ``[1, *p.shape]``.
        """
        key = _mixed(
            _mixed(_mixed(self.seed + _GOLDEN * stream) + _GOLDEN * self.step)
            + _GOLDEN * self.position
        )
        if where is None:
            number = memory_order(p).unsqueeze(0)
            return _bits(key, number // BLOCK, number % BLOCK)
        unit = torch.zeros_like(where[0])
        for d, index in enumerate(where):
            unit = unit * p.shape[d] + index
        row = p.shape[len(where) :]
        place = torch.arange(math.prod(row), device=p.device).reshape(row)
        return _bits(key, unit.reshape(-1, *[1] * len(row)), place)


def rounds(group: Mapping[str, Any]) -> bool:
    """Return whether something of a group is rounded stochastically."""
    return bool(group.get("stochastic_rounding")) or group.get("momentum_dtype") == torch.int8


def keep_seed(group: dict[str, Any]) -> None:
    """Let a group that rounds have a ``rounding_seed``."""
    if rounds(group) and "rounding_seed" not in group:
        group["rounding_seed"] = torch.initial_seed() & SEEDS


def counts_steps(group: Mapping[str, Any]) -> bool:
    """Return whether the parameters of a group have a counter ``step``."""
    return algorithm_of(group["algorithm"]).counts_steps or rounds(group)


def memory_order(p: Tensor) -> Tensor:
    """Return the number of each element of ``p``: in the order in which they lie in memory.

    Where elements overlap, or there are gaps between them, in that of their indices.
    """
    dims = sorted(range(p.dim()), key=lambda d: p.stride(d), reverse=True)
    if not p.permute(dims).is_contiguous():
        dims = list(range(p.dim()))
    numbers = torch.arange(p.numel(), device=p.device).reshape([p.shape[d] for d in dims])
    return numbers.permute([dims.index(d) for d in range(p.dim())])


def _mixed(x: int) -> int:
    x &= _ALL
    for shift, factor in _MIX:
        x = ((x ^ (x >> shift)) * factor) & _ALL
    return x ^ (x >> 31)


def _bits(key: int, unit: Tensor, place: Tensor) -> Tensor:
    """Return the bits of each place of each unit; products of int64 wrap around."""
    x = _signed(_GOLDEN) * unit + _signed(key)
    for shift, factor in _MIX:
        x = (x ^ _shifted(x, shift)) * _signed(factor)
    x = x ^ _shifted(x, 31)
    high = _shifted(x, 32)
    x = ((x & _LOW) + place // 2 * 0x9E3779B9) & _LOW
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _LOW
    x = x ^ high
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _LOW
    x = x ^ (x >> 16)
    return torch.where(place % 2 == 0, x & 0xFFFF, x >> 16)


def _signed(x: int) -> int:
    return x - (1 << 64) if x >> 63 else x


def _shifted(x: Tensor, by: int) -> Tensor:
    return (x >> by) & ((1 << (64 - by)) - 1)


def round_to(dtype: torch.dtype, values: Tensor, bits: Tensor) -> Tensor:
    """Round float32 values to bfloat16 or float16, up or down as ``bits`` say.

    What can be stored is kept; NaN stays NaN and Inf Inf.
    """
    bits = bits.expand(values.shape)
    raw = values.contiguous().view(torch.int32).long() & _LOW
    if dtype == torch.bfloat16:
        stored = (raw + bits) >> 16
    else:
        magnitude = raw & 0x7FFFFFFF
        normal = (magnitude - (112 << 23) + (bits >> 3)) >> 13
        normal = torch.where(values.abs() >= 65536, 0x7C00, normal)
        fraction = ((bits >> 3).to(torch.float32) + 0.5) * 2.0**-13
        small = values.abs() < 2.0**-14
        subnormal = torch.where(small, values.abs(), 0) * 2.0**24 + fraction
        stored = torch.where(small, subnormal.trunc().long(), normal) | (raw >> 31 << 15)
    stored = torch.where(stored >= 1 << 15, stored - (1 << 16), stored)
    rounded = stored.to(torch.int16).view(dtype)
    return torch.where(values.isnan(), values.to(dtype), rounded)


def quantised(values: Tensor, bits: Tensor) -> tuple[Tensor, Tensor]:
    """Return int8 numbers and the scale of each unit, whose product with them is the values.

    Args:
        values: ``[units, n]``, float32. Of a unit with a NaN or Inf all becomes NaN.
        bits: of the same shape: whether a number becomes the next larger or smaller integer.
    """
    largest = values.abs().amax(1) if values.shape[1] else values.new_zeros(len(values))
    scale = torch.where(largest > 0, (largest / 127).clamp(min=2.0**-126), 0)
    inverse = torch.where(scale > 0, 1 / scale, 0)
    draw = (bits.to(torch.float32) + 0.5) * 2.0**-16
    q = (values * inverse.unsqueeze(1) + draw).floor().clamp(-127, 127)
    finite = values.isfinite().all(1)
    q = torch.where(finite.unsqueeze(1), q, 0)
    return q.to(torch.int8), torch.where(finite, scale, torch.nan)
