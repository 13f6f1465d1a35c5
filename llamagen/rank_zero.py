"""Warnings on the first rank only, without importing Lightning."""

import sys
import warnings


def warn_on_rank_zero(message: str) -> None:
    """Warn the user on the first rank.

    ``rank_zero_warn`` of Lightning raises an error in a process that has not imported Lightning, such as a notebook.
    Code that also runs there calls this function instead.
    """
    if _rank() == 0:
        warnings.warn(message, stacklevel=3)


def _rank() -> int:
    from torch import distributed  # imported here because processes that read shards may not need PyTorch

    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank()
    # Lightning sets the rank before the ranks are connected. Without this module, no Lightning has set it.
    lightning = sys.modules.get("lightning_utilities.core.rank_zero")
    return getattr(getattr(lightning, "rank_zero_only", None), "rank", None) or 0
