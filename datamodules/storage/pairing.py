"""Pairing of codes with caption features in another dataset, by key. N: examples with codes."""

from collections.abc import Iterator, Mapping, Sequence
from hashlib import blake2b

import numpy as np

from datamodules.storage.bad_examples import BadExampleError
from datamodules.storage.features import StoredFeatures
from datamodules.storage.index import FEATURES, SHORT_FEATURES, Example, ExampleIndex, Strings
from datamodules.storage.remote import ShardCache
from datamodules.storage.shards import CAPTIONS_FORMAT, CODES_FORMAT, META_FILE, read_meta
from datamodules.storage.sources import find_sources

HINT = "write features of the captions first, with `python main.py predict` and configs/text/extract.yaml"
REPEAT_SUFFIX = "_"
"""Suffix that :class:`~datamodules.storage.shards.ShardWriter` adds to repeated keys."""
CHUNK = 1 << 16
"""Number of keys in memory at once."""


class PairedFeatures(StoredFeatures):
    """Reader of caption features in a separate dataset.

    Two datasets made from one source may have different splits and shards, so a key is searched in both splits. A
    writer appends ``_`` to repeated keys, so ``_`` at the end of a key is ignored here. If a key then occurs several
    times, its k-th example gets the k-th features, where the training split comes before the validation split. This is
    correct only if both datasets have the same examples in the same order. So if any key is repeated, each key must
    occur equally often in both datasets, or not at all among the features, and the order of the features must be that
    of the codes.

    The datasets are compared by 64-bit hashes of the keys, in columns. The keys are compared when an example is read.

    Args:
        root: folder or address of the dataset of features.
        allow_pipe: let ``pipe:`` addresses run their command.

    Raises:
        ValueError: if there are no features, or ``meta.json`` is invalid.
    """

    def __init__(self, root: str, allow_pipe: bool = False) -> None:
        train, val, meta = find_sources(root, None, None, HINT, allow_pipe)
        meta = meta or read_meta(root, HINT)  # raises an error if the folder or its meta.json is missing
        sources = [source for source in (train, val) if source is not None and source.shards]
        is_valid = meta.get("format") in (CODES_FORMAT, CAPTIONS_FORMAT) and isinstance(meta.get(FEATURES), Mapping)
        if not is_valid or not sources:
            raise ValueError(f"{META_FILE} of {root} does not describe caption features; {HINT}")
        super().__init__(meta[FEATURES], root)
        self.description = meta[FEATURES]
        self._sources = sources
        self._index: ExampleIndex | None = None

    def pair(self, codes: Sequence[ExampleIndex], cache: ShardCache, name: str) -> list[np.ndarray]:
        """Find the features of each example.

        Args:
            codes: index of each split of the codes, including examples that cannot be used.
            cache: cache for remote shards and indexes.
            name: name of the dataset of codes, for messages.

        Returns:
            For each split, numbers of the features, (N,) int64, −1 for none.

        Raises:
            ValueError: if no example has features, or the features of a repeated key are ambiguous.
        """
        index = _concatenated([source.index(cache) for source in self._sources])
        members = {name: index.members[name] for name in (FEATURES, SHORT_FEATURES) if name in index.members}
        self._index = features = ExampleIndex(index.paths, index.file_of, index.keys, members, index.labels)
        examples = _concatenated(codes)
        partners = _match(examples.keys, features.keys, f"the codes in {name}", f"the features in {self.root}")
        present = members[FEATURES][:, 0] >= 0 if FEATURES in members else np.zeros(len(features), bool)
        partners[partners >= 0] = np.where(present[partners[partners >= 0]], partners[partners >= 0], -1)
        if len(examples) and (partners < 0).all():
            raise ValueError(
                f"none of the {len(examples)} examples of the codes in {name} has features in {self.root} (keys like "
                f"{examples.keys[0]!r}, but {features.keys[0] if len(features) else ''!r} in the features); give "
                "caption features of the same images"
            )
        return np.split(partners, np.cumsum([len(index) for index in codes])[:-1])

    def example_with_features(self, index: ExampleIndex, number: int) -> Example:
        """Example that holds the features of example ``number``, which must have features.

        Raises:
            BadExampleError: if the keys differ although their hashes are equal.
        """
        assert index.partners is not None
        assert self._index is not None
        key = index.keys[number]
        example: Example = self._index[int(index.partners[number])]
        if example.key.rstrip(REPEAT_SUFFIX) != key.rstrip(REPEAT_SUFFIX):
            raise BadExampleError(
                "no caption", f"example {key} has no features in {self.root}; key {example.key} has the same hash"
            )
        return example


def key_hash(key: bytes) -> int:
    """64-bit hash of a key."""
    return int.from_bytes(blake2b(key, digest_size=8).digest(), "little")


def _hashes(keys: Strings) -> np.ndarray:
    return np.fromiter(map(key_hash, _without_suffix(keys)), np.uint64, len(keys))


def _without_suffix(keys: Strings) -> Iterator[bytes]:
    """Keys without the suffix of repeated keys, with at most :data:`CHUNK` of them in memory."""
    start = 0
    for first in range(0, len(keys), CHUNK):
        for end in keys.ends[first : first + CHUNK].tolist():
            yield keys.block[start:end].rstrip(REPEAT_SUFFIX.encode())
            start = end


def _concatenated(parts: Sequence[ExampleIndex]) -> ExampleIndex:
    return parts[0] if len(parts) == 1 else ExampleIndex.concatenate(parts)


def _match(codes: Strings, features: Strings, code_name: str, feature_name: str) -> np.ndarray:
    """Number of the features that belong to each key of the codes, −1 for none; the names are for messages."""
    wanted, given = _hashes(codes), _hashes(features)
    order, given_order = np.argsort(wanted, kind="stable"), np.argsort(given, kind="stable")
    wanted, given = wanted[order], given[given_order]
    first, wanted_first = np.searchsorted(given, wanted), np.searchsorted(wanted, wanted)
    count = np.searchsorted(given, wanted, side="right") - first
    wanted_count = np.searchsorted(wanted, wanted, side="right") - wanted_first
    number = np.arange(len(wanted)) - wanted_first  # of the example among those with the same key
    ambiguous = (count > 0) & (count != wanted_count)
    for row in np.flatnonzero(ambiguous & (number == 0)).tolist():
        code_keys = [codes[place] for place in order[row : row + wanted_count[row]]]
        feature_keys = [features[place] for place in given_order[first[row] : first[row] + count[row]]]
        if len({key.rstrip(REPEAT_SUFFIX) for key in code_keys + feature_keys}) == 1:  # otherwise only the hashes agree
            raise ValueError(
                f"the key {code_keys[0].rstrip(REPEAT_SUFFIX)!r} occurs {len(code_keys)} times in {code_name}, but "
                f"{len(feature_keys)} times in {feature_name}, so the pairing is ambiguous; extract the features "
                "again, with these codes as root"
            )
    paired = (count > 0) & ~ambiguous
    partners = np.full(len(wanted), -1, np.int64)
    partners[order[paired]] = given_order[first[paired] + number[paired]]
    repeated = np.flatnonzero(paired & (wanted_count > 1))
    if len(repeated) and (np.diff(partners[partners >= 0]) < 0).any():
        raise ValueError(
            f"the key {codes[order[repeated[0]]].rstrip(REPEAT_SUFFIX)!r} occurs {wanted_count[repeated[0]]} times in "
            f"{code_name}, but {feature_name} are in another order, so the pairing is ambiguous; extract the features "
            "again, with these codes as root"
        )
    return partners
