"""Small datasets of codes with meta.json."""

from collections.abc import Collection
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.storage.shards import CODES_FORMAT, ShardDataset


def npy(array: np.ndarray) -> bytes:
    """Encode an array as a file."""
    buffer = BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def codes_of(number: int, views: int = 1, grid: tuple[int, int] = (2, 2), vocabulary: int = 8) -> np.ndarray:
    """The codes of example ``number``."""
    codes = np.random.default_rng(number).integers(0, vocabulary, (views, *grid))
    return codes.astype(np.uint16)


def write_codes(
    root: Path, train: int, val: int, per_shard: int = 3, broken: Collection[int] = (), **options: Any
) -> None:
    """Write codes: example i of a split has key ``split/i`` and class i mod 5; ``broken`` training examples hold
    text.
    """
    shards = ShardDataset(root, {}, hint="")
    shards.begin(("train", "val"))
    written = {}
    for split, count in (("train", train), ("val", val)):
        starts = range(0, count, per_shard)
        for piece, first in enumerate(starts):
            with shards.shard(split, piece) as writer:
                for number in range(first, min(first + per_shard, count)):
                    codes = npy(codes_of(number, **options))
                    data = b"no codes" if split == "train" and number in broken else codes
                    writer.write(f"{split}/{number}", {"npy": data}, number % 5)
        written[split] = len(starts)
    shape = codes_of(0, **options).shape
    meta = {
        "format": CODES_FORMAT,
        "vocabulary": options.get("vocabulary", 8),
        "grid": list(shape[1:]),
        "views": shape[0],
        "num_classes": 5,
        "tokenizer": "0" * 64,
    }
    shards.finish(written, meta, rejected={}, max_bad_share=0.0)
