"""Cross entropy of a linear head, computed without storing all logits. N rows, D width, V vocabulary."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

MAX_LOGITS = 1 << 24
"""Maximum number of logits in memory at a time: 64 MiB in float32. More if that is less than MIN_ROWS rows."""
MIN_ROWS = 512
"""Each block of rows reads the head and adds to its gradient: with fewer rows, that takes longer than the products."""
CACHED_LOGITS = 1 << 20
"""Number of logits that a CPU converts to probabilities at a time: 4 MiB in float32."""


def block_rows(vocabulary: int, max_logits: int | None = None) -> int:
    """Number of rows whose logits are in memory at a time.

    Args:
        vocabulary: V.
        max_logits: maximum number of logits in memory at a time; None for the larger of 2 ** 24 and those of 512 rows.
    """
    return max(MIN_ROWS, MAX_LOGITS // vocabulary) if max_logits is None else max(1, max_logits // vocabulary)


class CrossEntropy(NamedTuple):
    """Results of :func:`linear_cross_entropy`.

    Attributes:
        loss: scalar float32, mean over rows, including label smoothing and z-loss.
        nats: scalar float32, the mean cross entropy without them, in nats; no gradient.
    """

    loss: Tensor
    nats: Tensor


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    max_logits: int | None = None,
) -> CrossEntropy:
    """Compute the mean cross entropy of the logits ``hidden @ weight.T`` in blocks of rows.

    The forward pass also computes the gradient, block by block, so logits are computed once and never stored. Matrix
    products use the dtype of autocast, everything else float32.

    Args:
        hidden: (N, D).
        weight: (V, D), weight of the head.
        targets: (N,) int64.
        label_smoothing: fraction of the target probability spread over the vocabulary (arXiv 1512.00567, section 7).
        z_loss: weight of the squared log partition function, which keeps logits small (arXiv 2204.02311, section 5).
        max_logits: see :func:`block_rows`.

    Returns:
        Loss with gradient, and mean cross entropy in nats, both scalar float32.
    """
    rows = block_rows(len(weight), max_logits)
    loss, nats = _LinearCrossEntropy.apply(hidden, weight, targets, label_smoothing, z_loss, rows)
    return CrossEntropy(loss, nats)


class TokenNLL(NamedTuple):
    """Results of :func:`linear_token_nll`.

    Attributes:
        nats: (N,) float32, cross entropy of each row in nats.
        rank: (N,) int64, number of entries with larger logits than the target: 0 if the target is the most likely.
    """

    nats: Tensor
    rank: Tensor


@torch.no_grad()
def linear_token_nll(hidden: Tensor, weight: Tensor, targets: Tensor, max_logits: int | None = None) -> TokenNLL:
    """Compute cross entropy and rank of each row's target in ``hidden @ weight.T``; no gradient.

    Args:
        hidden: (N, D).
        weight: (V, D), weight of the head.
        targets: (N,) int64.
        max_logits: see :func:`block_rows`.

    Returns:
        Cross entropy in nats (N,) float32, and rank (N,) int64.
    """
    nats, rank = [], []
    rows = block_rows(len(weight), max_logits)
    for part, target in zip(hidden.split(rows), targets.split(rows), strict=True):
        logits = F.linear(part, weight.to(part.dtype)).float()
        target_logit = logits.gather(1, target[:, None])
        nats.append((logits.logsumexp(-1, keepdim=True) - target_logit)[:, 0])
        rank.append((logits > target_logit).sum(-1))
    return TokenNLL(torch.cat(nats), torch.cat(rank))


def _to_gradient(logits: Tensor, target: Tensor, label_smoothing: float, z_loss: float) -> CrossEntropy:
    """Overwrite logits (N, V) with the gradient of the loss summed over rows; return the sums of loss and nats.

    footgun: the gradient is not divided by the number of rows, which would underflow in float16.
    """
    wide = logits.float()  # not a copy if they are float32
    target_logit = wide.gather(1, target)
    mean_logit = wide.mean(-1, keepdim=True) if label_smoothing else target_logit
    # In place, with a single exp: afterwards ``wide`` holds the unnormalised probabilities that the gradient needs.
    largest = wide.amax(-1, keepdim=True)
    total = wide.sub_(largest).exp_().sum(-1, keepdim=True)
    partition = total.log() + largest
    nll = partition - target_logit
    each = nll.lerp(partition - mean_logit, label_smoothing) if label_smoothing else nll
    loss = (each + z_loss * partition.square() if z_loss else each).sum()
    wide.mul_((1.0 + 2.0 * z_loss * partition) / total if z_loss else total.reciprocal())
    wide.scatter_add_(1, target, torch.full_like(partition, label_smoothing - 1.0))
    if label_smoothing:
        wide -= label_smoothing / wide.shape[1]
    if wide is not logits:
        logits.copy_(wide)
    return CrossEntropy(loss, nll.sum())


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        label_smoothing: float,
        z_loss: float,
        rows: int,
    ) -> tuple[Tensor, Tensor]:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        head = weight.to(dtype)
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        hidden_gradient = torch.empty_like(hidden, dtype=dtype) if wants_hidden else None
        weight_gradient: Tensor | None = None
        loss, nats = hidden.new_zeros((), dtype=torch.float32), hidden.new_zeros((), dtype=torch.float32)
        if dtype is torch.float16:  # footgun: the sum over more rows could overflow
            rows = min(rows, 1024)
        # On CPUs float32 work should stay in the cache; on GPUs larger kernels are faster.
        rows_at_once = max(1, CACHED_LOGITS // len(weight)) if device == "cpu" else rows
        with torch.autocast(device, enabled=False):
            for first in range(0, len(hidden), rows):
                part, target = hidden[first : first + rows].to(dtype), targets[first : first + rows, None]
                logits = F.linear(part, head)
                pieces = zip(logits.split(rows_at_once), target.split(rows_at_once), strict=True)
                for piece, piece_target in pieces:
                    terms = _to_gradient(piece, piece_target, label_smoothing, z_loss)
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
