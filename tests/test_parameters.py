# SPDX-License-Identifier: Apache-2.0
"""Which tensors an optimizer takes: layouts, one tensor twice, memory that two of them share."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import Parameter

from tiger_ext import AdamW, Lion, Tiger, parameters

every_class = pytest.mark.parametrize("cls", [Tiger, Lion, AdamW], ids=lambda c: c.__name__)
SPARSE = {
    "coo": torch.Tensor.to_sparse,
    "csr": torch.Tensor.to_sparse_csr,
    "csc": torch.Tensor.to_sparse_csc,
    "bsr": lambda t: t.to_sparse_bsr((2, 2)),
    "bsc": lambda t: t.to_sparse_bsc((2, 2)),
}


@every_class
@pytest.mark.parametrize("layout", SPARSE)
@pytest.mark.filterwarnings("ignore:Sparse")
def test_sparse_parameters_are_refused_by_name_and_layout(cls, layout):
    p = Parameter(SPARSE[layout](torch.eye(4)))
    good = Parameter(torch.ones(3))
    with pytest.raises(ValueError, match=rf"'table' .*{p.layout}.*strided"):
        cls([("good", good), ("table", p)])
    opt = cls([good])
    with pytest.raises(ValueError, match=rf"group 1, position 0.*{p.layout}"):
        opt.add_param_group({"params": p})
    assert len(opt.param_groups) == 1


# ------------------------------------------------------------------------------ one tensor twice


@every_class
def test_one_tensor_twice_in_a_group_is_refused(cls):
    p, q = Parameter(torch.ones(3)), Parameter(torch.ones(3))
    with pytest.raises(ValueError, match=r"position 0\).*position 2\).*one tensor.*list it once"):
        cls([p, q, p])
    with pytest.raises(ValueError, match=r"'a' .*'b' .*one tensor"):
        cls([("a", p), ("b", p)])
    opt = cls([q])
    with pytest.raises(ValueError, match=r"group 1, position 0.*group 1, position 1"):
        opt.add_param_group({"params": [p, p]})
    assert len(opt.param_groups) == 1
    with pytest.raises(ValueError, match="more than one parameter group"):
        opt.add_param_group({"params": [q]})


# --------------------------------------------------------------------------------- shared memory


def overlapping():
    """Return named pairs of tensors with at least one element in common."""
    flat = torch.zeros(64)
    matrix = torch.zeros(6, 8)
    return {
        "the same": (flat, flat.view(8, 8)),
        "slices": (flat[:10], flat[9:20]),
        "within": (flat, flat[5]),
        "transposed": (matrix, matrix.T),
        "columns": (matrix[:, :4], matrix[:, 3:]),
        "row and column": (matrix[2], matrix[:, 5]),
        "every second and third": (flat[::2], flat[::3]),
        "another dtype": (flat[4:8], flat.view(torch.float64)[3:5]),
    }


@every_class
@pytest.mark.parametrize("name", overlapping())
def test_parameters_that_share_memory_are_refused_by_name(cls, name):
    a, b = map(Parameter, overlapping()[name])
    between = Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=r"'a' .*position 0.*'b' .*position 2.*share memory.*one"):
        cls([("a", a), ("between", between), ("b", b)])
    with pytest.raises(ValueError, match=r"group 0, position 0.*group 1, position 1"):
        cls([{"params": [b]}, {"params": [between, a]}])
    opt = cls([("a", a)])
    with pytest.raises(ValueError, match=r"'a' \(group 0, position 0.*'b' \(group 1, position 1"):
        opt.add_param_group({"params": [("between", between), ("b", b)]})
    assert len(opt.param_groups) == 1
    opt.add_param_group({"params": [("between", between)]})


def disjoint():
    """Return named lists of tensors within one storage, without an element in common."""
    flat = torch.zeros(64)
    matrix = torch.zeros(6, 8)
    triples = torch.zeros(5, 3, 4)
    return {
        "flat": list(flat.split([10, 1, 33, 20])),
        "columns": [matrix[:, :4], matrix[:, 4:7], matrix[:, 7]],
        "every second": [flat[::2], flat[1::2]],
        "middle dimension": list(triples.unbind(1)),
        "transposed": [matrix[:, :4].T, matrix[:, 4:].T],
        "between the rows": [matrix[::2], matrix[1::2].T, flat],
        "two dtypes": [flat[:2], flat.view(torch.float64)[1:], matrix],
        "interleaved dtypes": [
            matrix[:, ::2][:, :1],
            matrix.view(torch.float64)[:, 2],
            matrix.view(torch.bfloat16)[:, 2:4],
        ],
    }


@every_class
@pytest.mark.parametrize("name", disjoint())
def test_parameters_beside_one_another_in_a_buffer_are_legal(cls, name):
    params = list(map(Parameter, disjoint()[name]))
    opt = cls(params)
    assert len(opt.param_groups[0]["params"]) == len(params)
    opt = cls(params[:1])
    for p in params[1:]:
        opt.add_param_group({"params": p})
    for p in params:
        p.grad = torch.ones_like(p)
    opt.step()


def elements(t):
    """Return the addresses of a tensor's bytes."""
    first = torch.zeros(t.shape, dtype=torch.int64)
    for d, (n, stride) in enumerate(zip(t.shape, t.stride())):
        first += (torch.arange(n) * stride).reshape(-1, *[1] * (t.dim() - d - 1))
    start = t.data_ptr()
    return {start + e * t.itemsize + b for e in first.flatten().tolist() for b in range(t.itemsize)}


