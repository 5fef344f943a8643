# SPDX-License-Identifier: Apache-2.0
"""Modules."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["TiedEmbedding"]


class TiedEmbedding(nn.Module):
    r"""One weight for a language model's input and output.

    ``forward`` looks rows up, ``logits`` multiplies a hidden state with all of them. Plain tying
    makes a model that has learned little predict its own input: the hidden state still resembles
    the embedding that went in, and an embedding is most similar to itself. With ``swap_halves`` the
    two halves of the hidden state's channels change places before the product,
    :math:`h \to (h_{d/2:},\, h_{:d/2})`, so that this similarity means nothing. Source: Su 2023,
    kexue.fm/archives/9698.

    The output's gradient reaches every row, so the weight's gradient is dense: an optimizer updates
    it as it does any other matrix, and no row is ever untouched.

    Args:
        num_embeddings: rows of the weight.
        embedding_dim: columns; even if the halves are swapped.
        swap_halves: swap them; False is plain tying.
        device, dtype: of the weight.

    Attributes:
        weight: ``[num_embeddings, embedding_dim]``, initialised from a normal distribution of
            standard deviation ``embedding_dim ** -0.5``, so that the logits of a normalised hidden
            state have variance 1.

    Raises:
        ValueError: ``embedding_dim`` is odd and the halves are to be swapped.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        swap_halves: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """See the class."""
        super().__init__()
        if swap_halves and embedding_dim % 2 != 0:
            raise ValueError(
                f"embedding_dim={embedding_dim}: expected an even number, because swap_halves=True"
            )
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.swap_halves = swap_halves
        self.weight = nn.Parameter(
            torch.empty(num_embeddings, embedding_dim, device=device, dtype=dtype)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight anew."""
        nn.init.normal_(self.weight, std=max(self.embedding_dim, 1) ** -0.5)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the rows ``[*ids.shape, embedding_dim]`` of integer ``ids`` of any shape."""
        return F.embedding(ids, self.weight)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return ``[..., num_embeddings]`` for a hidden state ``[..., embedding_dim]``.

        The hidden state should be normalised by the model (a final LayerNorm or RMSNorm): nothing
        is normalised here.
        """
        if self.swap_halves:
            hidden = hidden.roll(self.embedding_dim // 2, -1)
        return F.linear(hidden, self.weight)

    def extra_repr(self) -> str:
        """Return what ``repr`` shows."""
        return f"{self.num_embeddings}, {self.embedding_dim}, swap_halves={self.swap_halves}"
