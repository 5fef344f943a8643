# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from cases import FLOATS, RULES, dense_grad, every_rule, parameter, set_grad, sparse_grad
from oracle import same_bits
from torch import Tensor
from torch.nn import Parameter

import tiger_ext

OPS = torch.ops.tiger_ext
NAMES = ("sign_momentum_dense_", "sign_momentum_rows_", "adamw_dense_", "adamw_rows_")
HYPER = {
    "sign_momentum": dict(lr=0.02, beta1=0.7, beta2=0.95, weight_decay=0.3),
    "adamw": dict(lr=0.02, beta1=0.8, beta2=0.99, eps=1e-6, weight_decay=0.3),
}


def sample(name: str, dtype: torch.dtype = torch.float32, **hyper):
    """Return (positional lists, keyword arguments) of one call over three parameters."""
    family = "adamw" if name.startswith("adamw") else "sign_momentum"
    params = [torch.randn(s).to(dtype) for s in [(12, 5), (40, 3), (7, 2)]]
    if name.endswith("rows_"):
        grads = [sparse_grad(p, 20) for p in params]
        lists = [params, [g._indices() for g in grads], [g._values() for g in grads]]
    else:
        lists = [params, [torch.randn_like(p) for p in params]]
    lists.append([torch.randn_like(p) for p in params])
    if family == "adamw":
        lists.append([torch.rand_like(p) for p in params])
        lists.append([torch.tensor(4) for _ in params])
    return lists, {**HYPER[family], **hyper}


def written(lists: list[list[Tensor]], name: str) -> list[Tensor]:
    inputs = 3 if name.endswith("rows_") else 2
    return [t for k, tensors in enumerate(lists) if k == 0 or k >= inputs for t in tensors]


# ----------------------------------------------------------------------------------- the contract


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(name, dtype):
    lists, hyper = sample(name, dtype)
    torch.library.opcheck(getattr(OPS, name).default, tuple(lists), hyper)


@pytest.mark.parametrize("name", ["adamw_dense_", "adamw_rows_"])
def test_opcheck_without_first_moment(name):
    lists, hyper = sample(name, beta1=0.0, maximize=True, grad_scale=2.0)
    lists[-3] = []
    torch.library.opcheck(getattr(OPS, name).default, tuple(lists), hyper)


@pytest.mark.parametrize("name", NAMES)
def test_versions_of_what_is_written_go_up(name):
    lists, hyper = sample(name)
    everything = [t for tensors in lists for t in tensors]
    before = {id(t): t._version for t in everything}
    getattr(OPS, name)(*lists, **hyper)
    mutated = {id(t) for t in written(lists, name)}
    for t in everything:
        assert (t._version > before[id(t)]) == (id(t) in mutated), list(t.shape)


@every_rule
@pytest.mark.parametrize("layout", ["dense", "rows", "copied-back"])
def test_versions_go_up_in_a_step(rule, layout):
    p = Parameter(torch.randn(10, 8)[:, ::2]) if layout == "copied-back" else parameter(10, 4)
    p.grad = sparse_grad(p, 5) if layout == "rows" else torch.randn(10, 4)
    opt = rule([p])
    opt.step()
    tensors = [p, *opt.state[p].values()]
    before = [t._version for t in tensors]
    opt.step()
    assert all(t._version > old for t, old in zip(tensors, before))


def test_autograd_notices_a_step_between_forward_and_backward():
    p = parameter(4)
    opt = RULES[0]([p])
    p.grad = torch.ones(4)
    loss = (p * p).sum()
    opt.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("name", NAMES)
def test_inputs_are_not_written(name):
    lists, hyper = sample(name)
    mutated = {id(t) for t in written(lists, name)}
    inputs = [t for tensors in lists for t in tensors if id(t) not in mutated]
    copies = [t.clone() for t in inputs]
    getattr(OPS, name)(*lists, maximize=True, **hyper)
    assert all(same_bits(a, b) for a, b in zip(inputs, copies))


# --------------------------------------------------------------------- equal to the classes


