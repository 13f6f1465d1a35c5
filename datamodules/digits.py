"""The 1,797 handwritten digits of scikit-learn, as a dataset of shards."""

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from datamodules.images import ImageDataModule
from datamodules.storage.shards import IMAGES_FORMAT, ShardDataset, read_meta
from datamodules.storage.sources import SPLITS
from llamagen.files import atomic_folder
from llamagen.option_checks import check_folder_name

VALIDATION_EVERY = 6
EXAMPLES_PER_SHARD = 500
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def write_digits(root: Path, captions: bool = False) -> None:
    """Write the digits as PNGs of 8 × 8 pixels, white on black. Every sixth digit is for validation.

    The folder gets its name only when the dataset is complete.

    Args:
        root: folder of the dataset; must not exist yet.
        captions: also write a caption for each digit, such as "a handwritten three".
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    with atomic_folder(root) as temporary:
        shards = ShardDataset(temporary, {}, hint="")
        shards.begin(SPLITS)
        numbers = np.arange(len(digits.target))
        for_validation = numbers % VALIDATION_EVERY == 0
        written = {}
        for split, chosen in (("train", numbers[~for_validation]), ("val", numbers[for_validation])):
            pieces = [chosen[first : first + EXAMPLES_PER_SHARD] for first in range(0, len(chosen), EXAMPLES_PER_SHARD)]
            for piece, members in enumerate(pieces):
                with shards.shard(split, piece) as writer:
                    for number in members:
                        buffer = BytesIO()
                        pixels = (digits.images[number] * 255 / 16).round().astype(np.uint8)
                        Image.fromarray(pixels).save(buffer, format="png")
                        label = int(digits.target[number])
                        caption = {"txt": f"a handwritten {NAMES[label]}".encode()} if captions else {}
                        writer.write(f"{number:06d}", {"png": buffer.getvalue(), **caption}, label)
            written[split] = len(pieces)
        meta = {"format": IMAGES_FORMAT, "classes": [str(digit) for digit in range(10)], "captions": captions}
        shards.finish(written, meta, rejected={}, max_bad_share=0.0)


class DigitsDataModule(ImageDataModule):
    """Handwritten digits, written once as shards and then read like other images, without augmentation.

    Args:
        root: folder of the shards, which are written on first use.
        image_size: side of the images in pixels. The originals have 8 and are enlarged bicubically.
        batch_size: images per batch and rank.
        num_workers: worker processes per rank that decode images; 0 decodes in the main process.
        captions: also write a caption for each digit, such as "a handwritten three".
    """

    def __init__(
        self,
        root: Path | str = "data/digits",
        image_size: int = 32,
        batch_size: int = 32,
        num_workers: int = 0,
        captions: bool = False,
        **data: Any,
    ) -> None:
        check_folder_name("root", "" if root is None else root)
        super().__init__(root, image_size, batch_size, num_workers=num_workers, random_crop=False, flip=False, **data)
        self.captions = captions

    def prepare_data(self) -> None:
        """Write the shards in one process, if they do not exist.

        Raises:
            ValueError: if the folder holds something else, or digits without the required captions.
        """
        root, hint = Path(str(self.root)), "delete it or choose another root"
        if not root.exists():
            write_digits(root, self.captions)
        elif (meta := read_meta(root, hint)).get("format") != IMAGES_FORMAT:
            raise ValueError(f"{root} does not hold images; {hint}")
        elif self.captions and not meta.get("captions"):
            raise ValueError(f"the digits in {root} were written without captions; {hint}, or set captions to false")
        super().prepare_data()
