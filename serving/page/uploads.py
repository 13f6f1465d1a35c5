"""Images that visitors upload. They are untrusted."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from llamagen.pretrained.inpainting import masks_of_codes
from serving.engine.facts import ModelFacts
from serving.engine.uploads import read_image

MIN_CANVAS = 256
"""Minimum side in pixels of an image to paint on."""


def read_upload(path: str | None, facts: ModelFacts) -> Image.Image:
    """Read an image, cropped and resized as the model sees it.

    Args:
        path: file of a visitor; None if there is none.
        facts: the model of the page.

    Returns:
        RGB image, whose sides are multiples of the tokenizer's downsampling factor.

    Raises:
        ValueError: in one line, if it cannot be read.
    """
    if path is None:
        raise ValueError("there is no image; choose one first")
    name = f"the file {Path(path).name}"
    try:
        file = Path(path).read_bytes()
    except FileNotFoundError as error:
        raise ValueError(f"{name} is no longer kept; choose it again") from error
    return read_image(file, facts.resolution, facts.downsampling, name)


def to_png(image: Image.Image) -> bytes:
    """PNG file of an image. A backend reads the same pixels from it."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)  # it is sent to a process or a machine nearby
    return buffer.getvalue()


def to_canvas(image: Image.Image) -> Image.Image:
    """An image to paint on: small ones are enlarged by an integer factor, without interpolation."""
    factor = -(-MIN_CANVAS // image.width)
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def painted_codes(editor: Mapping[str, Any] | None, facts: ModelFacts) -> tuple[int, ...]:
    """Numbers of the codes of an image that a visitor has painted over.

    Args:
        editor: value of an image editor whose background is that of :func:`to_canvas`.
        facts: the model of the page.

    Raises:
        ValueError: in one line, if nothing is painted.
    """
    layers = [np.asarray(layer.convert("RGBA"))[..., 3] > 0 for layer in (editor or {}).get("layers", ())]
    assert facts.resolution is not None
    assert facts.grid is not None
    painted = [layer for layer in layers if layer.any()]
    if not painted:
        raise ValueError("nothing is painted; paint over the part of the image to generate again")
    masks = masks_of_codes(
        [sum(painted) > 0], [np.empty((*painted[0].shape, 3), np.uint8)], facts.resolution, facts.grid
    )
    return tuple(masks.flatten().nonzero()[:, 0].tolist())


def mask_file(codes: tuple[int, ...], facts: ModelFacts) -> bytes:
    """PNG file of the size of the model's images, transparent where codes are generated again."""
    assert facts.grid is not None
    alpha = np.full(facts.grid**2, 255, np.uint8)
    alpha[list(codes)] = 0
    alpha = alpha.reshape(facts.grid, facts.grid).repeat(facts.downsampling, 0).repeat(facts.downsampling, 1)
    return to_png(Image.fromarray(np.stack([np.zeros_like(alpha)] * 3 + [alpha], -1)))


def mark_cut(image: Image.Image, rows: int, factor: int) -> Image.Image:
    """Show which part of an image is kept: a line below it, and the rest faded.

    Args:
        image: the image.
        rows: kept rows of codes.
        factor: pixels per code.
    """
    pixels = np.array(image)
    cut = rows * factor
    pixels[cut:] = pixels[cut:] // 4 + 144
    if 0 < cut < len(pixels):
        pixels[max(cut - max(1, len(pixels) // 128), 0) : cut] = (220, 38, 38)
    return Image.fromarray(pixels)
