"""The settings of an image inside its PNG file.

The text chunk :data:`KEY` holds a JSON object, so that any program that shows PNG texts shows them.
``serving/page/image_settings.py`` reads it.
"""

import io
import json
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

from PIL import Image
from PIL.PngImagePlugin import PngInfo

KEY = "llamagen"
FORMAT = "llamagen-lightning image 1"

Kind = Literal["generation", "completion", "inpainting"]


@dataclass(frozen=True)
class ImageSettings:
    """Everything that an image was generated from.

    Attributes:
        model: name of the model.
        kind: a whole image, or the completion or inpainting of another one.
        conditions: numbers of classes, or prompts, of the request.
        images_per_prompt: images of each condition.
        seed: seed of the request.
        index: index of the image within the request.
        keep_rows: rows of codes kept of the completed image.
        settings: all settings of :data:`~llamagen.sampling.config.IMAGE_SETTINGS`.
    """

    model: str
    kind: Kind
    conditions: tuple[int | str, ...]
    images_per_prompt: int
    seed: int
    index: int
    keep_rows: int
    settings: dict[str, Any]


def png_file(image: Image.Image, settings: ImageSettings, condition: str, dtype: str) -> bytes:
    """PNG file with the settings inside.

    Args:
        image: the image.
        settings: what it was generated from.
        condition: its class or prompt, for people who read the file.
        dtype: precision of the model, for the same.
    """
    text = {"format": FORMAT, "version": _version(), "condition": condition, "dtype": dtype, **asdict(settings)}
    info = PngInfo()
    info.add_itxt(KEY, json.dumps(text, ensure_ascii=False))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


@cache  # reads a file
def _version() -> str:
    try:
        return version("llamagen-lightning")
    except PackageNotFoundError:  # not installed, but run from its folder
        return "unknown"
