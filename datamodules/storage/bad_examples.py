"""Bad examples: skipped, counted by reason, and an error if there are too many."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

REASONS = (
    "truncated shard",
    "empty file",
    "no image",
    "broken image",
    "too many pixels",
    "no label",
    "wrong label",
    "no caption",
    "no codes",
    "broken codes",
    "broken features",
    "unclear parts",
)
"""Reasons why an example may be skipped. All ranks count in this order."""

RENAMED_REASONS = {"no picture": "no image", "broken picture": "broken image"}
"""Current name of each reason that earlier versions wrote."""

MAX_LISTED = 5


class BadExampleError(ValueError):
    """Raised for an example that cannot be used.

    Args:
        reason: one of :data:`REASONS`.
        message: full description in one line, with key and location.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Skipped(NamedTuple):
    """A bad example that was skipped.

    Attributes:
        number: number of the example in its split; −1 if it is not in the index.
        key: its key, '' if unknown.
        reason: one of :data:`REASONS`.
        message: full description in one line.
    """

    number: int
    key: str
    reason: str
    message: str

    @classmethod
    def from_record(cls, record: Sequence[Any]) -> "Skipped":
        """Convert a list from a file, which an earlier version may have written."""
        number, key, reason, message = record
        return cls(number, key, RENAMED_REASONS.get(reason, reason), message)


class Tally:
    """Counts the bad examples of a split and raises an error when there are too many.

    Args:
        split: name of the split, for messages.
        count: examples in the index, over all ranks.
        rejected: bad examples found while indexing, the same on every rank.
        max_share: maximum share of bad examples.
        keep: remember all skipped examples, not only the first few.
        alone: check the share while reading. With several ranks only :meth:`check` may raise, on all ranks at once;
            otherwise the other ranks would wait forever.

    Attributes:
        rejected: bad examples found while indexing.
        skipped: bad examples found by this rank while reading.

    Raises:
        ValueError: if there are too many rejected examples.
    """

    def __init__(
        self,
        split: str,
        count: int,
        rejected: Iterable[Skipped] = (),
        max_share: float = 0.05,
        keep: bool = False,
        alone: bool = True,
    ) -> None:
        self.split, self.rejected, self.max_share, self.keep, self.alone = split, list(rejected), max_share, keep, alone
        self.total = count + len(self.rejected)
        self.opened = 0
        self.counts: Counter[str] = Counter()
        self.skipped: list[Skipped] = []
        self._check(0)

    def add(self, skipped: Iterable[Skipped], opened: int = 0) -> None:
        """Count examples that this rank skipped.

        Args:
            skipped: the examples.
            opened: in a stream, good and bad examples of newly indexed shards. They count in the total of the share.

        Raises:
            ValueError: if there are too many and this is the only rank.
        """
        self.opened += opened
        for example in skipped:
            self.counts[example.reason] += 1
            if self.keep or len(self.skipped) < MAX_LISTED:
                self.skipped.append(example)
        if self.alone:
            self._check(self.counts.total())

    def check(self, counts: Iterable[int], opened: int = 0) -> None:
        """Check the share of bad examples over all ranks.

        Args:
            counts: examples skipped while reading, for each of :data:`REASONS`, summed over ranks.
            opened: see :meth:`add`, summed over ranks.

        Raises:
            ValueError: if there are too many.
        """
        self.counts, self.opened = Counter(dict(zip(REASONS, counts, strict=True))), opened
        self._check(self.counts.total())

    def _check(self, read: int) -> None:
        bad, total = read + len(self.rejected), self.total + self.opened
        if bad > self.max_share * total:
            raise ValueError(
                f"{bad} of {total} examples of {self.split} are bad, more than max_bad_share "
                f"{self.max_share:g} ({self.describe()}); fix the data, or increase max_bad_share"
            )

    def by_reason(self) -> Counter[str]:
        """Number of rejected and skipped examples by reason."""
        return +self.counts + Counter(example.reason for example in self.rejected)

    def describe(self) -> str:
        """Numbers by reason and the first message, in one line."""
        numbers = ", ".join(f"{reason}: {count}" for reason, count in sorted(self.by_reason().items()))
        first = [example.message for example in (*self.skipped, *self.rejected)][:1]
        return "; e.g. ".join([numbers, *first])

    def reset(self) -> None:
        """Start the next epoch."""
        self.opened = 0
        self.counts.clear()
        self.skipped.clear()
