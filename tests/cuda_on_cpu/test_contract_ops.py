# SPDX-License-Identifier: Apache-2.0
"""``torch.ops.tiger_ext`` on the CUDA kernels."""

import pytest
import torch
from both import CPU, DEVICE, ON_GPU, agree, assert_agree, cpu_kernels
from cases import FLOATS, parameter, sparse_grad
from oracle import same_bits

F32, BF16 = FLOATS["float32"], FLOATS["bfloat16"]


def op_lists(name, dtype, index_dtype=torch.int64):
    """Return the positional lists of one call over three parameters, on the CPU."""
    params = [parameter(*s, dtype=dtype).detach() for s in [(12, 5), (400, 20), (7, 2)]]
    if name.endswith("rows_"):
        grads = [sparse_grad(p, 300) for p in params]
        lists = [params, [g._indices().to(index_dtype) for g in grads]]
        lists.append([g._values() for g in grads])
    else:
        lists = [params, [torch.randn_like(p) for p in params]]
    lists.append([torch.randn_like(p) for p in params])
    if name.startswith("adamw"):
        lists.append([torch.rand_like(p) for p in params])
        lists.append([torch.tensor(4) for _ in params])
    return lists


def call(name, lists, device, index_dtype=None):
    lists = [[t.to(device, copy=True) for t in tensors] for tensors in lists]
    if index_dtype:
        lists[1] = [i.to(index_dtype) for i in lists[1]]
    hyper = dict(lr=0.02, beta1=0.7, beta2=0.95, weight_decay=0.3, maximize=True, grad_scale=2.0)
    if name.startswith("adamw"):
        hyper["eps"] = 1e-6
    for _ in range(2):
        getattr(torch.ops.tiger_ext, name)(*lists, **hyper)
    return [t.cpu() for tensors in (lists[0], *lists[2:]) for t in tensors]


@pytest.mark.parametrize(
    "name", ["sign_momentum_dense_", "sign_momentum_rows_", "adamw_dense_", "adamw_rows_"]
)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["float32", "bfloat16"])
def test_ops(name, dtype):
    lists = op_lists(name, dtype)
    with cpu_kernels():
        expected = call(name, lists, CPU)
    actual = call(name, lists, DEVICE)
    assert len(actual) == len(expected)
    for k, (a, b) in enumerate(zip(actual, expected)):
        if ON_GPU and name.startswith("adamw") and k < 3:
            torch.testing.assert_close(a, b)  # parameters, by another pow()
        else:
            assert_agree(a, b, f"tensor {k}")


@pytest.mark.parametrize("name", ["sign_momentum_rows_", "adamw_rows_"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["float32", "bfloat16"])
def test_int32_indices_equal_int64(name, dtype):
    lists = op_lists(name, dtype)
    narrow = call(name, lists, DEVICE, torch.int32)
    wide = call(name, lists, DEVICE, torch.int64)
    assert len(narrow) == len(wide)
    assert all(same_bits(a, b) for a, b in zip(narrow, wide))
    assert not any(agree(a, b) for a, b in zip(narrow[:3], lists[0]))
