"""The base of every DataModule that reads shards."""

from abc import abstractmethod
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import Dataset

from datamodules.loader import EvaluationLoader, TrainLoader
from datamodules.shards import Sample, find_shards, index_shard

SPLITS = ("train", "val")


class ShardDataModule(pl.LightningDataModule):
    """Shards in ``root/train`` and ``root/val``; training in a reproducible, resumable order.

    ``fit`` trains on ``train`` and validates on ``val``, ``validate`` and ``test`` read ``val``, ``predict`` reads
    both, in the order of :attr:`predict_splits`.

    Args:
        root: folder of the set.
        batch_size: samples a rank and batch.
        num_workers: processes a rank that prepare batches; 0 for none.
        seed: decides the order of each training epoch, and random choices within a sample.
    """

    hint = "give the folder that holds the shards of each split"
    """What to do if there are no shards; ends the error message."""

    predict_splits = SPLITS

    def __init__(self, root: Path | str, batch_size: int, num_workers: int = 4, seed: int = 0) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
        if num_workers < 0:
            raise ValueError(f"num_workers is {num_workers}; it must be at least 0")
        if seed < 0:
            raise ValueError(f"seed is {seed}; it must be at least 0")
        self.root, self.batch_size, self.num_workers, self.seed = Path(root), batch_size, num_workers, seed
        self.allow_zero_length_dataloader_with_multiple_devices = True  # a rank without work in predict
        self.datasets: dict[str, Dataset[Any]] = {}
        self._train_loader: TrainLoader | None = None
        self._place: dict[str, int] | None = None

    @abstractmethod
    def build_dataset(self, split: str, samples: list[Sample]) -> Dataset[Any]:
        """The dataset of a split's samples; it is asked for (number, epoch) and has a length."""

    def setup(self, stage: str) -> None:
        """Index the shards of the splits that the stage reads.

        Raises:
            ValueError: if a folder is missing, empty or damaged.
        """
        for split in ("val",) if stage in ("validate", "test") else SPLITS:
            if split not in self.datasets:
                shards = find_shards(self.root / split, self.hint)
                samples = [sample for shard in shards for sample in index_shard(shard)]
                if not samples:
                    raise ValueError(f"the shards of {self.root / split} hold no samples; {self.hint}")
                self.datasets[split] = self.build_dataset(split, samples)

    def _ranks(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)

    def train_dataloader(self) -> TrainLoader:
        """Shuffled by (seed, epoch), from the saved place if a checkpoint brought one."""
        rank, world_size = self._ranks()
        if self._train_loader is not None and self.trainer is not None and self.trainer.current_epoch > 0:
            self._place = self._train_loader.state_dict()  # reload_dataloaders_every_n_epochs
        self._train_loader = TrainLoader(
            self.datasets["train"],
            self.batch_size,
            self.num_workers,
            self.seed,
            rank,
            world_size,
            pin_memory=torch.cuda.is_available(),
        )
        if self._place is not None:
            self._train_loader.load_state_dict(self._place)
            self._place = None
        return self._train_loader

    def _evaluation_loader(self, split: str) -> EvaluationLoader:
        rank, world_size = self._ranks()
        return EvaluationLoader(
            self.datasets[split],
            self.batch_size,
            self.num_workers,
            rank,
            world_size,
            pin_memory=torch.cuda.is_available(),
        )

    def val_dataloader(self) -> EvaluationLoader:
        """The validation split, in order.

        Raises:
            ValueError: if a rank would get no sample, and so nothing to take into the mean.
        """
        count, world_size = len(self.datasets["val"]), self._ranks()[1]  # type: ignore[arg-type]
        if count < world_size:
            raise ValueError(f"{count} validation samples cannot be shared out over {world_size} ranks; use fewer")
        return self._evaluation_loader("val")

    def test_dataloader(self) -> EvaluationLoader:
        """The validation split, in order, like :meth:`val_dataloader`."""
        return self.val_dataloader()

    def predict_dataloader(self) -> list[EvaluationLoader]:
        """Each of :attr:`predict_splits`, in order."""
        return [self._evaluation_loader(split) for split in self.predict_splits]

    # Lightning restores the place of a resumable loader only if it takes the checkpoint for one from within an epoch;
    # a DataModule's state it always restores.
    def state_dict(self) -> dict[str, Any]:
        """Place of the training data."""
        if self._train_loader is None:
            return {} if self._place is None else {"train": self._place}
        place = self._train_loader.state_dict()
        if self.trainer is not None and self.trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            # The epoch is over, also where `limit_train_batches` leaves samples of it.
            place["consumed"] = self._train_loader.count
        return {"train": place}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on at a saved place."""
        self._place = state_dict.get("train")
