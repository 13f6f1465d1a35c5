"""Fields of requests. Each description begins with what to give, which error messages repeat: ``WHAT: meaning``."""

from difflib import get_close_matches
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from llamagen.sampling.config import Schedule
from serving.engine.checks import MAX_INDEX, MAX_PROMPT
from serving.server.errors import ApiError

MAX_STEPS = 2**20
SEEDS = -(2**63), 2**63 - 1
TEMPERATURES = 0.001, 10.0
"""Temperatures above 0. Logits divided by smaller ones are not finite."""

Format = Literal["png", "jpeg", "webp"]
_Steps = Annotated[int, Field(ge=0, le=MAX_STEPS)]


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    model: str | None = Field(None, description="the name of the served model: optional")
    response_format: Literal["b64_json", "url"] | None = Field(
        None, description="b64_json or url: whether the answer holds the images (default) or links to them"
    )
    output_format: Format | None = Field(None, description="png, jpeg or webp: format of the images, default png")
    output_compression: Annotated[int, Field(ge=0, le=100)] | None = Field(
        None, description="an integer from 0 to 100: quality of jpeg and webp, default 95"
    )
    user: str | None = Field(None, max_length=1000, description="a text of at most 1000 characters: ignored")


class GenerationBody(_Body):
    """Body of ``POST /v1/images/generations``."""

    prompt: int | Annotated[str, Field(max_length=MAX_PROMPT)] = Field(
        description=f"a class name, the number of a class, or a text of at most {MAX_PROMPT} characters: what to "
        "generate"
    )
    n: Annotated[int, Field(ge=1)] | None = Field(None, description="an integer from 1: number of images, default 1")
    size: str | None = Field(None, description="auto or the size of the model's images: optional")
    seed: Annotated[int, Field(ge=SEEDS[0], le=SEEDS[1])] | None = Field(
        None, description="an integer of 64 bits: equal seeds give equal images; default is a random one"
    )
    index: Annotated[int, Field(ge=0, le=MAX_INDEX)] | None = Field(
        None, description=f"an integer from 0 to {MAX_INDEX}: index of the first image, default 0"
    )
    stream: bool | None = Field(None, description="true or false: whether to send rows as they are finished")
    partial_images: Annotated[int, Field(ge=0, le=100)] | None = Field(
        None, description="an integer from 0 to 100: previews of each image in a stream; by default all rows"
    )
    quality: Literal["auto", "standard"] | None = Field(None, description="auto: other values do not exist here")
    background: Literal["auto", "opaque"] | None = Field(
        None, description="auto or opaque: other values do not exist here"
    )
    moderation: Literal["auto", "low"] | None = Field(None, description="auto or low: there is no moderation")
    style: Literal["natural"] | None = Field(None, description="natural: other values do not exist here")
    image: str | None = Field(
        None, description="a PNG, JPEG or WebP file in base64, or as a data URL: image to complete"
    )
    keep_rows: _Steps | None = Field(
        None, description="an integer from 0 to the number of rows of codes: upper rows of codes of image to keep"
    )
    mask: str | None = Field(
        None,
        description="a PNG file in base64, or as a data URL: pixels of image that are transparent in it are generated "
        "again, in place of keep_rows",
    )
    guidance_scale: Annotated[float, Field(ge=0, le=100)] | None = Field(
        None, description="a number from 0 to 100: scale of classifier-free guidance; 1 is none"
    )
    guidance_schedule: Schedule | None = Field(
        None, description="constant, linear, cosine or power_cosine: guidance over the codes of an image"
    )
    guidance_start: _Steps | None = Field(
        None, description=f"an integer from 0 to {MAX_STEPS}: index of the first code that is guided"
    )
    guidance_steps: _Steps | None = Field(
        None,
        description=f"an integer from 0 to {MAX_STEPS}, or null: index of the first code that is no longer guided; "
        "null guides all codes to the end",
    )
    guidance_power: Annotated[float, Field(ge=0.01, le=100)] | None = Field(
        None, description="a number from 0.01 to 100: exponent of the schedule power_cosine"
    )
    temperature: Annotated[float, Field(ge=0, le=TEMPERATURES[1])] | None = Field(
        None, description="0, or a number from 0.001 to 10: temperature of sampling; 0 takes the most likely codes"
    )
    top_k: _Steps | None = Field(
        None, description=f"an integer from 0 to {MAX_STEPS}: number of codes to sample from; 0 is all"
    )
    top_p: Annotated[float, Field(ge=0.0001, le=1)] | None = Field(
        None, description="a number from 0.0001 to 1: probability of the codes to sample from; 1 is all"
    )


class ReconstructionBody(_Body):
    """Body of ``POST /v1/images/reconstructions``."""

    image: str = Field(description="a PNG, JPEG or WebP file in base64, or as a data URL: image to encode and decode")


Body = TypeVar("Body", bound=_Body)


def check_fields(kind: type[Body], content: dict[str, Any]) -> Body:
    """Check the fields of a request, one by one.

    Raises:
        ApiError: with status 400, one sentence, and the name of the first field that is wrong.
    """
    fields = kind.model_fields
    if (name := next((each for each in content if each not in fields), None)) is not None:
        near = get_close_matches(name[:60], fields, 1, 0.6)
        hint = f"did you mean {near[0]}?" if near else f"the fields are {', '.join(fields)}"
        raise ApiError(400, f"there is no field {name!r:.60}; {hint}", name[:60], "unknown_field")
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    name = str(first["loc"][0])
    wanted = what_to_give(kind, name)
    if first["type"] == "missing":
        raise ApiError(400, f"the field {name} is missing; give {wanted}", name, "missing_field")
    raise ApiError(400, f"{name} is {shown(content[name])}; give {wanted}", name, "invalid_value")


def what_to_give(kind: type[BaseModel], name: str) -> str:
    """The valid values of a field, for error messages."""
    return str(kind.model_fields[name].description).partition(":")[0]


def shown(value: Any) -> str:
    """A value of a client in an error message, shortened and without control characters."""
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str) and len(value) > 60:
        return f"{value[:40]!r}… ({len(value)} characters)"
    return repr(value)[:200]
