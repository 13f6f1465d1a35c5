"""Which codes of an image are hard to predict, as an image."""

from math import isqrt
from pathlib import Path
from typing import Any, Protocol, cast

import lightning.pytorch as pl
import numpy as np
from lightning_utilities.core.rank_zero import rank_zero_only
from PIL import Image
from torch import Tensor

from callbacks.figures import batches_seen, publish
from llamagen.files import atomic_file
from llamagen.grids import figure_image


class PredictsCodes(Protocol):
    """A module that knows how well it predicted each code, over all ranks."""

    nats_by_position: dict[str, Tensor]
    """Cross entropy (L,) in nats, by stage: ``val``, ``test``, ``val_raw`` if the raw weights were validated, too."""


class PositionLoss(pl.Callback):
    """At each validation and test: the cross entropy of each code of an image, as a map and as a curve.

    ``positions/step_<batches seen>.png`` in the run's folder, and beside it the numbers as ``.csv``.
    """

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse a module that predicts no codes.

        Raises:
            ValueError: in one line.
        """
        if not hasattr(pl_module, "nats_by_position"):
            raise ValueError(
                f"{type(pl_module).__name__} predicts no codes; leave PositionLoss out of trainer.callbacks"
            )

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw the numbers of this validation."""
        if not trainer.sanity_checking:
            self._publish(trainer, pl_module)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw the numbers of this test."""
        self._publish(trainer, pl_module)

    @rank_zero_only
    def _publish(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        found = cast(PredictsCodes, pl_module).nats_by_position
        nats = {stage: each.cpu().numpy() for stage, each in found.items()}
        publish(trainer, position_image(nats), "positions")
        side = isqrt(len(next(iter(nats.values()))))
        lines = [",".join(["position", "row", "column", *nats])]
        for position, values in enumerate(zip(*nats.values(), strict=True)):
            lines.append(",".join([f"{position},{position // side},{position % side}", *(f"{v:.6g}" for v in values)]))
        with atomic_file(
            Path(trainer.default_root_dir) / "positions" / f"step_{batches_seen(trainer):07d}.csv"
        ) as temporary:
            temporary.write_text("\n".join(lines) + "\n")


def position_image(nats: dict[str, np.ndarray]) -> Image.Image:
    """A map and a curve for each stage.

    Args:
        nats: by stage, (L,) cross entropy of the codes in raster order, L a square number.
    """
    # Without pyplot: no global state, no window system. Imported here for its start-up time.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6 * len(nats)), layout="constrained")
    for row, (stage, each) in enumerate(sorted(nats.items())):
        left: Any = figure.add_subplot(len(nats), 2, 2 * row + 1)
        shown = left.imshow(each.reshape(isqrt(len(each)), -1))
        left.set_title(f"{stage}: nats by place, mean {each.mean():.3f}")
        figure.colorbar(shown, ax=left)
        right: Any = figure.add_subplot(len(nats), 2, 2 * row + 2)
        right.plot(np.arange(len(each)), each, marker="." if len(each) < 100 else None)
        right.set_title(f"{stage}: nats by position")
        right.set_xlabel("position in raster order")
    return figure_image(figure)
