"""Writer of the codes that ``predict`` of the tokenizer computes, as shards. B batch, A views, h × w grid."""

from collections.abc import Mapping
from io import BytesIO
from typing import Any

import lightning.pytorch as pl
import numpy as np
from torch import Tensor

from callbacks.protocols import ShardableImages, TokenizesImages, require
from callbacks.writers.shard_dataset import ShardDatasetWriter
from datamodules.storage.code_dtype import code_dtype
from datamodules.storage.shards import CODES_FORMAT, ShardDataset, ShardWriter
from llamagen.checkpoints.contents import weights_checksum


class CodeWriter(ShardDatasetWriter):
    """Write codes, labels, captions and keys as shards into the run's folder: ``train``, ``val``, and finally
    ``meta.json``.

    An example is ``<key>.npy``, (A, h, w) in the dtype of :func:`~datamodules.storage.code_dtype.code_dtype`, with
    ``<key>.cls``, ``<key>.txt`` or both. Each shard holds the codes of a fixed range of the images and is written by
    one rank. The same command resumes a stopped run with the remaining shards, on any number of ranks.

    Args:
        samples_per_shard: images in a tar file.
    """

    data_protocol = ShardableImages
    module_protocol = TokenizesImages

    def __init__(self, samples_per_shard: int = 2_000) -> None:
        super().__init__(samples_per_shard)
        self._dtype = code_dtype(0)  # that of the tokenizer's codes from `setup` on

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Plan the remaining shards.

        Raises:
            ValueError: if module or data do not suit this callback.
        """
        if stage == "predict":
            self._dtype = code_dtype(require(TokenizesImages, pl_module, self).generator.config.codebook_size)
        super().setup(trainer, pl_module, stage)

    def plan(self, data: ShardableImages, module: TokenizesImages) -> dict[str, Any]:
        """Tokenizer, images and views."""
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
        codes = outputs.cpu().numpy().astype(self._dtype)
        captions = batch.get("captions") or [""] * len(codes)
        for key, label, caption, views in zip(batch["keys"], batch["labels"].tolist(), captions, codes, strict=True):
            if label < 0 and not caption:
                raise ValueError(
                    f"example {key} has neither a class (.cls) nor a caption (.txt); codes need at least one of them"
                )
            buffer = BytesIO()
            np.save(buffer, views)
            parts = {"npy": buffer.getvalue()} | ({"txt": caption.encode()} if caption else {})
            writer.write(key, parts, label)

    def describe(
        self, shards: ShardDataset, pieces: Mapping[str, int], data: ShardableImages, module: TokenizesImages
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
