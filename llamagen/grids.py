"""Grids of images, and figures of matplotlib, as PNG files. H × W pixels."""

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from llamagen.files import atomic_file

MARGIN = 2
MIN_CAPTIONED_WIDTH = 192
"""Minimum width in pixels of a legible caption; narrower images are enlarged."""
MAX_LINES = 3
MAX_CHARACTERS = 600  # more than fit into these lines
GAP = 8


def grid_image(rows: list[list[np.ndarray]]) -> Image.Image:
    """Arrange images in rows, on a grey background.

    Args:
        rows: (H, W, 3) uint8 images of one size; rows may have different lengths.

    Raises:
        ValueError: if there are no images, or their shapes or dtype are wrong.
    """
    height, width = _size_of(rows)
    columns = max(len(row) for row in rows)
    canvas = np.full(
        (len(rows) * (height + MARGIN) + MARGIN, columns * (width + MARGIN) + MARGIN, 3), 128, dtype=np.uint8
    )
    for r, row in enumerate(rows):
        for c, image in enumerate(row):
            top, left = MARGIN + r * (height + MARGIN), MARGIN + c * (width + MARGIN)
            canvas[top : top + height, left : left + width] = image
    return Image.fromarray(canvas)


def captioned_grid(rows: Sequence[Sequence[np.ndarray]], captions: Sequence[Sequence[str]]) -> Image.Image:
    """Arrange images in rows, each above its caption, on a white background.

    Captions are wrapped to the width of the image and truncated to three lines with an ellipsis. Images narrower than
    192 pixels are enlarged by an integer factor, without interpolation. Characters that the font (DejaVu Sans) lacks,
    such as Chinese and emoji, appear as boxes.

    Args:
        rows: (H, W, 3) uint8 images of one size; rows may have different lengths.
        captions: one caption for each image, in the same rows.

    Raises:
        ValueError: if there are no images, their shapes or dtype are wrong, or one has no caption.
    """
    height, width = _size_of(rows)
    if [len(row) for row in captions] != [len(row) for row in rows]:
        raise ValueError("there must be a caption for each image, in rows of the same lengths")
    factor = -(-MIN_CAPTIONED_WIDTH // width)
    height, width = factor * height, factor * width
    font = _font(max(12, width // 20))
    texts = [[_wrapped(caption, width, font) for caption in row] for row in captions]
    line = sum(font.getmetrics())
    heights = [height + line * max(map(len, row)) + GAP for row in texts]  # as tall as the longest caption of the row
    columns = max(map(len, rows))
    canvas = Image.new("RGB", (columns * (width + GAP) + GAP, sum(heights) + len(rows) * GAP + GAP), "white")
    draw, top = ImageDraw.Draw(canvas), GAP
    for row, row_texts, row_height in zip(rows, texts, heights, strict=True):
        for column, (image, text) in enumerate(zip(row, row_texts, strict=True)):
            left = GAP + column * (width + GAP)
            canvas.paste(Image.fromarray(image.repeat(factor, 0).repeat(factor, 1)), (left, top))
            for number, words in enumerate(text):
                draw.text((left, top + height + GAP // 2 + number * line), words, "black", font)
        top += row_height + GAP
    return canvas


def _size_of(rows: Sequence[Sequence[np.ndarray]]) -> tuple[int, int]:
    """Height and width of the images of a grid."""
    images = [image for row in rows for image in row]
    if not images:
        raise ValueError("there are no images for a grid; give at least one")
    kinds = {(str(getattr(image, "dtype", type(image).__name__)), tuple(np.shape(image))) for image in images}
    kind, shape = next(iter(kinds))
    if len(kinds) > 1 or kind != "uint8" or len(shape) != 3 or shape[2] != 3:
        listed = ", ".join(f"{kind} of {shape}" for kind, shape in sorted(kinds)[:3])
        raise ValueError(f"images of a grid must be uint8 arrays (H, W, 3) of one size, not {listed}")
    return shape[0], shape[1]


def _font(size: int) -> ImageFont.FreeTypeFont:
    # Pillow's default font lacks even accented letters; matplotlib comes with one that has them.
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"), size)


def _fitting(text: str, width: int, font: ImageFont.FreeTypeFont) -> int:
    """Number of characters of a text that fit into ``width`` pixels."""
    return bisect_right(range(1, len(text) + 1), float(width), key=lambda end: font.getlength(text[:end]))


def _wrapped(text: str, width: int, font: ImageFont.FreeTypeFont) -> list[str]:
    """Wrap a text into at most :data:`MAX_LINES` lines of at most ``width`` pixels, at spaces where possible."""
    rest, lines = " ".join(text[:MAX_CHARACTERS].split()), list[str]()
    while rest and len(lines) < MAX_LINES:
        end = max(1, _fitting(rest, width, font))
        if end < len(rest) and (space := rest.rfind(" ", 0, end + 1)) > 0:
            end = space
        lines.append(rest[:end].rstrip())
        rest = rest[end:].lstrip()
    if lines and (rest or len(text) > MAX_CHARACTERS):
        room = width - math.ceil(font.getlength("…"))
        lines[-1] = lines[-1][: _fitting(lines[-1], room, font)] + "…"
    return lines


def figure_image(figure: Any) -> Image.Image:
    """Render a matplotlib ``Figure`` as an image."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())


def save_png(image: Image.Image, path: Path | str, text: Mapping[str, str] | None = None) -> None:
    """Write a PNG atomically; its folder is created if it does not exist.

    Args:
        image: the image.
        path: the file.
        text: metadata to store, by keyword; Pillow reads it as the image's ``info``.
    """
    chunks = PngInfo()
    for keyword, value in (text or {}).items():
        chunks.add_itxt(keyword, value)
    buffer = BytesIO()
    image.save(buffer, format="png", pnginfo=chunks)
    with atomic_file(Path(path), buffer.tell()) as temporary:
        temporary.write_bytes(buffer.getbuffer())
