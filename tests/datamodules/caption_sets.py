"""Small sets of codes whose samples have captions."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from datamodules.shards import CODES_FORMAT, ShardSet
from tests.datamodules.code_sets import npy

SIDE, VOCABULARY = 4, 32


def write_caption_codes(
    root: Path, train: Sequence[str], val: Sequence[str], per_shard: int = 5, tokenizer: str = "0" * 64
) -> None:
    """Sample i of a split has key ``split/i``, codes of its own, the i-th caption, and no caption file for ''."""
    shards = ShardSet(root, {}, hint="")
    shards.begin(("train", "val"))
    pieces = {}
    for split, captions in (("train", train), ("val", val)):
        starts = range(0, len(captions), per_shard)
        for piece, first in enumerate(starts):
            with shards.shard(split, piece) as writer:
                for number in range(first, min(first + per_shard, len(captions))):
                    generator = np.random.default_rng([split == "val", number])
                    codes = generator.integers(0, VOCABULARY, (1, SIDE, SIDE)).astype(np.uint16)
                    text = {"txt": captions[number].encode()} if captions[number] else {}
                    writer.write(f"{split}/{number}", {"npy": npy(codes), **text})
        pieces[split] = len(starts)
    meta = {
        "format": CODES_FORMAT,
        "vocabulary": VOCABULARY,
        "grid": [SIDE, SIDE],
        "views": 1,
        "num_classes": 0,
        "tokenizer": tokenizer,
    }
    shards.finish(pieces, meta, known={}, max_bad_share=0.0)
