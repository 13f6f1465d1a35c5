"""Writers of the outputs of ``predict`` as a dataset of shards, which a stopped run resumes shard by shard."""

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl

from callbacks.protocols import ShardableData, datamodule, require
from datamodules.storage.shards import ShardDataset, ShardWriter


class ShardDatasetWriter(pl.Callback):
    """Write the outputs of ``predict`` as shards into the run's folder: ``train``, ``val``, and finally ``meta.json``.

    Each shard holds a fixed range of the examples and is written by one rank. The same command resumes a stopped run
    with the remaining shards, on any number of ranks.

    Args:
        samples_per_shard: examples in a tar file.
    """

    data_protocol: ClassVar[type[Any]]
    """Protocol that the data must satisfy; extends :class:`~callbacks.protocols.ShardableData`."""
    module_protocol: ClassVar[type[Any]]
    """Protocol that the module must satisfy."""

    def __init__(self, samples_per_shard: int) -> None:
        super().__init__()
        if samples_per_shard < 1:
            raise ValueError(f"samples_per_shard is {samples_per_shard}; it must be at least 1")
        self.samples_per_shard = samples_per_shard
        self._dataset: ShardDataset | None = None
        self._writer: ShardWriter | None = None
        self._piece = ("", -1)

    @abstractmethod
    def plan(self, data: Any, module: Any) -> dict[str, Any]:
        """Everything that determines the contents of the dataset, except ``samples_per_shard``; primitives only."""

    @abstractmethod
    def write(self, writer: ShardWriter, outputs: Any, batch: dict[str, Any]) -> None:
        """Append a batch to a shard.

        Args:
            writer: writer of the shard.
            outputs: outputs of ``predict_step``.
            batch: the batch.
        """

    @abstractmethod
    def describe(self, shards: ShardDataset, pieces: Mapping[str, int], data: Any, module: Any) -> dict[str, Any]:
        """Entries of ``meta.json``, except its splits. Called on rank zero after all shards have been written.

        Args:
            shards: the dataset, with its plan.
            pieces: number of shards of each split.
            data: the DataModule.
            module: the module that predicted.
        """

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Plan the remaining shards.

        Raises:
            ValueError: if module or data do not suit this callback.
        """
        if stage != "predict":
            return
        require(self.module_protocol, pl_module, self)
        self._dataset = None
        data, shards = self._data(trainer), ShardDataset(Path(trainer.default_root_dir), {}, "")
        for split, pieces in self._pieces(data).items():
            done = [number for number in range(pieces) if shards.is_written(split, number)]
            data.plan_shards(split, self.samples_per_shard, done)

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the plan of the dataset, or compare it with that of the stopped run.

        Raises:
            ValueError: if the folder holds other shards, or a complete dataset.
        """
        data = self._data(trainer)
        plan = {**self.plan(data, pl_module), "samples_per_shard": self.samples_per_shard}
        self._dataset = ShardDataset(Path(trainer.default_root_dir), plan, "delete it or choose another folder")
        self._dataset.check()
        trainer.strategy.barrier("folder of shards checked")
        if trainer.is_global_zero:
            self._dataset.begin(data.predict_splits)
        trainer.strategy.barrier("folder of shards made")
        self._writer, self._piece = None, ("", -1)

    def on_predict_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: dict[str, Any],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Append a batch to its shard, which is created for the first batch.

        Raises:
            ValueError: if an output cannot be stored.
        """
        assert self._dataset is not None
        data = self._data(trainer)
        piece = (data.predict_splits[dataloader_idx], int(batch["numbers"][0]) // self.samples_per_shard)
        if piece != self._piece:
            self._close(data)
            self._writer, self._piece = self._dataset.shard(*piece), piece
        assert self._writer is not None
        self.write(self._writer, outputs, batch)

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Close the last shard; after all ranks have, write ``meta.json``.

        Raises:
            ValueError: if shards are missing, or too many examples were skipped.
        """
        assert self._dataset is not None
        data = self._data(trainer)
        self._close(data)
        self._write_empty_shards(data)
        trainer.strategy.barrier("shards closed")
        if not trainer.is_global_zero:
            return
        pieces = self._pieces(data)
        rejected = {split: data.tallies[split].rejected for split in data.predict_splits}
        self._dataset.finish(
            pieces, self.describe(self._dataset, pieces, data, pl_module), rejected, data.max_bad_share
        )

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Complete the dataset if this rank had no shards left: Lightning then calls no hook of ``predict``.

        Raises:
            ValueError: see :meth:`on_predict_start` and :meth:`on_predict_end`.
        """
        if stage == "predict" and self._dataset is None:
            self.on_predict_start(trainer, pl_module)
            self.on_predict_end(trainer, pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Discard the shard that is being written."""
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.abort()

    def _data(self, trainer: pl.Trainer) -> ShardableData:
        data: ShardableData = require(self.data_protocol, datamodule(trainer), self)
        return data

    def _pieces(self, data: ShardableData) -> dict[str, int]:
        return {split: -(-len(data.datasets[split]) // self.samples_per_shard) for split in data.predict_splits}

    def _range(self, data: ShardableData, split: str, number: int) -> tuple[int, int]:
        first = number * self.samples_per_shard
        return first, min(first + self.samples_per_shard, len(data.datasets[split]))

    def _close(self, data: ShardableData) -> None:
        writer, self._writer = self._writer, None
        if writer is None:
            return
        split, number = self._piece
        first, end = self._range(data, split, number)
        writer.skipped = [example for example in data.tallies[split].skipped if first <= example.number < end]
        if writer.count + len(writer.skipped) == end - first:
            writer.close()
        else:  # incomplete, e.g. with limit_predict_batches
            writer.abort()

    def _write_empty_shards(self, data: ShardableData) -> None:
        """Write the shards of pieces whose examples were all skipped on this rank."""
        assert self._dataset is not None
        for split in data.predict_splits:
            seen = data.tallies[split].skipped
            for number in {example.number // self.samples_per_shard for example in seen}:
                first, end = self._range(data, split, number)
                skipped = [example for example in seen if first <= example.number < end]
                if len(skipped) == end - first:
                    with self._dataset.shard(split, number) as writer:
                        writer.skipped = skipped
