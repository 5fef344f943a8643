# SPDX-License-Identifier: Apache-2.0
"""A few steps over everything at once, condensed into one number; run by test_determinism.py."""

from __future__ import annotations

import hashlib
import itertools

import torch
from cases import FLOATS, RULES, set_grad
from torch import Tensor
from torch.nn import Parameter


def _sparse(generator: torch.Generator, p: Tensor, nnz: int, dtype: torch.dtype) -> Tensor:
    # Some rows are far more popular than others, one of them by thousands.
    popular = torch.rand(nnz, generator=generator, dtype=torch.float64) ** 6
    rows = (popular * p.shape[0]).long()
    values = torch.randn(nnz, *p.shape[1:], generator=generator).to(dtype)
    return torch.sparse_coo_tensor(rows[None], values, p.shape)


def outcome() -> dict[str, str]:
    """Return a digest of all parameters and states for every rule."""
    generator = torch.Generator().manual_seed(11)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    values, grads = [], []
    for k, (dtype, grad) in enumerate(itertools.product(FLOATS.values(), FLOATS.values())):
        dense = normal(15_001 + k).to(dtype)
        small = normal(7, 5).to(dtype)
        table = normal(3000, 17 + k).to(dtype)
        transposed = normal(9, 200).to(dtype).T
        values += [dense, small, table, transposed]
        grads += [
            normal(15_001 + k).to(grad),
            normal(7, 5).to(grad),
            _sparse(generator, table, 6000, grad),
            _sparse(generator, transposed, 700, grad),
        ]
    wide = normal(40, 1100)
    values.append(wide)
    grads.append(_sparse(generator, wide, 2000, torch.float32))

    digests = {}
    for rule in RULES:
        params = [Parameter(v.clone()) for v in values]
        opt = rule(
            [
                {"params": params[::2]},
                {"params": params[1::2], "momentum_dtype": torch.bfloat16, "maximize": True},
            ]
        )
        for p, grad in zip(params, grads):
            set_grad(p, grad)
        for _ in range(2):
            opt.step()
        digest = hashlib.sha256()
        for p in params:
            for t in (p.detach(), *opt.state[p].values()):
                digest.update(t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        digests[rule.name] = digest.hexdigest()
    return digests
