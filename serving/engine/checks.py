"""Checks of a request before it is accepted, with what the front knows of the model."""

from dataclasses import replace

from llamagen.option_checks import check_integer
from serving.engine.facts import ModelFacts
from serving.engine.requests import ImageRequest, Request

MAX_INDEX = 2**31 - 1
"""Maximum index of an image."""
MAX_PROMPT = 1000
"""Maximum number of characters of a prompt that people send; a model reads 120 tokens of it."""


def check_request(request: Request, facts: ModelFacts) -> Request:
    """Check a request, and replace names of classes by their numbers.

    Args:
        request: what is asked.
        facts: of the model.

    Raises:
        ValueError: in one line, if the model cannot generate it.
    """
    if not isinstance(request, ImageRequest):
        return request
    if facts.kind == "tokenizer" or facts.grid is None:
        raise ValueError(f"{facts.name} is a tokenizer, which only reconstructs images; ask a model for images")
    if not request.conditions:
        raise ValueError("there are no images in the request; ask for at least 1")
    if len(request.indices) != len(request.conditions):
        raise ValueError(
            f"there are {len(request.indices)} indices for {len(request.conditions)} images; give one for each"
        )
    if isinstance(request.seed, bool) or not isinstance(request.seed, int):
        raise ValueError(f"seed is {request.seed!r:.40}; it must be an integer")
    for index in request.indices:
        check_integer("index", index, 0, MAX_INDEX)
    if request.image is None and request.keep_rows:
        raise ValueError(f"keep_rows is {request.keep_rows}, but there is no image; give one, or leave keep_rows out")
    check_integer("keep_rows", request.keep_rows, 0, facts.grid)
    if request.mask is not None:
        _check_mask(request, request.mask, facts)
    return replace(request, conditions=tuple(_condition(each, facts) for each in request.conditions))


def _check_mask(request: ImageRequest, mask: tuple[int, ...], facts: ModelFacts) -> None:
    if not facts.can_inpaint:
        raise ValueError(
            f"{facts.name} generates in raster order only here, so it cannot inpaint; keep the upper rows of the image "
            "with keep_rows"
        )
    if request.image is None or request.keep_rows:
        raise ValueError("a mask needs an image, and no keep_rows; give an image to inpaint")
    for code in mask:
        check_integer("mask", code, 0, (facts.grid or 0) ** 2 - 1)
    if len(set(mask)) != len(mask):
        raise ValueError("the mask names a code twice; name each once")


def _condition(condition: int | str, facts: ModelFacts) -> int | str:
    if facts.kind == "class":
        return facts.class_names.find(condition)
    if not isinstance(condition, str):
        raise ValueError(f"{condition!r:.40} is not a prompt; {facts.name} is text-conditional, give a text")
    return condition
