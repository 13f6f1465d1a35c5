"""Grids of pictures, as files in the run's folder and in the loggers that take images."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
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


def batches_seen(trainer: pl.Trainer) -> int:
    """Batches that a rank has trained on: the x axis of everything that is logged."""
    return trainer.fit_loop.epoch_loop.total_batch_idx + 1


def publish(trainer: pl.Trainer, image: Image.Image, name: str) -> None:
    """Save a picture as ``<run folder>/<name>/step_<batches seen>.png`` and show it in every logger that takes images.

    Args:
        trainer: its ``default_root_dir`` is the run's folder.
        image: the grid or figure.
        name: what it shows, for example ``"samples"``.
    """
    step = batches_seen(trainer)
    save_png(image, Path(trainer.default_root_dir) / name / f"step_{step:07d}.png")
    for logger in trainer.loggers:
        if hasattr(logger, "log_image"):
            logger.log_image(key=name, images=[image], step=step)
        elif add_image := getattr(getattr(logger, "experiment", None), "add_image", None):
            add_image(name, np.array(image), step, dataformats="HWC")
