"""Which sample comes when: a pure function of seed and epoch, shared out over ranks, with a place to return to."""

from collections.abc import Iterator

import numpy as np


def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation of ``count`` samples for an epoch, (count,) int64, equal on every rank."""
    return np.random.default_rng([seed, epoch]).permutation(count)


def share_out(order: np.ndarray, start: int, batch_size: int, rank: int, world_size: int) -> Iterator[np.ndarray]:
    """The batches of a rank for the rest of an epoch.

    The order is cut into global batches of ``batch_size · world_size``. Each rank gets the same number of samples of
    each of them, so no rank ever waits for another; of the last, smaller one at most ``world_size − 1`` samples are
    left out.

    Args:
        order: (N,) sample numbers of the whole epoch.
        start: number of samples of it that all ranks together have consumed.
        batch_size: samples a rank and batch.
        rank: this rank.
        world_size: number of ranks.

    Yields:
        Sample numbers of a batch, (batch_size,) or fewer in the last.
    """
    step = batch_size * world_size
    for first in range(start, len(order), step):
        share = order[first : first + step]
        share = share[: len(share) // world_size * world_size]
        if len(share):
            yield share[rank::world_size]


def count_batches(count: int, batch_size: int, world_size: int) -> int:
    """Number of batches that :func:`share_out` yields for a whole epoch, the same on every rank."""
    full, rest = divmod(count, batch_size * world_size)
    return full + (rest >= world_size)
