"""Writes the codes that ``predict`` of the tokenizer yields as shards. A views, h × w grid."""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol, cast

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor

from datamodules.shards import (
    CODES_FORMAT,
    ShardSetWriter,
    describe_split,
    find_shards,
    index_shard,
    write_meta,
)
from llamagen.checkpoint import weights_checksum
from llamagen.models.vqgan import VQGAN


class TokenizerModule(Protocol):
    """A module whose generator is the tokenizer."""

    @property
    def generator(self) -> VQGAN:
        """The tokenizer."""


class CodeWriter(pl.Callback):
    """Write codes, labels and keys as shards into the run's folder: ``train``, ``val`` and at last ``meta.json``.

    A sample is ``<key>.npy``, (A, h, w) uint16, and ``<key>.cls``. Each rank writes shards of its own.

    Args:
        samples_per_shard: pictures in a tar file.
    """

    def __init__(self, samples_per_shard: int = 10_000) -> None:
        super().__init__()
        if samples_per_shard < 1:
            raise ValueError(f"samples_per_shard is {samples_per_shard}; it must be at least 1")
        self.samples_per_shard = samples_per_shard
        self._writers: dict[str, ShardSetWriter] = {}
        self._shape: tuple[int, ...] = ()
        self._highest_label = -1

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse a folder that already holds codes, and a vocabulary that uint16 cannot hold.

        Raises:
            ValueError: in these cases.
        """
        root = Path(trainer.default_root_dir)
        splits = self._splits(trainer)
        if present := [shard for split in splits for shard in (root / split).glob("*.tar")]:
            raise ValueError(f"{root} already holds codes ({present[0].name}); delete it or choose another folder")
        vocabulary = cast(TokenizerModule, pl_module).generator.config.codebook_size
        if vocabulary > 2**16:
            raise ValueError(f"codes are stored as uint16, which cannot hold a codebook of {vocabulary} entries")
        trainer.strategy.barrier("code folder checked")
        self._writers, self._shape, self._highest_label = {}, (), -1

    @staticmethod
    def _splits(trainer: pl.Trainer) -> Sequence[str]:
        splits: Sequence[str] = trainer.datamodule.predict_splits  # type: ignore[attr-defined]
        return splits

    def on_predict_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Tensor,
        batch: dict[str, Any],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Append a batch of codes, ``outputs`` (B, A, h, w)."""
        split = self._splits(trainer)[dataloader_idx]
        if split not in self._writers:
            prefix = f"{split}-{trainer.global_rank:05d}"
            self._writers[split] = ShardSetWriter(
                Path(trainer.default_root_dir) / split, prefix, self.samples_per_shard
            )
        codes = outputs.cpu().numpy().astype(np.uint16)
        self._shape = codes.shape[1:]
        for key, label, sample in zip(batch["keys"], batch["labels"].tolist(), codes, strict=True):
            if label < 0:
                raise ValueError(f"sample {key} has no class label (.cls), which the codes' shards need")
            self._highest_label = max(self._highest_label, label)
            buffer = BytesIO()
            np.save(buffer, sample)
            self._writers[split].write(key, {"npy": buffer.getvalue(), "cls": str(label).encode()})

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Close the shards; when every rank has, describe the set."""
        for writer in self._writers.values():
            writer.close()
        self._writers = {}
        highest_label = torch.tensor(self._highest_label, device=pl_module.device)
        highest_label = trainer.strategy.reduce(highest_label, reduce_op="max")
        trainer.strategy.barrier("code shards closed")
        if not trainer.is_global_zero:
            return
        root = Path(trainer.default_root_dir)
        splits = {}
        for split in self._splits(trainer):
            shards = find_shards(root / split, "extraction wrote nothing")
            splits[split] = describe_split(shards, sum(len(index_shard(shard)) for shard in shards))
        tokenizer = cast(TokenizerModule, pl_module).generator
        views, *grid = self._shape
        write_meta(
            root,
            {
                "format": CODES_FORMAT,
                "vocabulary": tokenizer.config.codebook_size,
                "grid": grid,
                "views": views,
                "num_classes": int(highest_label) + 1,
                "tokenizer": weights_checksum(tokenizer),
                "splits": splits,
            },
        )

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave no half-written shard behind."""
        for writer in self._writers.values():
            writer.abort()
        self._writers = {}

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave no half-written shard behind."""
        self.teardown(trainer, pl_module, "predict")
