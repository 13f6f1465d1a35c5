"""Warnings to the user, once and not from every rank, also where Lightning is not imported."""

import warnings

from lightning_utilities.core.rank_zero import rank_zero_only


def warn_on_rank_zero(message: str) -> None:
    """Warn on the first rank. Lightning says which that is; a process without Lightning has no other ranks."""
    if getattr(rank_zero_only, "rank", None) in (None, 0):
        warnings.warn(message, stacklevel=3)
