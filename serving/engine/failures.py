"""What an error of a batch means: which of its images fail, and what their owners read."""

import logging
from collections.abc import Callable, Sequence

import torch

from llamagen.command import fault_of
from llamagen.finite import NotFiniteError
from serving.engine.engine import FailureReport, Report, Work

LOGGER = logging.getLogger("serving")
BUG = "something went wrong on the server, whose log shows what"
"""What the owner of a request reads about a bug."""
NO_MEMORY = "the server ran out of memory; try again later, or ask its operator for a smaller batch size"
"""What the owner of a request reads if there was no memory."""


def raise_if_device_failed(error: BaseException) -> None:
    """Raise an error after which this process cannot use its device.

    Raises:
        BaseException: the error. footgun: after such an error all further calls fail, too; the worker must be replaced.
    """
    if type(error).__name__ == "AcceleratorError":
        raise error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether there was no memory, of the machine or of the device."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError)


def blame(error: Exception, count: int) -> tuple[list[int], list[list[int]]]:
    """Which images of a batch an error fails.

    Args:
        error: what ended the batch.
        count: number of its images.

    Returns:
        The images that fail, by their positions in the batch, and parts of the others that should be tried again: in
        halves if it is unknown which image is to blame.

    Raises:
        Exception: the error, if the device cannot be used any more by this process.
    """
    raise_if_device_failed(error)
    if isinstance(error, NotFiniteError) and error.rows:
        failed = sorted(set(error.rows))
        others = [row for row in range(count) if row not in error.rows]
        return failed, [others] if others else []
    if count == 1 or is_out_of_memory(error):
        return list(range(count)), []
    return [], [list(range(count // 2)), list(range(count // 2, count))]


def report_failure(error: Exception, batch: Sequence[Work], report: Callable[[Report], None]) -> None:
    """Log an error, and report its images as failed.

    Owners of requests read about their own mistakes, values that are not finite, and missing memory. Messages of other
    errors may hold paths and the like, so they are in the log only.

    Args:
        error: what happened.
        batch: the images that fail; without any nothing happens.
        report: takes the report.

    Raises:
        Exception: the error, if the device cannot be used any more by this process.
    """
    raise_if_device_failed(error)
    if not batch:
        return
    fault = fault_of(error)
    if is_users := fault is not None and isinstance(error, ValueError):
        LOGGER.info("a request is invalid: %s", error)
    else:
        LOGGER.error("%d images failed", len(batch), exc_info=error)
    if fault is not None and (is_users or isinstance(error, NotFiniteError)):
        message = fault.message
    else:
        message = NO_MEMORY if is_out_of_memory(error) else BUG
    report(FailureReport(tuple(work.key for work in batch), message, is_users))
