"""Parts of a request: each is a call of a replica."""

from dataclasses import replace

from serving.engine.requests import Finished, ImageRequest, Request, Rows

CALLS_PER_BATCH = 4
"""Calls that fill a batch if each has as many images as it may."""


def images_per_call(batch_size: int) -> int:
    """Maximum number of images of a call.

    Few, so that replicas share a large request, and so that the number of calls, which Ray Serve counts, says how much
    there is to do; not one, so that a call costs little.
    """
    return max(batch_size // CALLS_PER_BATCH, 1)


def part_of(request: Request, positions: tuple[int, ...]) -> Request:
    """The same request for some of its images only."""
    if not isinstance(request, ImageRequest):
        return request
    return replace(
        request,
        conditions=tuple(request.conditions[position] for position in positions),
        indices=tuple(request.indices[position] for position in positions),
    )


def images_of(event: Rows | Finished) -> tuple[int, ...]:
    """Images that an event reports."""
    return event.images if isinstance(event, Rows) else (event.image,)
