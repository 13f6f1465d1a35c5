"""Shards, images and assertions for the tests of the data layer."""

from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import Dataset

from datamodules.loading.order import Address
from datamodules.storage.shards import ShardWriter


class Numbers(Dataset[Address]):
    """Dataset whose examples are their addresses, (number, epoch)."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, address: Address) -> Address:
        return address


def assert_one_line(error: pytest.ExceptionInfo[Exception], *phrases: str | Path) -> None:
    """Assert that the message is one line and contains all phrases."""
    message = str(error.value)
    assert "\n" not in message
    for phrase in phrases:
        assert str(phrase) in message


def refusal_of(action: Callable[[], object]) -> str:
    """The message of the ValueError that an action raises; empty if it raises none."""
    try:
        action()
    except ValueError as error:
        return str(error)
    return ""


def encode(image: Image.Image, kind: str = "png", **options: Any) -> bytes:
    """Encode an image as a file."""
    buffer = BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def grey_image(level: int, size: int = 4) -> bytes:
    """A PNG of one grey level."""
    return encode(Image.fromarray(np.full((size, size), level, np.uint8)))


def write_shards(folder: Path, examples: Sequence[tuple[str, dict[str, bytes]]], per_shard: int = 3) -> list[Path]:
    """Write examples (key, members) to shards ``<folder>/<name>-000000.tar`` and so on; without examples, no folder."""
    paths = []
    for number, first in enumerate(range(0, len(examples), per_shard)):
        folder.mkdir(parents=True, exist_ok=True)
        paths.append(folder / f"{folder.name}-{number:06d}.tar")
        with ShardWriter(paths[-1]) as writer:
            for key, parts in examples[first : first + per_shard]:
                writer.write(key, parts)
    return paths


def use_few_digits(patch: pytest.MonkeyPatch, count: int = 60, per_shard: int = 20) -> None:
    """Replace scikit-learn's digits by the first ones, because writing all of them takes long."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    few = SimpleNamespace(images=digits.images[:count], target=digits.target[:count])
    patch.setattr("sklearn.datasets.load_digits", lambda: few)
    patch.setattr("datamodules.digits.EXAMPLES_PER_SHARD", per_shard)


def write_images(root: Path, train: int, val: int, per_shard: int = 3) -> None:
    """Write a dataset of images: example i of a split has key ``split/i``, grey level i and class i mod 5."""
    for split, count in (("train", train), ("val", val)):
        examples = [(f"{split}/{i}", {"png": grey_image(i), "cls": str(i % 5).encode()}) for i in range(count)]
        write_shards(root / split, examples, per_shard)
