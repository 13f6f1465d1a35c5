"""Warnings on the first rank only, without importing Lightning."""

import warnings

from lightning_utilities.core.rank_zero import rank_zero_only


def warn_on_rank_zero(message: str) -> None:
    """Warn the user on the first rank.

    Lightning's ``rank_zero_warn`` raises an error if Lightning has not set the rank. Without Lightning there is only
    one rank, so this function then warns.
    """
    if getattr(rank_zero_only, "rank", None) in (None, 0):
        warnings.warn(message, stacklevel=3)
