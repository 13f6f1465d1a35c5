"""Writes the codes that ``predict`` of the tokenizer yields as shards. B batch, A views, h × w grid."""

from collections.abc import Collection, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol, cast

import lightning.pytorch as pl
import numpy as np
from torch import Tensor

from datamodules.shards import CODES_FORMAT, ShardSet, ShardWriter
from llamagen.checkpoint import weights_checksum
from llamagen.models.vqgan import VQGAN


class TokenizerModule(Protocol):
    """A module whose generator is the tokenizer."""

    @property
    def generator(self) -> VQGAN:
        """The tokenizer."""


class PictureData(Protocol):
    """A DataModule whose pictures become codes."""

    predict_splits: Sequence[str]
    datasets: Mapping[str, Any]
    tallies: Mapping[str, Any]
    image_size: int
    view_names: list[str]
    class_names: list[str]
    max_bad_share: float

    def fingerprint(self, split: str) -> str:
        """Of the samples and their order."""

    def plan_shards(self, split: str, samples_per_shard: int, done: Collection[int]) -> None:
        """Read a split in pieces, without those that are done."""


class CodeWriter(pl.Callback):
    """Write codes, labels, captions and keys as shards into the run's folder: ``train``, ``val``, at last
    ``meta.json``.

    A sample is ``<key>.npy``, (A, h, w) uint16, and ``<key>.cls`` or ``<key>.txt``, or both. Each shard holds the codes
    of a fixed range of the pictures and is written by one rank. The command of a stopped run goes on with the shards
    that are not there yet, on any number of ranks.

    Args:
        samples_per_shard: pictures in a tar file.
    """

    def __init__(self, samples_per_shard: int = 2_000) -> None:
        super().__init__()
        if samples_per_shard < 1:
            raise ValueError(f"samples_per_shard is {samples_per_shard}; it must be at least 1")
        self.samples_per_shard = samples_per_shard
        self._set: ShardSet | None = None
        self._writer: ShardWriter | None = None
        self._piece = ("", -1)

    @staticmethod
    def _data(trainer: pl.Trainer) -> PictureData:
        return cast(PictureData, trainer.datamodule)  # type: ignore[attr-defined]

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Plan which shards are to be written.

        Raises:
            ValueError: for a vocabulary that uint16 cannot hold.
        """
        if stage != "predict":
            return
        vocabulary = cast(TokenizerModule, pl_module).generator.config.codebook_size
        if vocabulary > 2**16:
            raise ValueError(f"codes are stored as uint16, which cannot hold a codebook of {vocabulary} entries")
        self._set = None
        data, shards = self._data(trainer), ShardSet(Path(trainer.default_root_dir), {}, "")
        for split in data.predict_splits:
            done = [n for n in range(self._pieces(data, split)) if shards.is_written(split, n)]
            data.plan_shards(split, self.samples_per_shard, done)

    def _pieces(self, data: PictureData, split: str) -> int:
        return -(-len(data.datasets[split]) // self.samples_per_shard)

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin the set, or see that it was begun with the same pictures, views and tokenizer.

        Raises:
            ValueError: if the folder holds something else, or a complete set.
        """
        data, tokenizer = self._data(trainer), cast(TokenizerModule, pl_module).generator
        plan = {
            "format": CODES_FORMAT,
            "tokenizer": weights_checksum(tokenizer),
            "image_size": data.image_size,
            "view_names": data.view_names,
            "samples_per_shard": self.samples_per_shard,
            "pictures": {split: data.fingerprint(split) for split in data.predict_splits},
            "classes": data.class_names,
        }
        hint = "delete it or choose another folder"
        self._set = ShardSet(Path(trainer.default_root_dir), plan, hint)
        self._set.check()
        trainer.strategy.barrier("code folder checked")
        if trainer.is_global_zero:
            self._set.begin(data.predict_splits)
        trainer.strategy.barrier("code folder made")
        self._writer, self._piece = None, ("", -1)

    def on_predict_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Tensor,
        batch: dict[str, Any],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Append a batch of codes, ``outputs`` (B, A, h, w).

        Raises:
            ValueError: if a picture has neither a class nor a caption.
        """
        assert self._set is not None
        data = self._data(trainer)
        piece = (data.predict_splits[dataloader_idx], int(batch["numbers"][0]) // self.samples_per_shard)
        if piece != self._piece:
            self._close(data)
            self._writer, self._piece = self._set.shard(*piece), piece
        assert self._writer is not None
        codes = outputs.cpu().numpy().astype(np.uint16)
        captions = batch.get("captions") or [""] * len(codes)
        for key, label, caption, sample in zip(batch["keys"], batch["labels"].tolist(), captions, codes, strict=True):
            if label < 0 and not caption:
                raise ValueError(
                    f"sample {key} has neither a class (.cls) nor a caption (.txt), of which codes need one"
                )
            buffer = BytesIO()
            np.save(buffer, sample)
            parts = {"npy": buffer.getvalue()} | ({"txt": caption.encode()} if caption else {})
            self._writer.write(key, parts, label)

    def _close(self, data: PictureData) -> None:
        writer, self._writer = self._writer, None
        if writer is None:
            return
        split, number = self._piece
        first, end = self._range(data, split, number)
        writer.skipped = [sample for sample in data.tallies[split].seen if first <= sample.number < end]
        if writer.count + len(writer.skipped) == end - first:
            writer.close()
        else:  # not all of its pictures came, e.g. by limit_predict_batches
            writer.abort()

    def _range(self, data: PictureData, split: str, number: int) -> tuple[int, int]:
        first = number * self.samples_per_shard
        return first, min(first + self.samples_per_shard, len(data.datasets[split]))

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Close the last shard; when every rank has, describe the set.

        Raises:
            ValueError: if shards are missing, or too many pictures could not be used.
        """
        assert self._set is not None
        data, tokenizer = self._data(trainer), cast(TokenizerModule, pl_module).generator
        self._close(data)
        self._write_empty_shards(data)
        trainer.strategy.barrier("code shards closed")
        if not trainer.is_global_zero:
            return
        side = data.image_size // tokenizer.config.downsampling
        meta = {
            "format": CODES_FORMAT,
            "vocabulary": tokenizer.config.codebook_size,
            "grid": [side, side],
            "views": len(data.view_names),
            "view_names": data.view_names,
            "image_size": data.image_size,
            "num_classes": len(data.class_names),
            "classes": data.class_names,
            "tokenizer": self._set.plan["tokenizer"],
        }
        shards = {split: self._pieces(data, split) for split in data.predict_splits}
        known = {split: data.tallies[split].known for split in data.predict_splits}
        self._set.finish(shards, meta, known, data.max_bad_share)

    def _write_empty_shards(self, data: PictureData) -> None:
        """Of pieces of which this rank could not use a single picture."""
        assert self._set is not None
        for split in data.predict_splits:
            seen = data.tallies[split].seen
            for number in {sample.number // self.samples_per_shard for sample in seen}:
                first, end = self._range(data, split, number)
                skipped = [sample for sample in seen if first <= sample.number < end]
                if len(skipped) == end - first:
                    with self._set.shard(split, number) as writer:
                        writer.skipped = skipped

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
