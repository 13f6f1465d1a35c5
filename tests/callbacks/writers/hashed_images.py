"""A stub of a text model: its images are hashes of the prompts."""

import hashlib
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn

from llamagen.sampling import Images, SamplingConfig

MAX_WORDS = 8


def features(caption: str) -> Tensor:
    """Features (16,) float32 of the first words of a caption."""
    words = " ".join(caption.split()[:MAX_WORDS])
    digest = hashlib.sha256(words.encode()).digest()
    return torch.from_numpy(np.frombuffer(digest, dtype=np.uint16).astype(np.float32))


class HashedImages(pl.LightningModule):
    """Images are a function of prompt, seed and index.

    Args:
        init_from: unused; the command line requires weights for ``predict``.
        sampling: settings.
        sample_seed: seed of the images.
        reader: name of the text encoder.
    """

    image_size: int | None = None
    tokenizer_checksum: str | None = None

    def __init__(
        self,
        init_from: str = "nothing",
        sampling: SamplingConfig | None = None,
        sample_seed: int = 0,
        reader: str = "hash",
    ) -> None:
        super().__init__()
        self.sampling = sampling or SamplingConfig(guidance_scale=7.5, top_k=1000)
        self.sample_seed, self.caption_metadata = sample_seed, {"reader": reader}
        self.generator = nn.Linear(1, 1)
        nn.init.ones_(self.generator.weight)
        nn.init.zeros_(self.generator.bias)

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """Images of 8 pixels, their index, and which prompts were truncated."""
        images = []
        for index, caption in zip(batch["index"].tolist(), batch["captions"], strict=True):
            seed = [self.sample_seed, index, *features(caption).long().tolist()]
            images.append(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8))
        return {
            "images": Images([torch.from_numpy(np.stack(images))], [None]),
            "index": batch["index"],
            "truncated": torch.tensor([len(caption.split()) > MAX_WORDS for caption in batch["captions"]]),
        }
