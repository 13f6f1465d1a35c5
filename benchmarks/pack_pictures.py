"""Write a folder of class folders as shards, for the recorded runs.

    python benchmarks/pack_pictures.py FOLDER OUT [--validation-every 10]

The classes are numbered in the order of their names; every n-th picture of the shuffled list goes to validation.
"""

import argparse
from pathlib import Path

import numpy as np

from datamodules.shards import ShardSetWriter

EXTENSIONS = {".jpg", ".jpeg", ".png", ".webp"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--validation-every", type=int, default=10)
    arguments = parser.parse_args()
    classes = sorted(path.name for path in arguments.folder.iterdir() if path.is_dir())
    pictures = sorted(path for path in arguments.folder.rglob("*") if path.suffix.lower() in EXTENSIONS)
    order = np.random.default_rng(0).permutation(len(pictures))
    for split in ("train", "val"):
        with ShardSetWriter(arguments.out / split, split, samples_per_shard=5000) as writer:
            for position, number in enumerate(order):
                if (position % arguments.validation_every == 0) == (split == "val"):
                    path = pictures[number]
                    label = str(classes.index(path.parent.name)).encode()
                    writer.write(
                        f"{path.parent.name}/{path.stem}", {path.suffix.lower()[1:]: path.read_bytes(), "cls": label}
                    )
        print(f"{split}: {writer.count} pictures of {len(classes)} classes")


if __name__ == "__main__":
    main()
