"""A callback that puts a NaN into an image."""

from typing import Any

import lightning.pytorch as pl


class Poison(pl.Callback):
    """Puts a NaN into an image of one batch of training or prediction.

    Args:
        batch: index of the batch.
        rank: rank whose batch gets the NaN.
    """

    def __init__(self, batch: int, rank: int = 0) -> None:
        super().__init__()
        self.batch, self.rank = batch, rank

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: dict[str, Any], batch_idx: int) -> None:
        """Poison the batch."""
        if batch_idx == self.batch and trainer.global_rank == self.rank:
            batch["images"][0, ..., 0, 0, 0] = float("nan")

    def on_predict_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, *_: Any) -> None:
        """Poison the batch."""
        self.on_train_batch_start(trainer, pl_module, batch, batch_idx)
