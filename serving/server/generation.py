"""From the fields of a request to a request of the backend."""

import base64
import binascii
import secrets
from dataclasses import dataclass
from typing import Any

from llamagen.sampling import IMAGE_SETTINGS, SamplingConfig
from serving.engine.checks import MAX_INDEX
from serving.engine.facts import ModelFacts
from serving.engine.requests import ImageRequest, ReconstructionRequest, Request
from serving.engine.uploads import has_transparency, image_size, read_mask
from serving.image_settings import ImageSettings, Kind
from serving.server.errors import ApiError
from serving.server.fields import TEMPERATURES, Format, GenerationBody, ReconstructionBody, shown, what_to_give
from serving.server.options import ServerOptions

NEW_SEEDS = 2**31
"""Seeds that the server chooses are smaller, so that every program can hold them."""


@dataclass(frozen=True)
class Order:
    """A request with what its answer needs.

    Attributes:
        request: request of the backend.
        output_format: format of the images.
        quality: quality of JPEG and WebP, 0 to 100.
        as_url: whether images are stored and linked.
        partial_images: number of previews of each image in a stream; None for all rows.
        stream: whether rows are sent as they are finished.
        is_edit: whether it came to ``POST /v1/images/edits``, whose events have names of their own.
    """

    request: Request
    output_format: Format = "png"
    quality: int = 95
    as_url: bool = False
    partial_images: int | None = None
    stream: bool = False
    is_edit: bool = False

    def settings(self, facts: ModelFacts, position: int) -> ImageSettings | None:
        """What an image was generated from; None for a reconstruction."""
        request = self.request
        if not isinstance(request, ImageRequest):
            return None
        return ImageSettings(
            model=facts.name,
            kind=_kind(request),
            conditions=(request.conditions[position],),
            images_per_prompt=max(request.indices) + 1,
            seed=request.seed,
            index=request.indices[position],
            keep_rows=request.keep_rows,
            settings=request.settings.image_settings(),
        )


def generation_order(body: GenerationBody, facts: ModelFacts, options: ServerOptions, is_edit: bool = False) -> Order:
    """Check the fields of ``POST /v1/images/generations`` or ``/v1/images/edits`` against the model.

    Args:
        body: the fields.
        facts: the model.
        options: limits.
        is_edit: whether they are those of an edit, in which the transparency of ``image`` replaces a missing mask.

    Raises:
        ApiError: with status 400 or 404, and one sentence.
    """
    _check_model(body.model, facts)
    if facts.resolution is None or facts.grid is None:
        raise _wrong("model", f"{facts.name} is a tokenizer, which generates no images; it only reconstructs")
    count, first = body.n or 1, body.index or 0
    if count > options.max_images:
        raise _wrong("n", f"n is {count}; give an integer from 1 to {options.max_images}")
    if first + count - 1 > MAX_INDEX:
        raise _wrong("index", f"index is {first}; give at most {MAX_INDEX + 1 - count} with n = {count}")
    if body.size not in (None, "auto", size := f"{facts.resolution}x{facts.resolution}"):
        raise _wrong("size", f"size is {shown(body.size)}; give auto or {size}")
    if body.stream and body.response_format == "url":
        raise _wrong("response_format", "a stream holds the images themselves; give response_format b64_json")
    if body.partial_images is not None and not body.stream:
        raise _wrong("partial_images", "partial_images needs a stream; add stream true, or leave it out")
    condition = _condition(body.prompt, facts)
    settings = _settings(body, facts)
    image, keep_rows = _kept(body, facts.grid, is_edit)
    is_masked = is_edit or body.mask is not None
    mask = None if image is None or not is_masked else _mask(body.mask, image, facts)
    previews = bool(body.stream) and body.partial_images != 0
    seed = secrets.randbelow(NEW_SEEDS) if body.seed is None else body.seed
    indices = tuple(range(first, first + count))
    request = ImageRequest((condition,) * count, indices, seed, settings, image, keep_rows, previews, mask)
    return Order(request, *_output(body, options), body.partial_images, bool(body.stream), is_edit)


def reconstruction_order(body: ReconstructionBody, facts: ModelFacts, options: ServerOptions) -> Order:
    """Check the fields of ``POST /v1/images/reconstructions``.

    Raises:
        ApiError: with status 400 or 404, and one sentence.
    """
    _check_model(body.model, facts)
    return Order(ReconstructionRequest(_file(body.image)), *_output(body, options))


def _check_model(name: str | None, facts: ModelFacts) -> None:
    if name not in (None, facts.name):
        raise ApiError(
            404, f"there is no model {shown(name)}; this server has {facts.name}", "model", "model_not_found"
        )