@every_rule
@pytest.mark.parametrize("layout", ["dense", "rows"])
@pytest.mark.parametrize("maximize", [False, True], ids=["descend", "ascend"])
@pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS)
def test_equal_to_the_optimizer_bit_by_bit(rule, layout, maximize, dtype):
    params = [parameter(30, 7, dtype=dtype), parameter(6, 50, dtype=dtype)]
    copies = [p.detach().clone() for p in params]
    opt = rule(params, maximize=maximize)
    states = {
        "exp_avg": [torch.zeros_like(c) for c in copies],
        "exp_avg_sq": [torch.zeros_like(c) for c in copies],
        "step": [torch.tensor(0) for _ in copies],
    }
    betas = rule.options["betas"]
    hyper = dict(lr=0.02, beta1=betas[0], beta2=betas[-1], weight_decay=0.3, maximize=maximize)
    lists = ["exp_avg"]
    op = f"sign_momentum_{layout}_"
    if rule.name.startswith("adamw"):
        lists = ["exp_avg", "exp_avg_sq", "step"]
        op = f"adamw_{layout}_"
        hyper["eps"] = 1e-6
        if betas[0] == 0:
            states["exp_avg"] = []
    for _ in range(3):
        for p in params:
            p.grad = dense_grad(p) if layout == "dense" else sparse_grad(p, 40)
        if layout == "dense":
            grads = [[p.grad for p in params]]
        else:
            grads = [[p.grad._indices() for p in params], [p.grad._values() for p in params]]
        getattr(OPS, op)(copies, *grads, *[states[n] for n in lists], **hyper)
        opt.step()
    for k, p in enumerate(params):
        assert same_bits(p, copies[k])
        assert sorted(opt.state[p]) == sorted(n for n in lists if states[n])
        for name, value in opt.state[p].items():
            assert same_bits(value, states[name][k])


@pytest.mark.parametrize("name", NAMES)
def test_grad_scale_divides_the_gradient(name):
    lists, hyper = sample(name)
    scaled = [[t.clone() for t in tensors] for tensors in lists]
    values = scaled[2] if name.endswith("rows_") else scaled[1]
    for v in values:
        v.mul_(1024.0)
    getattr(OPS, name)(*lists, **hyper)
    getattr(OPS, name)(*scaled, grad_scale=1024.0, **hyper)
    assert all(same_bits(a, b) for a, b in zip(written(lists, name), written(scaled, name)))


@pytest.mark.parametrize("param", FLOATS.values(), ids=[f"param={n}" for n in FLOATS])
@pytest.mark.parametrize("momentum", FLOATS.values(), ids=[f"momentum={n}" for n in FLOATS])
def test_any_dtype_of_momentum(param, momentum):
    # The optimizers make no float64 momentum for a narrower parameter; the op takes it.
    lists, hyper = sample("sign_momentum_dense_", param)
    lists[2] = [m.to(momentum) for m in lists[2]]
    values, grads, momenta = ([t.double().clone() for t in tensors] for tensors in lists)
    OPS.sign_momentum_dense_(*lists, **hyper)
    arithmetic = torch.float64 if param == torch.float64 else torch.float32
    for p, g, m, new, dtype in zip(values, grads, momenta, lists[2], [momentum] * 3):
        # What float64 holds beyond the arithmetic type is rounded away on reading.
        expected = 0.95 * m.to(arithmetic).double() + (1 - 0.95) * g
        eps = max(torch.finfo(arithmetic).eps, torch.finfo(dtype).eps)
        torch.testing.assert_close(new.double(), expected, rtol=2 * eps, atol=2 * eps)
        assert new.dtype == dtype and new.shape == p.shape


# ------------------------------------------------------------------------------------ messages


def refused(name, error, match, change, **hyper):
    lists, options = sample(name, **hyper)
    change(lists)
    before = [t.clone() for t in written(lists, name)]
    with pytest.raises(error, match=match):
        getattr(OPS, name)(*lists, **options)
    assert all(same_bits(a, b) for a, b in zip(written(lists, name), before))


def test_length_of_lists():
    for name, position, word in (
        ("sign_momentum_dense_", 1, "grads"),
        ("sign_momentum_dense_", 2, "exp_avg"),
        ("sign_momentum_rows_", 1, "indices"),
        ("sign_momentum_rows_", 2, "values"),
        ("adamw_dense_", 3, "exp_avg_sq"),
        ("adamw_dense_", 4, "step"),
    ):
        refused(
            name, ValueError, rf"{word}\w* has 2 .*params has 3", lambda x, k=position: x[k].pop()
        )


