"""Which codes are in use, as an image."""

from typing import Any, Protocol, cast

import lightning.pytorch as pl
import numpy as np
from lightning_utilities.core.rank_zero import rank_zero_only
from PIL import Image
from torch import Tensor

from callbacks.figures import publish
from llamagen.grids import figure_image


class CountsCodes(Protocol):
    """A module that knows how often each code was used, over all ranks."""

    code_counts: dict[str, Tensor]
    """Counts (K,) int64 of the last training epoch (``train``) and the last validation (``val``)."""


class CodebookHistogram(pl.Callback):
    """At each validation: how often each code was used, the most frequent first, and how many are dead.

    The image is ``codebook/step_<batches seen>.png`` in the run's folder.
    """

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse a module that has no codebook.

        Raises:
            ValueError: in one line.
        """
        if not hasattr(pl_module, "code_counts"):
            raise ValueError(
                f"{type(pl_module).__name__} has no codebook; leave CodebookHistogram out of trainer.callbacks"
            )

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw the counts of this validation and of the last training epoch."""
        if not trainer.sanity_checking:
            self._draw(trainer, cast(CountsCodes, pl_module).code_counts)

    @rank_zero_only
    def _draw(self, trainer: pl.Trainer, counts: dict[str, Tensor]) -> None:
        publish(trainer, histogram({stage: each.cpu().numpy() for stage, each in counts.items()}), "codebook")


def histogram(counts: dict[str, np.ndarray]) -> Image.Image:
    """Counts of codes, sorted, one panel for each stage.

    Args:
        counts: by stage, (K,) integers.
    """
    # Without pyplot: no global state, no window system. Imported here for its start-up time.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 2.8 * len(counts)), layout="constrained")
    for position, (stage, each) in enumerate(sorted(counts.items())):
        axes: Any = figure.add_subplot(len(counts), 1, position + 1)
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
