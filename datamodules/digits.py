"""The 1,797 handwritten digits that scikit-learn ships, as a set of shards like any other."""

import os
import shutil
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from datamodules.base import SPLITS
from datamodules.images import ImageDataModule
from datamodules.shards import IMAGES_FORMAT, ShardSetWriter, describe_split, read_meta, write_meta

VALIDATION_EVERY = 6
SAMPLES_PER_SHARD = 500


def write_digits(root: Path) -> None:
    """Write the digits as PNGs of 8 × 8 pixels, white on black; every sixth is for validation.

    The set appears under its name when it is complete.

    Args:
        root: folder of the set; must not exist yet.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    root.parent.mkdir(parents=True, exist_ok=True)
    temporary = root.with_name(f".{root.name}-{os.getpid()}.tmp")
    temporary.mkdir()
    try:
        splits = {}
        for split in SPLITS:
            with ShardSetWriter(temporary / split, split, SAMPLES_PER_SHARD) as writer:
                for number, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
                    if (number % VALIDATION_EVERY == 0) == (split == "val"):
                        buffer = BytesIO()
                        Image.fromarray((pixels * 255 / 16).round().astype(np.uint8)).save(buffer, format="png")
                        writer.write(f"{number:06d}", {"png": buffer.getvalue(), "cls": str(label).encode()})
            splits[split] = describe_split(writer.shards, writer.count)
        write_meta(temporary, {"format": IMAGES_FORMAT, "num_classes": 10, "splits": splits})
        temporary.rename(root)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


class DigitsDataModule(ImageDataModule):
    """Handwritten digits, written once as shards and then read like any other pictures; neither cropped nor mirrored.

    Args:
        root: folder of the shards; written there if it does not exist.
        image_size: side of the pictures in pixels; the originals have 8 and are enlarged bicubically.
        batch_size: pictures a rank and batch.
        num_workers: processes a rank that decode pictures; 0 for none.
        seed: decides the order of each training epoch.
    """

    def __init__(
        self,
        root: Path | str = "data/digits",
        image_size: int = 32,
        batch_size: int = 32,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(root, image_size, batch_size, num_workers, seed, random_crop=False, flip=False)

    def prepare_data(self) -> None:
        """Write the shards, on one process, if they are not there.

        Raises:
            ValueError: if the folder exists and holds something else.
        """
        if not self.root.exists():
            write_digits(self.root)
        elif read_meta(self.root, hint := "delete it or choose another root").get("format") != IMAGES_FORMAT:
            raise ValueError(f"{self.root} holds something else than pictures; {hint}")
