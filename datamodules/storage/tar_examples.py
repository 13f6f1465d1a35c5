"""Which members of a tar file are one example.

By webdataset's rule a member's name is its example's key up to the first dot of the file's name, and what follows is the
part's extension: ``22.05.jpg`` is the part ``05.jpg`` of example ``22``. Files in the wild also have dots in their keys,
and several parts of a kind, and their parts lie anywhere in the shard. So members are put together when all are known.
"""

import re
from dataclasses import dataclass, field

from datamodules.storage.bad_examples import Skipped
from datamodules.storage.index import IMAGES, NO_LABEL, OTHER_IMAGES

NUMBER = re.compile(r"[0-9.]+")
UNCLEAR = "unclear parts"

Place = tuple[int, int]
"""Offset and size of a member."""


@dataclass(slots=True)
class Row:
    """The members of one name but for their known extensions.

    Attributes:
        base: the key by webdataset's rule.
        more: what stands between that and the known extension, '' mostly.
        parts: place of each part by extension; (−1, −1) for an image of a kind that is not read.
        label: class, of its cls part.
        apart: some of its parts lie apart from others, with another example between.
    """

    base: str
    more: str
    parts: dict[str, Place] = field(default_factory=dict)
    label: int = NO_LABEL
    apart: bool = False

    @property
    def key(self) -> str:
        """With what stands between, which may be a part of the key."""
        return f"{self.base}.{self.more}" if self.more else self.base

    @property
    def has_content(self) -> bool:
        """Whether it has an image or codes, and not only what belongs to one."""
        return any(_is_content(extension) for extension in self.parts)

    @property
    def has_notes(self) -> bool:
        """Whether it has what belongs to an image or codes: a class, a caption."""
        return not all(_is_content(extension) for extension in self.parts)

    @property
    def has_number(self) -> bool:
        """Whether what stands between is a number: a part of the key, and no name of a part."""
        return NUMBER.fullmatch(self.more) is not None

    def take(self, other: "Row") -> None:
        """Take the parts of another row, instead of its own ones of the same kinds."""
        self.parts |= other.parts
        if "cls" in other.parts:
            self.label = other.label


class TarExamples:
    """The examples of a tar file, from its members in their order.

    Args:
        shard: name of the file, for messages.
    """

    def __init__(self, shard: str) -> None:
        self.shard = shard
        self.rows: list[Row] = []
        self._latest: dict[str, Row] = {}
        self._repeated: set[str] = set()
        self._base: str | None = None

    def add(self, base: str, more: str, extension: str, place: Place, label: int = NO_LABEL) -> None:
        """Add a member, to its example's parts before it, or to a new example if these have one of the kind.

        Args:
            base: see :class:`Row`.
            more: see :class:`Row`.
            extension: one that is known.
            place: of its bytes.
            label: class that it holds, if it is a cls part.
        """
        key = f"{base}.{more}" if more else base
        row = self._latest.get(key)
        if row is None or extension in row.parts:
            if row is not None:
                self._repeated.add(key)
            row = self._latest[key] = Row(base, more)
            self.rows.append(row)
        elif base != self._base:
            row.apart = True
        row.parts[extension] = place
        if extension == "cls":
            row.label = label
        self._base = base

    def lose(self, key: str) -> str:
        """Drop the example in which the file ends, as far as that can be told.

        Args:
            key: of the member in which it ends, '' if it ends between two.

        Returns:
            The key of the lost example, '' if it is not known.
        """
        last = self.rows[-1] if self.rows else None
        if last is not None and not key:
            # Where no next example has begun, the last one may be cut off between its parts.
            others: set[str] = set().union(*(row.parts for row in self.rows[:-1]))
            key = last.key if others - set(last.parts) else ""
        if (row := self._latest.get(key)) is not None:
            self.rows = [other for other in self.rows if other is not row]
        return key

    def finish(self) -> tuple[list[tuple[str, Row]], list[Skipped]]:
        """Put together what belongs together.

        Returns:
            Key and parts of each example, and those of which it is not clear what belongs to them.
        """
        bad: list[Skipped] = []
        rows = self._join_repeated(self.rows, bad) if self._repeated else self.rows
        families: dict[str, list[Row]] = {row.base: [] for row in rows if row.more}
        if not families:
            return [(row.key, row) for row in rows], bad
        for row in rows:
            if row.base in families:
                families[row.base].append(row)
        keys: dict[int, str] = {}
        for base, family in families.items():
            for key, row in self._join_family(base, family, bad):
                keys[id(row)] = key
        found = []
        for row in rows:
            if row.base not in families:
                found.append((row.key, row))
            elif id(row) in keys:
                found.append((keys[id(row)], row))
        return found, bad

    def _join_repeated(self, rows: list[Row], bad: list[Skipped]) -> list[Row]:
        """Examples that come again: a part alone takes the place of the former one, as when tar unpacks the file."""
        groups: dict[str, list[Row]] = {key: [] for key in self._repeated}
        for row in rows:
            if row.key not in groups:
                continue
            group = groups[row.key]
            if group and set(row.parts) < set(group[-1].parts):
                group[-1].take(row)
            else:
                group.append(row)
        kept = {id(row) for group in groups.values() for row in group}
        for key, group in groups.items():
            if len(group) > 1 and any(row.apart for row in group):
                kept -= {id(row) for row in group}
                story = self._unclear(key, "comes several times, with its parts apart from each other")
                bad += [story] * len(group)
        return [row for row in rows if row.key not in groups or id(row) in kept]

    def _join_family(self, base: str, family: list[Row], bad: list[Skipped]) -> list[tuple[str, Row]]:
        """The examples among rows of one key by webdataset's rule: one of them, or one for each key with a dot."""
        apart = [(row.key, row) for row in family]
        plain = [row for row in family if not row.more]
        if any(row.has_content for row in plain):
            # Masks, depths and other views: parts of the example that nobody reads, but for a class.
            parts = [row for row in family if row.more and not (row.has_number and row.has_content)]
            labels = [row for row in parts if "cls" in row.parts and not row.has_number]
            if len(plain) == len(labels) == 1 and "cls" not in plain[0].parts:
                plain[0].parts["cls"], plain[0].label = labels[0].parts["cls"], labels[0].label
            dropped = {id(row) for row in parts}
            return [(row.key, row) for row in family if id(row) not in dropped]
        images = [row for row in family if row.has_content]
        notes = [row for row in family if not row.has_content]
        if not images or not notes or any(row.has_number for row in family):
            return apart
        kinds = [kind for row in [*images, *notes] for kind in row.parts]
        if len(images) == 1 and len(set(kinds)) == len(kinds):
            for row in notes:
                images[0].take(row)
            return [(base, images[0])]
        if any(row.has_notes for row in images):
            return apart
        names = ", ".join(f"{row.more}.{kind}" if row.more else kind for row in family for kind in row.parts)
        bad.append(self._unclear(base, f"has the parts {names[:200]}"))
        return []

    def _unclear(self, key: str, what: str) -> Skipped:
        story = (
            f"example {key} of {self.shard} {what}, so what belongs together is not known; give each image a key of its "
            "own, and its parts the same key"
        )
        return Skipped(-1, key, UNCLEAR, story)


def _is_content(extension: str) -> bool:
    return extension in IMAGES or extension in OTHER_IMAGES or extension == "npy"
