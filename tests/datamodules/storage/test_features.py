"""Stored features: only valid caption features are used in training."""

from pathlib import Path

import numpy as np
import pytest
import torch

from datamodules.storage.bad_examples import BadExampleError
from datamodules.storage.features import StoredFeatures
from datamodules.storage.index import Example
from datamodules.storage.tar_index import index_shard
from tests.datamodules.shard_files import write_shards

WIDTH, LENGTH = 4, 3


def stored(values: list[list[float]], dtype: torch.dtype) -> bytes:
    return torch.tensor(values).to(dtype).view(torch.int16).numpy().astype("<i2").tobytes()


def example_with_features(folder: Path, data: bytes) -> Example:
    (shard,) = write_shards(folder, [("0", {"features": data})])
    example: Example = index_shard(shard)[0]
    return example


def reader(dtype: str) -> StoredFeatures:
    return StoredFeatures({"width": WIDTH, "caption_length": LENGTH, "dtype": dtype, "short": False}, "root")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_features_are_read_as_they_were_stored(dtype: str, tmp_path: Path) -> None:
    values = [[0.0, -1.5, 2.0, 3.0], [60000.0, -60000.0, 1e-4, 0.25]]
    kind = getattr(torch, dtype)
    bits = reader(dtype).read(example_with_features(tmp_path, stored(values, kind)), short=False)
    (features, lengths) = reader(dtype).collate([bits, bits[:1]]).values()
    assert lengths.tolist() == [2, 1]
    assert torch.equal(features, torch.tensor([*values, values[0]]).to(kind))


def test_short_captions_have_features_of_their_own_if_they_are_stored(tmp_path: Path) -> None:
    whole, short = ([[float(row)] * WIDTH for row in rows] for rows in ((1, 2, 3), (4,)))
    parts = {name: stored(values, torch.float16) for name, values in (("features", whole), ("shortfeatures", short))}
    (shard,) = write_shards(tmp_path, [("0", parts), ("1", {"features": parts["features"]})])
    both, one = index_shard(shard)
    for example, is_short, values in ((both, False, whole), (both, True, short), (one, True, whole)):
        bits = reader("float16").read(example, short=is_short)
        assert torch.equal(torch.from_numpy(bits.copy()).view(torch.float16), torch.tensor(values).half())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("number", [np.nan, -np.nan, np.inf, -np.inf])
def test_features_that_are_not_finite_are_broken(dtype: str, number: float, tmp_path: Path) -> None:
    data = stored([[0.0, 1.0, number, 2.0]], getattr(torch, dtype))
    with pytest.raises(BadExampleError, match="features that are not finite; extract them again") as error:
        reader(dtype).read(example_with_features(tmp_path, data), short=False)
    assert error.value.reason == "broken features"


@pytest.mark.parametrize("size", [1, 2 * WIDTH - 2, 2 * WIDTH * (LENGTH + 1)])
def test_features_of_another_size_are_broken(size: int, tmp_path: Path) -> None:
    with pytest.raises(BadExampleError, match=f"has {size} bytes of features, not 1 to {LENGTH} tokens"):
        reader("bfloat16").read(example_with_features(tmp_path, bytes(size)), short=False)