def _condition(prompt: int | str, facts: ModelFacts) -> int | str:
    if facts.kind == "class":
        longest = max(map(len, facts.classes + facts.class_ids), default=0) + 20
        # Footgun: near names of a text of many words take seconds to find.
        if isinstance(prompt, str) and len(prompt) > longest:
            raise _wrong("prompt", f"prompt has {len(prompt)} characters; give the name or the number of a class")
        try:
            return facts.class_names.find(prompt)
        except ValueError as error:
            raise _wrong("prompt", str(error)) from error
    if isinstance(prompt, int):
        raise _wrong("prompt", f"prompt is {prompt}; this model generates images of texts, give a text")
    if not prompt.strip():
        raise _wrong("prompt", "prompt is empty; give a text")
    if any(ord(each) < 32 and each not in "\t\n\r" for each in prompt):
        raise _wrong("prompt", "prompt holds control characters; give a text")
    return prompt


def _settings(body: GenerationBody, facts: ModelFacts) -> SamplingConfig:
    given: dict[str, Any] = {
        name: getattr(body, name)
        for name in IMAGE_SETTINGS
        if name in body.model_fields_set and (getattr(body, name) is not None or name == "guidance_steps")
    }
    low, high = TEMPERATURES
    if 0.0 < given.get("temperature", 0.0) < low:
        raise _wrong("temperature", f"temperature is {body.temperature}; give 0, or a number from {low:g} to {high:g}")
    try:
        return facts.settings(given)
    except ValueError as error:
        raise _wrong(next((name for name in given if name in str(error)), None), str(error)) from error


def _kept(body: GenerationBody, grid: int, is_edit: bool) -> tuple[bytes | None, int]:
    """File of an image to complete, and how many rows of its codes are kept."""
    if body.image is None:
        if body.keep_rows is not None:
            raise _wrong("keep_rows", "keep_rows needs an image to keep rows of; add image, or leave it out")
        if body.mask is not None:
            raise _wrong("mask", "mask needs an image to keep a part of; add image, or leave it out")
        return None, 0
    if is_edit or body.mask is not None:
        if body.keep_rows is not None:
            raise _wrong("keep_rows", "keep_rows cannot be combined with a mask; leave one of them out")
        return _file(body.image), 0
    if body.keep_rows is None or body.keep_rows > grid:
        value = "missing" if body.keep_rows is None else str(body.keep_rows)
        raise _wrong("keep_rows", f"keep_rows is {value}; give an integer from 0 to {grid}, the rows of image to keep")
    return _file(body.image), body.keep_rows


def _mask(text: str | None, image: bytes, facts: ModelFacts) -> tuple[int, ...]:
    """Codes that are generated again. None stands for the image's own transparency."""
    assert facts.resolution is not None
    assert facts.grid is not None
    if not facts.can_inpaint:
        raise _wrong("mask", f"{facts.name} generates in raster order only here, so it cannot inpaint; give keep_rows")
    try:
        size = image_size(image)
    except ValueError as error:
        raise _wrong("image", str(error)) from error
    if text is None and not has_transparency(image):
        message = "the field mask is missing, and image is not a PNG with transparency; give a mask, a PNG whose "
        raise ApiError(400, f"{message}transparent pixels are generated again", "mask", "missing_field")
    try:
        return read_mask(image if text is None else _file(text, "mask"), size, facts.resolution, facts.grid)
    except ValueError as error:
        raise _wrong("mask", str(error)) from error


def _kind(request: ImageRequest) -> Kind:
    if request.image is None:
        return "generation"
    return "completion" if request.mask is None else "inpainting"


def _file(text: str, name: str = "image") -> bytes:
    """The file in base64, or in a data URL."""
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        file = base64.b64decode(text.encode("ascii"), validate=True)
    except (binascii.Error, UnicodeEncodeError):
        raise _wrong(name, f"{name} is not valid base64; give {what_to_give(GenerationBody, name)}") from None
    if not file:
        raise _wrong(name, f"{name} is empty; give {what_to_give(GenerationBody, name)}")
    return file


def _output(body: GenerationBody | ReconstructionBody, options: ServerOptions) -> tuple[Format, int, bool]:
    as_url = body.response_format == "url"
    if as_url and not options.has_urls:
        raise _wrong("response_format", "this server stores no images; give response_format b64_json")
    output_format = body.output_format or "png"
    if body.output_compression not in (None, 100) and output_format == "png":
        raise _wrong(
            "output_compression", "output_compression is for jpeg and webp; leave it out, or give another format"
        )
    return output_format, 95 if body.output_compression is None else body.output_compression, as_url


def _wrong(param: str | None, message: str) -> ApiError:
    return ApiError(400, message, param, "invalid_value")
