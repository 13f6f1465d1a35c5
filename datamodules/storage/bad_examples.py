"""Examples that cannot be used: skipped, counted by reason, and fatal where they are too many."""

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

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
"""Why an example may be skipped. All ranks count in this order."""

MAX_LISTED = 5


class BadExampleError(ValueError):
    """An example that cannot be used.

    Args:
        reason: one of :data:`REASONS`.
        message: the whole story in one line, with key and place.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Skipped(NamedTuple):
    """An example that was skipped.

    Attributes:
        number: of the example within its split; −1 if it never got one.
        key: its key, or what is known of it.
        reason: one of :data:`REASONS`.
        message: the whole story in one line.
    """

    number: int
    key: str
    reason: str
    message: str


class Tally:
    """Counts what was skipped of a split, and raises when it is too much.

    Args:
        split: name of the split, for messages.
        count: usable examples that an epoch should have, over all ranks.
        known: what was found to be bad before any example was read, the same on every rank.
        max_share: greatest tolerable share of bad examples.
        keep: remember every skipped example, not only examples.
        alone: judge while reading. A rank among others must not: it would leave them waiting.

    Raises:
        ValueError: if what is known is too much already.
    """

    def __init__(
        self,
        split: str,
        count: int,
        known: Iterable[Skipped] = (),
        max_share: float = 0.05,
        keep: bool = False,
        alone: bool = True,
    ) -> None:
        self.split, self.known, self.max_share, self.keep, self.alone = split, list(known), max_share, keep, alone
        self.total = count + len(self.known)
        self.opened = 0
        self.counts: Counter[str] = Counter()
        self.seen: list[Skipped] = []
        self._check(0)

    def add(self, skipped: Iterable[Skipped], opened: int = 0) -> None:
        """Count examples that this rank skipped.

        Args:
            skipped: the examples.
            opened: examples, good and bad, of shards whose headers told of some of them; the share is one of these, too.

        Raises:
            ValueError: if they are too many, unless other ranks are to be asked.
        """
        self.opened += opened
        for example in skipped:
            self.counts[example.reason] += 1
            if self.keep or len(self.seen) < MAX_LISTED:
                self.seen.append(example)
        if self.alone:
            self._check(self.counts.total())

    def check(self, counts: Iterable[int], opened: int = 0) -> None:
        """Judge the sum over all ranks.

        Args:
            counts: number for each of :data:`REASONS` that ranks skipped while reading.
            opened: see :meth:`add`.

        Raises:
            ValueError: if it is too much.
        """
        self.counts, self.opened = Counter(dict(zip(REASONS, counts, strict=True))), opened
        self._check(self.counts.total())

    def _check(self, read: int) -> None:
        bad, total = read + len(self.known), self.total + self.opened
        if bad > self.max_share * total:
            raise ValueError(
                f"{bad} of {total} examples of {self.split} cannot be used, more than max_bad_share "
                f"{self.max_share:g} ({self.describe()}); mend the data, or raise max_bad_share"
            )

    def by_reason(self) -> Counter[str]:
        """Numbers by reason, with what was known before reading."""
        return +self.counts + Counter(example.reason for example in self.known)

    def describe(self) -> str:
        """Numbers by reason, and an example, in one line."""
        numbers = ", ".join(f"{reason}: {count}" for reason, count in sorted(self.by_reason().items()))
        examples = [example.message for example in (*self.seen, *self.known)][:1]
        return "; e.g. ".join([numbers, *examples])

    def reset(self) -> None:
        """Begin the next epoch."""
        self.opened = 0
        self.counts.clear()
        self.seen.clear()
