"""Features that lie in another set than the codes: which belong to which is found by their keys. N codes."""

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
ADDED = "_"
"""What a :class:`~datamodules.storage.shards.ShardWriter` adds to the keys of repeated examples."""
AT_ONCE = 1 << 16


class PairedFeatures(StoredFeatures):
    """Features in a set of their own.

    Two sets of one source may have other splits and other shards, so a key is looked for in all of the other set. A
    writer adds ``_`` to a key that its shard has already; so ``_`` at the end of a key does not count here. Where a key
    then comes several times, the k-th example of it has the k-th features, training split before validation split. That
    is right only if both sets have the same examples of the key in the same order. So where any key comes several times,
    each must come as often in both sets, or not at all among the features, and the examples that have features must have
    them in their own order.

    The sets are compared as columns of numbers, hashes of keys; the keys themselves when an example is read.

    Args:
        root: folder or address of the set.
        allow_pipe: let ``pipe:`` addresses run their command.

    Raises:
        ValueError: if there are no features, or their description is not as it should be.
    """

    def __init__(self, root: str, allow_pipe: bool = False) -> None:
        train, val, meta = find_sources(root, None, None, HINT, allow_pipe)
        meta = meta or read_meta(root, HINT)  # says what is missing
        sources = [source for source in (train, val) if source is not None and source.shards]
        described = meta.get("format") in (CODES_FORMAT, CAPTIONS_FORMAT) and isinstance(meta.get(FEATURES), Mapping)
        if not described or not sources:
            raise ValueError(f"{META_FILE} of {root} does not describe features of captions; {HINT}")
        super().__init__(meta[FEATURES], root)
        self.described = meta[FEATURES]
        self._sources = sources
        self._index: ExampleIndex | None = None

    def pair(self, codes: Sequence[ExampleIndex], cache: ShardCache, name: str) -> list[np.ndarray]:
        """Find the features of each example.

        Args:
            codes: all examples of each split, also those that cannot be used.
            cache: where remote shards and indexes are kept.
            name: of the set of codes, for messages.

        Returns:
            For each split (N,) int64, numbers of the features; −1 for none.

        Raises:
            ValueError: if no example has any, or it is not clear which ones belong to a repeated key.
        """
        whole = _joined([source.index(cache) for source in self._sources])
        parts = {part: whole.members[part] for part in (FEATURES, SHORT_FEATURES) if part in whole.members}
        self._index = features = ExampleIndex(whole.paths, whole.file_of, whole.keys, parts, whole.labels)
        examples = _joined(codes)
        partners = _partners(examples.keys, features.keys, f"the codes in {name}", f"the features in {self.root}")
        present = parts[FEATURES][:, 0] >= 0 if FEATURES in parts else np.zeros(len(features), bool)
        partners[partners >= 0] = np.where(present[partners[partners >= 0]], partners[partners >= 0], -1)
        if len(examples) and (partners < 0).all():
            raise ValueError(
                f"none of the {len(examples)} examples of the codes in {name} has features in {self.root} (keys like "
                f"{examples.keys[0]!r}, and there {features.keys[0] if len(features) else ''!r}); give features of the "
                "same images' captions"
            )
        return np.split(partners, np.cumsum([len(index) for index in codes])[:-1])

    def example_of(self, index: ExampleIndex, place: int) -> Example:
        """The example that has the features of example ``place``, which must have some.

        Raises:
            BadExampleError: if it has another key after all.
        """
        assert index.partners is not None
        assert self._index is not None
        number, key = int(index.partners[place]), index.keys[place]
        example: Example = self._index[number]
        if example.key.rstrip(ADDED) != key.rstrip(ADDED):
            raise BadExampleError(
                "no caption", f"example {key} has no features in {self.root}; those of {example.key} have its hash"
            )
        return example


def number_of(key: bytes) -> int:
    """A number of 64 bits in the place of a key."""
    return int.from_bytes(blake2b(key, digest_size=8).digest(), "little")


def _numbers(keys: Strings) -> np.ndarray:
    return np.fromiter(map(number_of, _bare(keys)), np.uint64, len(keys))


def _bare(keys: Strings) -> Iterator[bytes]:
    """Keys without what was added to them; never all of them at once."""
    start = 0
    for first in range(0, len(keys), AT_ONCE):
        for end in keys.ends[first : first + AT_ONCE].tolist():
            yield keys.block[start:end].rstrip(ADDED.encode())
            start = end


def _joined(parts: Sequence[ExampleIndex]) -> ExampleIndex:
    return parts[0] if len(parts) == 1 else ExampleIndex.concatenate(parts)


def _partners(codes: Strings, features: Strings, these: str, those: str) -> np.ndarray:
    """For each key of codes which of the features belong to it, −1 for none; the names are for messages."""
    wanted, given = _numbers(codes), _numbers(features)
    order, given_order = np.argsort(wanted, kind="stable"), np.argsort(given, kind="stable")
    wanted, given = wanted[order], given[given_order]
    first, wanted_first = np.searchsorted(given, wanted), np.searchsorted(wanted, wanted)
    count = np.searchsorted(given, wanted, side="right") - first
    wanted_count = np.searchsorted(wanted, wanted, side="right") - wanted_first
    number = np.arange(len(wanted)) - wanted_first  # of the example among those of its key
    unclear = (count > 0) & (count != wanted_count)
    for place in np.flatnonzero(unclear & (number == 0)).tolist():
        ours = [codes[row] for row in order[place : place + wanted_count[place]]]
        theirs = [features[row] for row in given_order[first[place] : first[place] + count[place]]]
        if len({key.rstrip(ADDED) for key in ours + theirs}) == 1:  # else different keys have one hash
            raise ValueError(
                f"the key {ours[0].rstrip(ADDED)!r} comes {len(ours)} times in {these}, but {len(theirs)} times in "
                f"{those}, so what belongs together is not known; extract the features again, with these codes as root"
            )
    paired = (count > 0) & ~unclear
    partners = np.full(len(wanted), -1, np.int64)
    partners[order[paired]] = given_order[first[paired] + number[paired]]
    repeated = np.flatnonzero(paired & (wanted_count > 1))
    if len(repeated) and (np.diff(partners[partners >= 0]) < 0).any():
        raise ValueError(
            f"the key {codes[order[repeated[0]]].rstrip(ADDED)!r} comes {wanted_count[repeated[0]]} times in {these}, "
            f"but {those} are in another order, so what belongs together is not known; extract the features again, "
            "with these codes as root"
        )
    return partners
