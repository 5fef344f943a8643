# SPDX-License-Identifier: Apache-2.0
"""The random bits of docs/design.md ("Small state"), and what they round numbers to.

Nothing is shared with the package. Rounding with given bits is monotone, so that what a number is
rounded to lies between what the bounds of its error are rounded to.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

BLOCK = 256
PARAMETER, MOMENTUM, CATCH_UP = 0, 1, 2
HALVES = (torch.bfloat16, torch.float16)
_G = 0x9E3779B97F4A7C15
_ALL = 2**64 - 1


def _mix(x: int) -> int:
    x &= _ALL
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _ALL
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _ALL
    return x ^ (x >> 31)


def _of_place(unit: int, place: int) -> int:
    x = (unit + place // 2 * 0x9E3779B9) % 2**32
    x = (x ^ (x >> 16)) * 0x7FEB352D % 2**32
    x ^= unit >> 32
    x = (x ^ (x >> 15)) * 0x846CA68B % 2**32
    x ^= x >> 16
    return x >> 16 if place % 2 else x & 0xFFFF


def places(p: Tensor, dims: int | None) -> tuple[Tensor, Tensor]:
    """Return the (unit, place) of each element: of rows, for dims = 0 of blocks in memory.

    dims = None: all is one row.
    """
    numbers = torch.arange(p.numel()).reshape(p.shape)
    if dims is None:
        return torch.zeros_like(numbers), numbers
    if dims:
        size = max(math.prod(p.shape[dims:]), 1)
        return numbers // size, numbers % size
    place = p.detach().as_strided(p.shape, p.stride())
    sizes = [(s, n) for n, s in zip(p.shape, p.stride(), strict=True) if n > 1]
    dense = 1
    for stride, n in sorted(sizes):
        if stride != dense:
            return numbers // BLOCK, numbers % BLOCK
        dense *= n
    offsets = torch.zeros(p.shape, dtype=torch.int64)
    for d in range(p.dim()):
        shape = [-1 if i == d else 1 for i in range(p.dim())]
        offsets = offsets + (torch.arange(p.shape[d]) * place.stride(d)).reshape(shape)
    return offsets // BLOCK, offsets % BLOCK


def random_bits(
    key: tuple[int, int, int], stream: int, units: Tensor, place: Tensor, where: Tensor
) -> Tensor:
    """Return 16 bits for each element in ``where``; ``key``: seed, step, position."""
    seed, step, position = key
    tensor = _mix(_mix(_mix(seed + _G * stream) + _G * step) + _G * position)
    out = np.zeros(units.numel(), dtype=np.int64)
    of_units: dict[int, int] = {}
    flat = zip(units.flatten().tolist(), place.flatten().tolist(), strict=True)
    chosen = where.flatten().tolist()
    for i, (u, c) in enumerate(flat):
        if chosen[i]:
            if u not in of_units:
                of_units[u] = _mix(tensor + _G * u)
            out[i] = _of_place(of_units[u], c)
    return torch.from_numpy(out).reshape(units.shape)


def rounded(dtype: torch.dtype, x: Tensor, bits: Tensor) -> Tensor:
    """Return numbers rounded to bfloat16 or float16 with these bits, in float64."""
    small, least = (7, 2.0**-126) if dtype == torch.bfloat16 else (10, 2.0**-14)
    draw = bits.double() / 65536 if dtype == torch.bfloat16 else (bits >> 3).double() / 8192
    size = x.abs()
    if dtype == torch.float16:  # subnormal numbers
        draw = torch.where(size < least, draw + 2.0**-14, draw)
    exponent = torch.frexp(size.clamp(min=least)).exponent - 1 - small
    gap = torch.ldexp(torch.ones_like(size), exponent)
    up = (size / gap + draw).floor() * gap
    return torch.copysign(torch.where(up > torch.finfo(dtype).max, math.inf, up), x)
