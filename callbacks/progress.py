"""How far a run that draws images is."""

from typing import Any, Protocol, cast

import lightning.pytorch as pl
import numpy as np
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store
from tqdm import tqdm

BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}]"


class CountedRequests(Protocol):
    """A DataModule that knows how many images are to be drawn."""

    @property
    def labels(self) -> np.ndarray:
        """Class of each image, those that are there included."""

    @property
    def left(self) -> int:
        """How many images were not there when the run was started."""


class SamplingProgress(pl.Callback):
    """Show how many images there are, how many come in a second, and the time left, over all ranks.

    Images that were there before count as done, but not for the speed. The bar takes the place of Lightning's in
    ``predict``, and is off where that is: ``--trainer.enable_progress_bar false``. List it behind ``ImageWriter``,
    whose ranks wait for each other at the end, so that it then shows the images of all.
    """

    def __init__(self) -> None:
        super().__init__()
        self._bar: Any = None
        self._store: dist.Store | None = None
        self._counted, self._before, self._runs = 0, 0, 0
        self._muted: Any = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Silence Lightning's bar."""
        self._runs += 1
        if stage == "predict" and trainer.is_global_zero and trainer.progress_bar_callback is not None:
            self._muted = trainer.progress_bar_callback
            self._muted.disable()

    def on_predict_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show the bar, when sampling has been compiled."""
        data = cast(CountedRequests, trainer.datamodule)  # type: ignore[attr-defined]
        total = len(data.labels)
        self._counted, self._before = 0, total - data.left
        # Ranks count in the store by which they have found each other, which none has to wait for.
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
            self._counted = self._store.add("drawn", images)
        else:
            self._counted += images
        # Ranks that wait for each other may draw an image again.
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
        """Show what all ranks have drawn."""
        self._count(0)
        self._close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave the bar as it is."""
        self._close()
        self._unmute()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Give Lightning's bar back."""
        self._unmute()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _unmute(self) -> None:
        if self._muted is not None:
            self._muted.enable()
            self._muted = None
