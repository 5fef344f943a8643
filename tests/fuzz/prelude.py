# SPDX-License-Identifier: Apache-2.0
"""What programs are written with; a printed program begins with this file."""

import copy
import io
import pickle
import tempfile
from pathlib import Path

import torch
from torch import nn

import tiger_ext
from tiger_ext import checkpoint

FLOATS = dict(f64=torch.float64, f32=torch.float32, bf16=torch.bfloat16, f16=torch.float16)
torch.sparse.check_sparse_tensor_invariants.disable()


def numbers(seed, shape):
    """Return multiples of 1/8 of size 1/8 to 2: exact in every dtype, and never 0."""
    random = torch.Generator().manual_seed(seed)
    size = torch.randint(1, 17, tuple(shape), generator=random).double() / 8
    return torch.where(torch.rand(tuple(shape), generator=random) < 0.5, -size, size)


def lay_out(t, layout):
    """Copy t into memory where its elements are not neighbours."""
    if layout == "transposed" and t.dim() >= 2:
        return t.mT.clone(memory_format=torch.contiguous_format).mT
    if layout == "every second" and t.dim() >= 1:
        return torch.stack([t, torch.full_like(t, 7)], -1)[..., 0]
    return t.clone()


def parameter(seed, shape, dtype="f32", layout="contiguous"):
    return nn.Parameter(lay_out(numbers(seed, shape).to(FLOATS[dtype]), layout))


def dense(p, seed, dtype="f32", layout="contiguous", zero_rows=(), bad=None):
    g = numbers(seed, p.shape).to(FLOATS[dtype])
    for row in zero_rows:
        if p.dim() and row < len(p):
            g[row] = 0
    if bad is not None and g.numel():
        g.view(-1)[seed % g.numel()] = float(bad)
    if layout == "expanded" and g.dim():  # as the backward pass of a sum makes it
        return g[:1].expand(g.shape)
    return lay_out(g, layout)


def sparse(
    p,
    seed,
    dims=1,
    nnz=3,
    dtype="f32",
    coalesced=False,
    expanded=False,
    below=None,
    bad=None,
    index=None,
):
    """Return a COO gradient; ``index`` is put in place of the last entry's row."""
    random = torch.Generator().manual_seed(seed)
    sizes = [n if below is None else min(n, below) for n in p.shape[:dims]]
    nnz = nnz if all(sizes) else 0
    indices = torch.stack([torch.randint(max(n, 1), (nnz,), generator=random) for n in sizes])
    values = numbers(seed, (nnz, *p.shape[dims:])).to(FLOATS[dtype])
    if expanded and nnz:
        values = values[:1].expand(values.shape)
    elif bad is not None and values.numel():
        values.view(-1)[seed % values.numel()] = float(bad)
    g = torch.sparse_coo_tensor(indices, values, p.shape)
    g = g.coalesce() if coalesced else g
    if index is not None and g._nnz():
        g._indices()[0, -1] = index
    return g


def give(p, g):
    if g is not None and g.dtype != p.dtype:
        p.grad_dtype = None
    p.grad = g


class Lookup(nn.Module):
    def __init__(self, p):
        super().__init__()
        self.weight = p

    def forward(self, ids):
        return self.weight[ids]


def track(optimizer, p):
    lookup = Lookup(p)
    optimizer.track(lookup)
    return lookup


def through_file(saved):
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def through_copy(*things):
    return copy.deepcopy(things)


def through_pickle(*things):
    return pickle.loads(pickle.dumps(things))


def bring_over(optimizer, since, other):
    """Write what has changed since, and apply it to an optimizer that stands there."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "delta"
        checkpoint.save_changes(optimizer, path, since)
        checkpoint.apply_changes(other, path)


def build(cls, groups, **options):
    return getattr(tiger_ext, cls)(groups, **options)
