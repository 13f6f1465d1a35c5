"""Histogram of codebook usage. K codes."""

import lightning.pytorch as pl
import numpy as np
from lightning_utilities.core.rank_zero import rank_zero_only
from PIL import Image
from torch import Tensor

from callbacks.figures import new_figure, publish
from callbacks.protocols import CountsCodes, require
from llamagen.grids import figure_image


class CodebookHistogram(pl.Callback):
    """At each validation, plot how often each code was used and how many codes are dead.

    The figure is ``codebook/step_<batches seen>.png`` in the run's folder.
    """

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check the module.

        Raises:
            ValueError: if it has no codebook.
        """
        require(CountsCodes, pl_module, self)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Plot the counts of this validation and of the last training epoch."""
        if not trainer.sanity_checking:
            self._plot(trainer, require(CountsCodes, pl_module, self).code_counts)

    @rank_zero_only
    def _plot(self, trainer: pl.Trainer, counts: dict[str, Tensor]) -> None:
        publish(trainer, histogram({stage: each.cpu().numpy() for stage, each in counts.items()}), "codebook")


def histogram(counts: dict[str, np.ndarray]) -> Image.Image:
    """Plot sorted code counts, one panel for each stage.

    Args:
        counts: for each stage the counts of the codes, (K,) integers.
    """
    figure = new_figure(7, 2.8 * len(counts))
    for position, (stage, each) in enumerate(sorted(counts.items())):
        axes = figure.add_subplot(len(counts), 1, position + 1)
        ordered, size = np.sort(each)[::-1], len(each)
        used = int((each > 0).sum())
        axes.fill_between(np.arange(used), ordered[:used], step="mid")
        axes.axvspan(used - 0.5, size - 0.5, color="tab:red", alpha=0.2)
        axes.set_xlim(-0.5, size - 0.5)
        axes.set_yscale("log")
        axes.set_ylim(bottom=0.5)
        axes.set_title(f"{stage}: {used:,} of {size:,} codes used ({used / size:.1%}), {size - used:,} dead (red)")
        axes.set_xlabel("codes, most frequent first")
        axes.set_ylabel("times used")
    return figure_image(figure)
