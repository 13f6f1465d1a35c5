"""Cross entropy of each code position, as a figure and a table. L codes of an image."""

from math import isqrt
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
from lightning_utilities.core.rank_zero import rank_zero_only
from PIL import Image

from callbacks.figures import batches_seen, new_figure, publish
from callbacks.protocols import PredictsCodes, require
from llamagen.files import atomic_file
from llamagen.grids import figure_image


class PositionLoss(pl.Callback):
    """At each validation and test, plot the cross entropy of each code position as a map and as a curve.

    The figure is ``positions/step_<batches seen>.png`` in the run's folder, with the values in a ``.csv`` of the same
    name.
    """

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check the module.

        Raises:
            ValueError: if it predicts no codes.
        """
        require(PredictsCodes, pl_module, self)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Plot the values of this validation."""
        if not trainer.sanity_checking:
            self._publish(trainer, pl_module)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Plot the values of this test."""
        self._publish(trainer, pl_module)

    @rank_zero_only
    def _publish(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        by_stage = require(PredictsCodes, pl_module, self).nats_by_position
        nats = {stage: each.cpu().numpy() for stage, each in by_stage.items()}
        publish(trainer, position_image(nats), "positions")
        side = isqrt(len(next(iter(nats.values()))))
        lines = [",".join(["position", "row", "column", *nats])]
        for position, values in enumerate(zip(*nats.values(), strict=True)):
            lines.append(",".join([f"{position},{position // side},{position % side}", *(f"{v:.6g}" for v in values)]))
        table = Path(trainer.default_root_dir) / "positions" / f"step_{batches_seen(trainer):07d}.csv"
        with atomic_file(table) as temporary:
            temporary.write_text("\n".join(lines) + "\n")


def position_image(nats: dict[str, np.ndarray]) -> Image.Image:
    """Plot a map and a curve for each stage.

    Args:
        nats: for each stage the cross entropy of the codes in raster order, (L,) floats; L is a square number.
    """
    figure = new_figure(10, 3.6 * len(nats))
    for row, (stage, each) in enumerate(sorted(nats.items())):
        left = figure.add_subplot(len(nats), 2, 2 * row + 1)
        shown = left.imshow(each.reshape(isqrt(len(each)), -1))
        left.set_title(f"{stage}: nats on the code grid, mean {each.mean():.3f}")
        figure.colorbar(shown, ax=left)
        right = figure.add_subplot(len(nats), 2, 2 * row + 2)
        right.plot(np.arange(len(each)), each, marker="." if len(each) < 100 else None)
        right.set_title(f"{stage}: nats by position")
        right.set_xlabel("position in raster order")
    return figure_image(figure)
