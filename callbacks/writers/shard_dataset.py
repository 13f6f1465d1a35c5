"""What ``predict`` yields as a set of shards: planned, gone on with after a stop, and complete or not there."""

from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import lightning.pytorch as pl

from datamodules.storage.shards import ShardDataset, ShardWriter


class PlannedData(Protocol):
    """A DataModule whose splits are read in pieces."""

    predict_splits: Sequence[str]
    datasets: Mapping[str, Any]
    tallies: Mapping[str, Any]
    class_names: list[str]
    max_bad_share: float

    def fingerprint(self, split: str) -> str:
        """Of the samples and their order."""

    def plan_shards(self, split: str, samples_per_shard: int, done: Collection[int]) -> None:
        """Read a split in pieces, without those that are done."""


class ShardSetWriter(pl.Callback):
    """Write what ``predict`` yields as shards into the run's folder: ``train``, ``val``, at last ``meta.json``.

    Each shard holds a fixed range of the samples and is written by one rank. The command of a stopped run goes on with
    the shards that are not there yet, on any number of ranks.

    Args:
        samples_per_shard: samples in a tar file.
    """

    def __init__(self, samples_per_shard: int) -> None:
        super().__init__()
        if samples_per_shard < 1:
            raise ValueError(f"samples_per_shard is {samples_per_shard}; it must be at least 1")
        self.samples_per_shard = samples_per_shard
        self._set: ShardDataset | None = None
        self._writer: ShardWriter | None = None
        self._piece = ("", -1)

    @abstractmethod
    def plan(self, data: Any, module: Any) -> dict[str, Any]:
        """What decides the contents of the set, beside the samples of a shard; primitives only."""

    @abstractmethod
    def write(self, writer: ShardWriter, outputs: Any, batch: dict[str, Any]) -> None:
        """Append a batch to a shard.

        Args:
            writer: of the shard.
            outputs: what ``predict_step`` made of the batch.
            batch: of the data.
        """

    @abstractmethod
    def describe(self, shards: ShardDataset, pieces: Mapping[str, int], data: Any, module: Any) -> dict[str, Any]:
        """What ``meta.json`` says of the set, beside its splits; asked on the first rank, when all shards are written.

        Args:
            shards: the set, with its plan.
            pieces: number of shards of each split.
            data: the DataModule.
            module: what was predicted with.
        """

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Plan which shards are to be written."""
        if stage != "predict":
            return
        self._set = None
        data, shards = self._data(trainer), ShardDataset(Path(trainer.default_root_dir), {}, "")
        for split, pieces in self._pieces(data).items():
            done = [number for number in range(pieces) if shards.is_written(split, number)]
            data.plan_shards(split, self.samples_per_shard, done)

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin the set, or see that it was begun with the same plan.

        Raises:
            ValueError: if the folder holds something else, or a complete set.
        """
        data = self._data(trainer)
        plan = {**self.plan(data, pl_module), "samples_per_shard": self.samples_per_shard}
        self._set = ShardDataset(Path(trainer.default_root_dir), plan, "delete it or choose another folder")
        self._set.check()
        trainer.strategy.barrier("folder of shards checked")
        if trainer.is_global_zero:
            self._set.begin(data.predict_splits)
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
        """Append a batch, to a new shard if it is the first of its piece.

        Raises:
            ValueError: if something of it cannot be stored.
        """
        assert self._set is not None
        data = self._data(trainer)
        piece = (data.predict_splits[dataloader_idx], int(batch["numbers"][0]) // self.samples_per_shard)
        if piece != self._piece:
            self._close(data)
            self._writer, self._piece = self._set.shard(*piece), piece
        assert self._writer is not None
        self.write(self._writer, outputs, batch)

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Close the last shard; when every rank has, describe the set.

        Raises:
            ValueError: if shards are missing, or too many samples could not be used.
        """
        assert self._set is not None
        data = self._data(trainer)
        self._close(data)
        self._write_empty_shards(data)
        trainer.strategy.barrier("shards closed")
        if not trainer.is_global_zero:
            return
        pieces = self._pieces(data)
        known = {split: data.tallies[split].rejected for split in data.predict_splits}
        self._set.finish(pieces, self.describe(self._set, pieces, data, pl_module), known, data.max_bad_share)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Complete the set where all shards of this rank were there; Lightning then starts no prediction on it.

        Raises:
            ValueError: see :meth:`on_predict_start` and :meth:`on_predict_end`.
        """
        if stage == "predict" and self._set is None:
            self.on_predict_start(trainer, pl_module)
            self.on_predict_end(trainer, pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave no half-written shard behind."""
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.abort()

    @staticmethod
    def _data(trainer: pl.Trainer) -> PlannedData:
        return cast(PlannedData, trainer.datamodule)  # type: ignore[attr-defined]

    def _pieces(self, data: PlannedData) -> dict[str, int]:
        return {split: -(-len(data.datasets[split]) // self.samples_per_shard) for split in data.predict_splits}

    def _range(self, data: PlannedData, split: str, number: int) -> tuple[int, int]:
        first = number * self.samples_per_shard
        return first, min(first + self.samples_per_shard, len(data.datasets[split]))

    def _close(self, data: PlannedData) -> None:
        writer, self._writer = self._writer, None
        if writer is None:
            return
        split, number = self._piece
        first, end = self._range(data, split, number)
        writer.skipped = [sample for sample in data.tallies[split].skipped if first <= sample.number < end]
        if writer.count + len(writer.skipped) == end - first:
            writer.close()
        else:  # not all of its samples came, e.g. by limit_predict_batches
            writer.abort()

    def _write_empty_shards(self, data: PlannedData) -> None:
        """Of pieces of which this rank could not use a single sample."""
        assert self._set is not None
        for split in data.predict_splits:
            seen = data.tallies[split].skipped
            for number in {sample.number // self.samples_per_shard for sample in seen}:
                first, end = self._range(data, split, number)
                skipped = [sample for sample in seen if first <= sample.number < end]
                if len(skipped) == end - first:
                    with self._set.shard(split, number) as writer:
                        writer.skipped = skipped