def test_shape_of_the_gradient():
    def change(lists):
        lists[1][2] = torch.ones(7, 3)

    refused("sign_momentum_dense_", RuntimeError, r"params\[2\].*\[7, 3\].*\[7, 2\]", change)


def test_shape_of_the_state():
    def change(lists):
        lists[2][1] = torch.ones(40, 2)

    refused("adamw_dense_", RuntimeError, r"params\[1\].*exp_avg .*\[40, 2\].*\[40, 3\]", change)


def test_dtype_of_the_gradient():
    def change(lists):
        lists[1][2] = torch.ones(7, 2, dtype=torch.int32)

    refused("sign_momentum_dense_", RuntimeError, r"params\[2\].*gradient.*Int.*float32", change)


def test_dtype_of_step():
    def change(lists):
        lists[-1][1] = torch.tensor(4.0)

    refused("adamw_dense_", RuntimeError, r"params\[1\].*step.*int64", change)


def test_dtype_of_the_indices():
    def change(lists):
        lists[1][0] = lists[1][0].short()

    refused("sign_momentum_rows_", RuntimeError, r"params\[0\].*indices.*Short.*int64", change)


@pytest.mark.parametrize("shape", [(20,), (0, 20), (3, 20), (1, 19)], ids=str)
def test_shape_of_the_indices(shape):
    def change(lists):
        lists[1][0] = torch.zeros(shape, dtype=torch.int64)

    refused("sign_momentum_rows_", RuntimeError, r"params\[0\].*indices", change)


def test_shape_of_the_values():
    def change(lists):
        lists[2][1] = torch.ones(20, 4)

    refused("adamw_rows_", RuntimeError, r"params\[1\].*\[20, 4\].*\[40, 3\]", change)


@pytest.mark.indices_checked_at_once
@pytest.mark.parametrize("index", [-1, 7, 2**62, -(2**63)])
@pytest.mark.parametrize("name", ["sign_momentum_rows_", "adamw_rows_"])
def test_row_index_out_of_range(name, index):
    def change(lists):
        lists[1][2][0, 13] = index

    refused(name, IndexError, rf"params\[2\].*{index}\b.*\b7 rows", change)


def test_layout_of_the_gradient():
    def change(lists):
        lists[1][0] = torch.eye(12)[:, :5].to_sparse_csr()

    refused("sign_momentum_dense_", (RuntimeError, NotImplementedError), r"[Cc]sr", change)


def test_parameter_with_shared_memory():
    def change(lists):
        lists[0][0] = torch.ones(1, 5).expand(12, 5)

    refused("sign_momentum_dense_", RuntimeError, r"params\[0\].*\[12, 5\].*same memory", change)


def test_schemas_say_what_is_written():
    for name in NAMES:
        schema = getattr(OPS, name).default._schema
        mutated = {a.name for a in schema.arguments if a.is_write}
        expected = {"params", "exp_avgs"}
        if name.startswith("adamw"):
            expected |= {"exp_avg_sqs", "steps"}
        assert mutated == expected
        assert not schema.returns


@pytest.mark.parametrize("name", NAMES)
def test_compiled_by_aot_autograd(name):
    lists, hyper = sample(name)
    copies = [[t.clone() for t in tensors] for tensors in lists]

    def call(lists):
        getattr(OPS, name)(*lists, **hyper)
        return lists[0][0] + 1

    torch._dynamo.reset()
    result = torch.compile(call, backend="aot_eager", fullgraph=True)(copies)
    expected = call(lists)
    assert same_bits(result, expected)
    assert all(same_bits(a, b) for a, b in zip(written(lists, name), written(copies, name)))


def test_gradients_of_other_dtypes_are_read_as_they_are():
    p = torch.zeros(4)
    m = torch.zeros(4)
    g = torch.tensor([1.0, -2.0, 0.0, 3.0], dtype=torch.float16)
    OPS.sign_momentum_dense_([p], [g], [m], lr=0.5, beta1=0.0, beta2=0.0, weight_decay=0.5)
    assert p.tolist() == [-0.5, 0.5, 0.0, -0.5]
    assert m.tolist() == [1.0, -2.0, 0.0, 3.0]
    q = Parameter(torch.zeros(4))
    set_grad(q, g)
    tiger_ext.Lion([q], lr=0.5, betas=(0.0, 0.0), weight_decay=0.5).step()
    assert same_bits(q, p)