@given(st.data())
@settings(max_examples=200)
def test_sharing_is_what_a_list_of_all_addresses_says(data):
    buffer = torch.zeros(120)
    views = []
    for _ in range(data.draw(st.integers(2, 4))):
        dims = data.draw(st.integers(0, 3))
        sizes = data.draw(st.lists(st.integers(1, 4), min_size=dims, max_size=dims))
        strides = data.draw(st.lists(st.integers(1, 12), min_size=dims, max_size=dims))
        dtype = data.draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16]))
        whole = buffer.view(dtype)
        t = whole.as_strided(sizes, strides, data.draw(st.integers(0, 12)))
        if len(elements(t)) == t.numel() * t.itemsize:  # does not share with itself
            views.append(Parameter(t))
    if not views:
        return
    sets = [elements(v) for v in views]
    if sum(map(len, sets)) == len(set().union(*sets)):
        Tiger(views)
    else:
        with pytest.raises(ValueError, match="share memory") as caught:
            Tiger(views)
        a, b = map(int, re.findall(r"position (\d)", str(caught.value)))
        assert sets[a] & sets[b]


def test_frozen_parameters_share_with_whom_they_like():
    p = Parameter(torch.ones(4))
    twin = Parameter(p.data, requires_grad=False)
    opt = Tiger([p, twin])
    p.grad = torch.ones(4)
    opt.step()
    assert torch.equal(p, twin)


def test_a_parameter_that_thaws_counts_when_the_next_group_is_added():
    p = Parameter(torch.ones(4))
    twin = Parameter(p.data, requires_grad=False)
    opt = Tiger([("p", p), ("twin", twin)])
    opt.add_param_group({"params": [("a", Parameter(torch.ones(2)))]})
    twin.requires_grad_()
    with pytest.raises(ValueError, match=r"'p' \(group 0.*'twin' \(group 0.*share memory"):
        opt.add_param_group({"params": [("b", Parameter(torch.ones(2)))]})
    twin.requires_grad_(False)
    opt.add_param_group({"params": [("b", Parameter(torch.ones(2)))]})


@every_class
def test_one_frozen_tensor_twice_is_refused_too(cls):
    p = Parameter(torch.ones(3), requires_grad=False)
    with pytest.raises(ValueError, match=r"position 0\).*position 1\).*one tensor"):
        cls([p, p])


def test_a_fault_of_the_check_is_not_taken_for_a_tensor_without_memory(monkeypatch):
    def fail(t):
        raise RuntimeError("a fault")

    monkeypatch.setattr(parameters, "_extent", fail)
    with pytest.raises(RuntimeError, match="a fault"):
        Tiger([Parameter(torch.ones(3))])


def test_the_default_device_does_not_matter():
    matrix = torch.zeros(6, 8)
    left, right, beyond = (Parameter(t) for t in (matrix[:, :4], matrix[:, 4:], matrix[:, 3:]))
    with torch.device("meta"):
        Tiger([left, right])
        with pytest.raises(ValueError, match="share memory"):
            Tiger([left, beyond])


def test_what_has_no_memory_shares_none():
    def freed():
        p = Parameter(torch.zeros(16)[8:])
        p.untyped_storage().resize_(0)
        return p

    jagged = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)
    nested = Parameter(torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(3, 3)]))
    with FakeTensorMode():
        fake = [Parameter(torch.ones(3)) for _ in range(2)]
    for params in (
        fake,
        [Parameter(torch.ones(3, device="meta")) for _ in range(2)],
        [Parameter(torch.zeros(5)[:0]) for _ in range(2)],
        [freed(), freed(), Parameter(torch.ones(2))],
        [*nn.LazyLinear(3).parameters(), Parameter(torch.ones(2))],
        [jagged.requires_grad_()],
        [nested, Parameter(nested.detach())],
        [Parameter(nested.detach().transpose(1, 2)), Parameter(torch.ones(2))],
        [Parameter(torch.ones(4, 4).to_mkldnn()), Parameter(torch.ones(2))],
    ):
        opt = Tiger(params)
        opt.add_param_group({"params": [Parameter(torch.ones(2))]})
        assert len(opt.param_groups[0]["params"]) == len(params)


def test_subclasses_with_memory_count(monkeypatch):
    class Special(Parameter):
        pass

    flat = torch.zeros(8)
    Tiger([Special(flat[:4]), Special(flat[4:])])
    with pytest.raises(ValueError, match="share memory"):
        Tiger([Special(flat[:4]), Special(flat[3:])])


def test_memory_is_only_looked_at_closely_where_intervals_overlap(monkeypatch):
    monkeypatch.setattr(parameters, "_sharing", lambda crowd: pytest.fail("looked closely"))
    Tiger(list(map(Parameter, torch.zeros(4_000).split(4))))
    Tiger([{"params": [Parameter(torch.zeros(2, 3))]} for _ in range(200)])


def test_the_memory_of_all_groups_is_gone_through_once(monkeypatch):
    seen = []
    original = parameters._extent
    monkeypatch.setattr(parameters, "_extent", lambda t: seen.append(t) or original(t))
    opt = Tiger([{"params": [Parameter(torch.zeros(2))]} for _ in range(50)])
    assert len(seen) == 50
    opt.add_param_group({"params": [Parameter(torch.zeros(2))]})
    assert len(seen) == 101
