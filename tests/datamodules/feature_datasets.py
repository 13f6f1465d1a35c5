"""Small datasets of codes, caption features, or both."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.storage.shards import CAPTIONS_FORMAT, CODES_FORMAT, ShardDataset
from tests.datamodules.code_datasets import codes_of, npy

WIDTH, LENGTH, VIEWS, GRID, VOCABULARY = 4, 5, 2, (2, 2), 1000
CODES = {"vocabulary": VOCABULARY, "grid": list(GRID), "views": VIEWS, "num_classes": 0, "tokenizer": "0" * 64}
FEATURES = {"width": WIDTH, "caption_length": LENGTH, "dtype": "float16", "short": True, "cleaned": False}

Splits = Mapping[str, Sequence[tuple[str, int]]]
"""Keys and numbers of the examples of each split; the number determines the content of an example."""


def tokens(number: int, short: bool = False) -> np.ndarray:
    """The features of example ``number``, or of its short caption."""
    rng = np.random.default_rng([number, short])
    return rng.standard_normal((1 if short else 2 + number % 4, WIDTH)).astype("<f2")


def codes(number: int) -> np.ndarray:
    """The codes of example ``number``."""
    return codes_of(number, VIEWS, GRID, VOCABULARY)


def write_dataset(
    root: Path,
    splits: Splits,
    parts: str = "codes features",
    per_shard: int = 4,
    silent: Collection[int] = (),
    **features: Any,
) -> Path:
    """Write a dataset with ``codes``, ``features`` or both. Every third example has a separate short caption.

    Args:
        root: folder of the dataset, which is returned.
        splits: example numbers of each split.
        parts: of each example.
        per_shard: examples in a shard.
        silent: numbers of examples without a caption text.
        features: otherwise described.
    """
    shards = ShardDataset(root, {}, hint="")
    shards.begin(list(splits))
    pieces = {}
    for split, examples in splits.items():
        starts = range(0, len(examples), per_shard)
        for piece, first in enumerate(starts):
            with shards.shard(split, piece) as writer:
                for key, number in examples[first : first + per_shard]:
                    content = {"npy": npy(codes(number))} if "codes" in parts else {}
                    content |= {} if number in silent else {"txt": f"caption {number}".encode()}
                    if "features" in parts:
                        content["features"] = tokens(number).tobytes()
                        content |= {"shortfeatures": tokens(number, True).tobytes()} if number % 3 == 0 else {}
                    writer.write(key, content)
        pieces[split] = len(starts)
    meta = {"format": CODES_FORMAT, **CODES} if "codes" in parts else {"format": CAPTIONS_FORMAT}
    meta |= {"features": {**FEATURES, **features}} if "features" in parts else {}
    shards.finish(pieces, meta, rejected={}, max_bad_share=0.0)
    return root
