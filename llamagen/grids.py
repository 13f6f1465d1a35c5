"""Grids of pictures, and figures, as PNG files."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from llamagen.whole_file import whole_file

MARGIN = 2


def grid_image(rows: list[list[np.ndarray]]) -> Image.Image:
    """Pictures in rows, on grey.

    Args:
        rows: (H, W, 3) uint8 pictures of one size; rows may be of unequal length.
    """
    height, width, _ = rows[0][0].shape
    columns = max(len(row) for row in rows)
    canvas = np.full(
        (len(rows) * (height + MARGIN) + MARGIN, columns * (width + MARGIN) + MARGIN, 3), 128, dtype=np.uint8
    )
    for r, row in enumerate(rows):
        for c, picture in enumerate(row):
            top, left = MARGIN + r * (height + MARGIN), MARGIN + c * (width + MARGIN)
            canvas[top : top + height, left : left + width] = picture
    return Image.fromarray(canvas)


def figure_image(figure: Any) -> Image.Image:
    """A matplotlib ``Figure`` as a picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())


def save_png(image: Image.Image, path: Path) -> None:
    """Write a PNG, whole or not at all; its folder is made if it does not exist."""
    with whole_file(path) as temporary:
        image.save(temporary, format="png")
