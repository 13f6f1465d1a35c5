"""Progress bars."""

from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store
from tqdm import tqdm

from callbacks.protocols import ImageRequests, datamodule, require

BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}]"


def shows_progress(trainer: pl.Trainer) -> bool:
    """Whether this process shows progress bars: rank zero, unless ``trainer.enable_progress_bar`` is false."""
    return trainer.is_global_zero and trainer.progress_bar_callback is not None


class SamplingProgress(pl.Callback):
    """Show the number of sampled images, images per second and the remaining time, over all ranks.

    Images of earlier runs count as done, but not for the speed. The bar replaces Lightning's in ``predict`` and is
    disabled together with it (``--trainer.enable_progress_bar false``). List it after ``ImageWriter``, which waits for
    all ranks at the end, so that the bar ends with the images of all ranks.
    """

    def __init__(self) -> None:
        super().__init__()
        self._bar: Any = None
        self._store: dist.Store | None = None
        self._counted, self._before, self._runs = 0, 0, 0
        self._muted: Any = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check the data, and disable Lightning's bar.

        Raises:
            ValueError: if the data of ``predict`` requests no images.
        """
        self._runs += 1
        if stage != "predict":
            return
        require(ImageRequests, datamodule(trainer), self)
        if shows_progress(trainer):
            self._muted = trainer.progress_bar_callback
            self._muted.disable()

    def on_predict_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show the bar, after sampling has been compiled."""
        data = require(ImageRequests, datamodule(trainer), self)
        total = len(data.labels)
        self._counted, self._before = 0, total - data.left
        # Ranks count in the store of the process group: unlike a collective, it makes no rank wait.
        shared = dist.is_available() and dist.is_initialized()
        self._store = dist.PrefixStore(f"images of run {self._runs}", _get_default_store()) if shared else None
        self._bar = tqdm(
            desc="sampling",
            total=total,
            initial=self._before,
            unit=" images",
            smoothing=0,
            dynamic_ncols=True,
            bar_format=BAR,
            disable=self._muted is None,
        )

    def _count(self, images: int) -> None:
        if self._store is not None:
            self._counted = self._store.add("sampled", images)
        else:
            self._counted += images
        # Ranks of a sharded model may sample an image twice, to have equal numbers of batches.
        self._bar.update(min(self._before + self._counted, self._bar.total) - self._bar.n)

    def on_predict_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: dict[str, Any],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count the images of a batch."""
        self._count(len(batch["index"]))

    def on_predict_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show the images of all ranks."""
        self._count(0)
        self._close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Close the bar without completing it, and enable Lightning's again."""
        self._close()
        self._unmute()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Enable Lightning's bar again."""
        self._unmute()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _unmute(self) -> None:
        if self._muted is not None:
            self._muted.enable()
            self._muted = None
