"""Figures and images in the run's folder and in loggers that accept images."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
from PIL import Image

from llamagen.grids import save_png


def batches_seen(trainer: pl.Trainer) -> int:
    """Batches that a rank has trained on: the x axis of everything that is logged."""
    return trainer.fit_loop.epoch_loop.total_batch_idx + 1


def new_figure(width: float, height: float) -> Any:
    """An empty matplotlib figure.

    It is made without pyplot, which has global state and may open windows.

    Args:
        width: width in inches.
        height: height in inches.
    """
    from matplotlib.figure import Figure  # slow to import

    return Figure(figsize=(width, height), layout="constrained")


def publish(trainer: pl.Trainer, image: Image.Image, name: str) -> None:
    """Save an image as ``<run folder>/<name>/step_<batches seen>.png`` and pass it to loggers that accept images.

    Args:
        trainer: its ``default_root_dir`` is the run's folder.
        image: the grid or figure.
        name: name of the image's content and folder, for example ``"samples"``.
    """
    step = batches_seen(trainer)
    save_png(image, Path(trainer.default_root_dir) / name / f"step_{step:07d}.png")
    for logger in trainer.loggers:
        if hasattr(logger, "log_image"):
            logger.log_image(key=name, images=[image], step=step)
        elif add_image := getattr(getattr(logger, "experiment", None), "add_image", None):
            add_image(name, np.array(image), step, dataformats="HWC")
