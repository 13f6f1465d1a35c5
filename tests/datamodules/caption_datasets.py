"""Small datasets of codes with captions."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from datamodules.storage.shards import CODES_FORMAT, ShardDataset
from tests.datamodules.code_datasets import codes_of, npy
from tests.tiny_t5 import WORDS

DESCRIPTION = {
    "format": CODES_FORMAT,
    "vocabulary": 8,
    "grid": [2, 2],
    "views": 2,
    "view_names": ["centre", "flipped"],
    "image_size": 16,
    "num_classes": 5,
    "classes": list("abcde"),
    "tokenizer": "0" * 64,
}


def caption(number: int) -> str:
    """One to twelve words, in two sentences if the number is divisible by three."""
    rng = np.random.default_rng(number)
    words = rng.choice(WORDS[:-2], rng.integers(1, 13)).tolist()
    return f"{' '.join(words)}. The red dog {number}." if number % 3 == 0 else " ".join(words)


def codes(number: int) -> bytes:
    """The npy member of example ``number``."""
    return npy(codes_of(number, views=2))


def write_captioned_codes(
    root: Path, counts: Mapping[str, int], odd: Mapping[int, dict[str, bytes | None]] | None = None
) -> Path:
    """Write codes: example i of a split has key ``split/i``, a caption, and class i mod 5 if i is even.

    Args:
        root: folder of the dataset, which is returned.
        counts: examples of each split.
        odd: replaced members of training examples, by number; None removes a member.
    """
    shards = ShardDataset(root, {}, hint="")
    shards.begin(list(counts))
    written = {}
    for split, count in counts.items():
        starts = range(0, count, 7)
        for piece, first in enumerate(starts):
            with shards.shard(split, piece) as writer:
                for number in range(first, min(first + 7, count)):
                    parts = {"npy": codes(number), "txt": caption(number).encode()}
                    changed = {**parts, **((odd or {}).get(number, {}) if split == "train" else {})}
                    kept = {name: data for name, data in changed.items() if data is not None}
                    writer.write(f"{split}/{number}", kept, -1 if number % 2 else number % 5)
        written[split] = len(starts)
    shards.finish(written, DESCRIPTION, rejected={}, max_bad_share=0.0)
    return root


def write_caption_codes(
    root: Path, train: Sequence[str], val: Sequence[str], per_shard: int = 5, tokenizer: str = "0" * 64
) -> None:
    """Write codes: example i of a split has key ``split/i``, its own codes and the i-th caption; '' writes no
    caption.
    """
    shards = ShardDataset(root, {}, hint="")
    shards.begin(("train", "val"))
    pieces = {}
    for split, captions in (("train", train), ("val", val)):
        starts = range(0, len(captions), per_shard)
        for piece, first in enumerate(starts):
            with shards.shard(split, piece) as writer:
                for number in range(first, min(first + per_shard, len(captions))):
                    generator = np.random.default_rng([split == "val", number])
                    codes = generator.integers(0, 32, (1, 4, 4)).astype(np.uint16)
                    text = {"txt": captions[number].encode()} if captions[number] else {}
                    writer.write(f"{split}/{number}", {"npy": npy(codes), **text})
        pieces[split] = len(starts)
    meta = {
        "format": CODES_FORMAT,
        "vocabulary": 32,
        "grid": [4, 4],
        "views": 1,
        "num_classes": 0,
        "tokenizer": tokenizer,
    }
    shards.finish(pieces, meta, rejected={}, max_bad_share=0.0)
