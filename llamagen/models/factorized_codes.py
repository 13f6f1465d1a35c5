"""Factorised prediction for large vocabularies: a code is a pair of numbers, predicted one after the other.

The code is ``a * V2 + b`` with a in [0, V1) and b in [0, V2). The first head predicts a from the hidden state h, the
second one b from h and a, so ``p(code) = p(a | h) p(b | h, a)``: any distribution over the V codes, without a matrix of
V rows. This is the asymmetric factorisation of Open-MAGVIT2 (arXiv 2409.04410), whose halves differ in kind: b is
predicted with a known, and a without b.

Shapes: N rows, V1 and V2 sizes of the two factors, V = V1 · V2 vocabulary size, D model width.
"""

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from llamagen.models.gpt_config import GPTConfig
from llamagen.models.transformer_block import FeedForward, RMSNorm

MAX_PAIRS = 1 << 13
"""Number of pairs of a row and a first factor for which joint probabilities are computed at a time."""


def split_codes(codes: Tensor, second_size: int) -> tuple[Tensor, Tensor]:
    """Split codes of any shape, integers in [0, V), into a and b of the same shape."""
    return codes.div(second_size, rounding_mode="floor"), codes.remainder(second_size)


def joined_codes(first: Tensor, second: Tensor, second_size: int) -> Tensor:
    """The codes ``first * V2 + second``: the inverse of :func:`split_codes`."""
    return first * second_size + second


class FactorizedEmbedding(nn.Module):
    """Embedding of a code: the sum of an embedding of a and one of b.

    Args:
        factors: V1 and V2.
        dim: D.
    """

    def __init__(self, factors: tuple[int, int], dim: int) -> None:
        super().__init__()
        self.first, self.second = (nn.Embedding(size, dim) for size in factors)

    def forward(self, codes: Tensor) -> Tensor:
        """(…,) → (…, D)."""
        first, second = split_codes(codes, self.second.num_embeddings)
        return cast(Tensor, self.first(first) + self.second(second))


class SecondFactor(nn.Module):
    """Prediction of b from the hidden state and a: an embedding of a is added, then a feed-forward block, then a head.

    Args:
        config: shape of the model, with ``code_factors``.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        assert config.code_factors is not None
        first, second = config.code_factors
        self.embedding = nn.Embedding(first, config.dim)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.feed_forward = FeedForward(config)
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = nn.Linear(config.dim, second, bias=False)

    def features(self, hidden: Tensor, first: Tensor) -> Tensor:
        """Input of the head.

        Args:
            hidden: (…, D), normalised hidden states, see :meth:`llamagen.models.gpt.GPT.features`.
            first: (…,) integers in [0, V1), the first factor of each code.

        Returns:
            (…, D).
        """
        x = hidden + self.embedding(first)
        return cast(Tensor, self.norm(x + self.feed_forward(self.ffn_norm(x))))

    def forward(self, hidden: Tensor, first: Tensor) -> Tensor:
        """Logits (…, V2) of b; see :meth:`features` for the arguments."""
        return cast(Tensor, self.output(self.features(hidden, first)))


def joint_log_probabilities(first_head: Callable[[Tensor], Tensor], second: SecondFactor, hidden: Tensor) -> Tensor:
    """Logarithms of the probabilities of all codes.

    The second factor is evaluated V1 times for each row, in blocks of :data:`MAX_PAIRS` pairs. So this is for scoring
    and tests; training and sampling evaluate it once.

    Args:
        first_head: hidden states (N, D) → logits (N, V1).
        second: the second factor.
        hidden: (…, D), normalised hidden states.

    Returns:
        (…, V) float32.
    """
    rows = hidden.flatten(0, -2)
    first = first_head(rows).float().log_softmax(-1)
    size = first.shape[1]
    parts = []
    for pairs in torch.arange(len(rows) * size, device=hidden.device).split(MAX_PAIRS):
        conditional = second(rows[pairs // size], pairs % size).float().log_softmax(-1)
        parts.append(first.flatten()[pairs, None] + conditional)
    return torch.cat(parts).view(*hidden.shape[:-1], -1)
