"""Cross entropy of codes that linear heads predict, each head a factor. N rows, D width, V outputs of a head."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from llamagen.losses.linear_cross_entropy import CrossEntropy, TokenNLL, linear_cross_entropy, linear_token_nll


class HeadTerm(NamedTuple):
    """What one head predicts.

    Attributes:
        hidden: (N, D), input of the head.
        head: the head, without a bias.
        targets: (N,) int64 in [0, V).
    """

    hidden: Tensor
    head: nn.Linear
    targets: Tensor


def heads_cross_entropy(terms: Sequence[HeadTerm], label_smoothing: float = 0.0, z_loss: float = 0.0) -> CrossEntropy:
    """Sum the cross entropies of all heads, see :func:`~llamagen.losses.linear_cross_entropy`.

    The probability of a code is the product of the probabilities of its factors, so the sum of their cross entropies is
    that of the code. Label smoothing and z-loss apply to each head.

    Args:
        terms: the heads, at least one.
        label_smoothing: fraction of the target probability spread over the entries of a head.
        z_loss: weight of the squared log partition function of each head.
    """
    parts = [
        linear_cross_entropy(term.hidden, term.head.weight, term.targets, label_smoothing, z_loss) for term in terms
    ]
    loss, nats = parts[0]
    for part in parts[1:]:
        loss, nats = loss + part.loss, nats + part.nats
    return CrossEntropy(loss, nats)


def heads_token_nll(terms: Sequence[HeadTerm]) -> TokenNLL:
    """Cross entropy of each code over all heads, and the largest of its ranks; no gradient.

    With several heads, rank 0 means that each head finds its target the most likely one, given the targets of the heads
    before it: so the code is the one that greedy decoding gives. The rank among all codes would need the probability of
    each of them. A rank below 5 means that each target is among the five most likely of its head.

    Args:
        terms: the heads, at least one.
    """
    parts = [linear_token_nll(term.hidden, term.head.weight, term.targets) for term in terms]
    return TokenNLL(
        torch.stack([part.nats for part in parts]).sum(0), torch.stack([part.rank for part in parts]).amax(0)
    )
