# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torch.testing import assert_close

from tiger_ext.nn import TiedEmbedding


@pytest.mark.parametrize("swap", [True, False])
@pytest.mark.parametrize("shape", [(), (3,), (2, 5)])
def test_lookup_and_logits(swap, shape):
    tied = TiedEmbedding(11, 6, swap_halves=swap)
    ids = torch.randint(11, shape)
    assert torch.equal(tied(ids), tied.weight[ids])
    hidden = torch.randn(*shape, 6)
    swapped = torch.cat([hidden[..., 3:], hidden[..., :3]], -1) if swap else hidden
    assert_close(tied.logits(hidden), swapped @ tied.weight.T)
    assert [name for name, _ in tied.named_parameters()] == ["weight"]


def test_swapping_takes_away_the_bias_towards_the_input():
    plain, swapped = TiedEmbedding(500, 64, False), TiedEmbedding(500, 64)
    swapped.weight = plain.weight
    ids = torch.arange(500)
    assert (plain.logits(plain(ids)).argmax(1) == ids).float().mean() > 0.9
    assert (swapped.logits(swapped(ids)).argmax(1) == ids).float().mean() < 0.1


def test_odd_dimensions():
    with pytest.raises(ValueError, match=r"7.*even"):
        TiedEmbedding(10, 7)
    TiedEmbedding(10, 7, swap_halves=False).logits(torch.randn(7))


def test_the_gradient_of_both_uses_arrives():
    tied = TiedEmbedding(5, 4, dtype=torch.float64)
    tied.logits(tied(torch.tensor([1]))).sum().backward()
    assert tied.weight.grad.abs().min() > 0
    assert "swap_halves=True" in repr(tied)
