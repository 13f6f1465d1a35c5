"""Writes the codes that ``predict`` of the tokenizer yields as shards. B batch, A views, h × w grid."""

from collections.abc import Mapping
from io import BytesIO
from typing import Any, Protocol, cast

import lightning.pytorch as pl
import numpy as np
from torch import Tensor

from callbacks.writers.shard_dataset import PlannedData, ShardSetWriter
from datamodules.storage.shards import CODES_FORMAT, ShardDataset, ShardWriter
from llamagen.checkpoints.contents import weights_checksum
from llamagen.models.vqgan import VQGAN


class TokenizerModule(Protocol):
    """A module whose generator is the tokenizer."""

    @property
    def generator(self) -> VQGAN:
        """The tokenizer."""


class ImageData(PlannedData, Protocol):
    """A DataModule whose images become codes."""

    image_size: int
    view_names: list[str]


class CodeWriter(ShardSetWriter):
    """Write codes, labels, captions and keys as shards into the run's folder: ``train``, ``val``, at last
    ``meta.json``.

    A sample is ``<key>.npy``, (A, h, w) uint16, and ``<key>.cls`` or ``<key>.txt``, or both. Each shard holds the codes
    of a fixed range of the images and is written by one rank. The command of a stopped run goes on with the shards
    that are not there yet, on any number of ranks.

    Args:
        samples_per_shard: images in a tar file.
    """

    def __init__(self, samples_per_shard: int = 2_000) -> None:
        super().__init__(samples_per_shard)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Plan which shards are to be written.

        Raises:
            ValueError: for a vocabulary that uint16 cannot hold.
        """
        if stage == "predict":
            vocabulary = cast(TokenizerModule, pl_module).generator.config.codebook_size
            if vocabulary > 2**16:
                raise ValueError(f"codes are stored as uint16, which cannot hold a codebook of {vocabulary} entries")
        super().setup(trainer, pl_module, stage)

    def plan(self, data: ImageData, module: TokenizerModule) -> dict[str, Any]:
        """Images, views and tokenizer."""
        return {
            "format": CODES_FORMAT,
            "tokenizer": weights_checksum(module.generator),
            "image_size": data.image_size,
            "view_names": data.view_names,
            "images": {split: data.fingerprint(split) for split in data.predict_splits},
            "classes": data.class_names,
        }

    def write(self, writer: ShardWriter, outputs: Tensor, batch: dict[str, Any]) -> None:
        """Append a batch of codes, ``outputs`` (B, A, h, w).

        Raises:
            ValueError: if an image has neither a class nor a caption.
        """
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
            writer.write(key, parts, label)

    def describe(
        self, shards: ShardDataset, pieces: Mapping[str, int], data: ImageData, module: TokenizerModule
    ) -> dict[str, Any]:
        """Vocabulary, grid, views, classes and tokenizer."""
        config = module.generator.config
        side = data.image_size // config.downsampling
        return {
            "format": CODES_FORMAT,
            "vocabulary": config.codebook_size,
            "grid": [side, side],
            "views": len(data.view_names),
            "view_names": data.view_names,
            "image_size": data.image_size,
            "num_classes": len(data.class_names),
            "classes": data.class_names,
            "tokenizer": shards.plan["tokenizer"],
        }
