"""Cross entropy of a linear head that never holds all logits. N rows, D width, V vocabulary."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

MAX_LOGITS = 1 << 24
"""Logits that are held at a time: 64 MiB in float32."""
CACHED_LOGITS = 1 << 20
"""Of them, logits that a CPU turns into probabilities at a time: 4 MiB in float32."""


class CrossEntropy(NamedTuple):
    """Results of :func:`linear_cross_entropy`.

    Attributes:
        loss: scalar float32, what is minimised: the mean over rows, with label smoothing and z-loss.
        nats: scalar float32, the mean cross entropy alone, without a gradient.
    """

    loss: Tensor
    nats: Tensor


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    max_logits: int = MAX_LOGITS,
) -> CrossEntropy:
    """Mean cross entropy of ``hidden @ weight.T``, some rows at a time.

    The gradient is made on the way, while the logits of a few rows are at hand, so that they are computed once and kept
    nowhere. Matrix products are in the dtype of autocast, all else in float32.

    Args:
        hidden: (N, D).
        weight: (V, D), of the head.
        targets: (N,) int64.
        label_smoothing: share of the target probability that is spread over all entries (Szegedy et al., 2016).
        z_loss: weight of the squared logarithm of the partition function, which keeps logits small (PaLM, 2022).
        max_logits: that may be held at a time.
    """
    loss, nats = _LinearCrossEntropy.apply(hidden, weight, targets, label_smoothing, z_loss, max_logits)
    return CrossEntropy(loss, nats)


class TokenNLL(NamedTuple):
    """Results of :func:`linear_token_nll`.

    Attributes:
        nats: (N,) float32, cross entropy of each row.
        rank: (N,) int64, how many entries have larger logits than the target: 0 if it is the first guess.
    """

    nats: Tensor
    rank: Tensor


@torch.no_grad()
def linear_token_nll(hidden: Tensor, weight: Tensor, targets: Tensor, max_logits: int = MAX_LOGITS) -> TokenNLL:
    """How well each row of ``hidden @ weight.T`` predicts its target, some rows at a time; without a gradient.

    Args:
        hidden: (N, D).
        weight: (V, D), of the head.
        targets: (N,) int64.
        max_logits: that may be held at a time.
    """
    nats, rank = [], []
    rows = max(1, max_logits // len(weight))
    for part, target in zip(hidden.split(rows), targets.split(rows), strict=True):
        logits = F.linear(part, weight.to(part.dtype)).float()
        of_target = logits.gather(1, target[:, None])
        nats.append((logits.logsumexp(-1, keepdim=True) - of_target)[:, 0])
        rank.append((logits > of_target).sum(-1))
    return TokenNLL(torch.cat(nats), torch.cat(rank))


def _to_gradient(logits: Tensor, target: Tensor, label_smoothing: float, z_loss: float) -> CrossEntropy:
    """Turn logits (N, V), in place, into the gradient of the sum over rows; that sum, with and without what is added.

    It is not divided by the number of rows: in float16 it would vanish.
    """
    wide = logits.float()  # themselves, where they are float32
    of_target = wide.gather(1, target)
    of_all = wide.mean(-1, keepdim=True) if label_smoothing else of_target
    # In place, and exp once: what is left are the probabilities, which the gradient needs.
    largest = wide.amax(-1, keepdim=True)
    total = wide.sub_(largest).exp_().sum(-1, keepdim=True)
    partition = total.log() + largest
    surprise = partition - of_target
    each = surprise.lerp(partition - of_all, label_smoothing) if label_smoothing else surprise
    loss = (each + z_loss * partition.square() if z_loss else each).sum()
    wide.mul_((1.0 + 2.0 * z_loss * partition) / total if z_loss else total.reciprocal())
    wide.scatter_add_(1, target, torch.full_like(partition, label_smoothing - 1.0))
    if label_smoothing:
        wide -= label_smoothing / wide.shape[1]
    if wide is not logits:
        logits.copy_(wide)
    return CrossEntropy(loss, surprise.sum())


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        label_smoothing: float,
        z_loss: float,
        max_logits: int,
    ) -> tuple[Tensor, Tensor]:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        head = weight.to(dtype)
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        hidden_gradient = torch.empty_like(hidden, dtype=dtype) if wants_hidden else None
        weight_gradient: Tensor | None = None
        loss, nats = hidden.new_zeros((), dtype=torch.float32), hidden.new_zeros((), dtype=torch.float32)
        rows = max(1, max_logits // len(weight))
        if dtype is torch.float16:  # or the sum over rows could be too large for it
            rows = min(rows, 1024)
        # On CPUs what is done in float32 stays in the cache; on GPUs a kernel wants as much as there is.
        rows_at_once = max(1, CACHED_LOGITS // len(weight)) if device == "cpu" else rows
        with torch.autocast(device, enabled=False):
            for first in range(0, len(hidden), rows):
                part, target = hidden[first : first + rows].to(dtype), targets[first : first + rows, None]
                logits = F.linear(part, head)
                for piece, wanted in zip(logits.split(rows_at_once), target.split(rows_at_once), strict=True):
                    terms = _to_gradient(piece, wanted, label_smoothing, z_loss)
                    loss += terms.loss
                    nats += terms.nats
                if hidden_gradient is not None:
                    torch.mm(logits, head, out=hidden_gradient[first : first + rows])
                if not wants_weight:
                    continue
                product = logits.T @ part
                if weight_gradient is None:
                    weight_gradient = product if len(hidden) <= rows else product.float()
                else:
                    weight_gradient += product
        ctx.save_for_backward(hidden_gradient, weight_gradient)
        ctx.dtypes = hidden.dtype, weight.dtype
        ctx.count = len(hidden)
        nats /= len(hidden)
        ctx.mark_non_differentiable(nats)
        return loss / len(hidden), nats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, loss_gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        scale = loss_gradient / ctx.count
        gradients = [
            None if gradient is None else gradient.to(dtype, copy=True).mul_(scale)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*gradients, None, None, None, None)
