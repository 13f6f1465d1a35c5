"""Grouping of the members of a tar file into examples.

By webdataset's rule, the key of a member ends at the first dot of its file name, and the rest is the extension:
``22.05.jpg`` is the member ``05.jpg`` of example ``22``. Real files also have dots in their keys, several members of
one type, and members of one example anywhere in the shard. So members are grouped after all of them have been read.
"""

import re
from dataclasses import dataclass, field

from datamodules.storage.bad_examples import Skipped
from datamodules.storage.index import IMAGES, NO_LABEL, OTHER_IMAGES

NUMBER = re.compile(r"[0-9.]+")
UNCLEAR = "unclear parts"

Location = tuple[int, int]
"""Offset and size of a member."""


@dataclass(slots=True)
class Row:
    """Members whose names differ only in their known extension.

    Attributes:
        base: the key by webdataset's rule.
        infix: the text between the key and the known extension, usually ''.
        members: location of each member by extension; (−1, −1) for an image in an unsupported format.
        label: class in the cls member.
        is_scattered: whether members of other examples are between its members.
    """

    base: str
    infix: str
    members: dict[str, Location] = field(default_factory=dict)
    label: int = NO_LABEL
    is_scattered: bool = False

    @property
    def key(self) -> str:
        """Key with the infix, which may be part of the key."""
        return f"{self.base}.{self.infix}" if self.infix else self.base

    @property
    def has_content(self) -> bool:
        """Whether there is an image or codes."""
        return any(_is_content(extension) for extension in self.members)

    @property
    def has_annotations(self) -> bool:
        """Whether there are members that annotate an image or codes: a class or a caption."""
        return not all(_is_content(extension) for extension in self.members)

    @property
    def infix_is_number(self) -> bool:
        """Whether the infix is a number, and so belongs to the key and does not name a member."""
        return NUMBER.fullmatch(self.infix) is not None

    def merge(self, other: "Row") -> None:
        """Add the members of another row; they replace members with the same extension."""
        self.members |= other.members
        if "cls" in other.members:
            self.label = other.label


class TarExamples:
    """Groups the members of a tar file, added in their order, into examples.

    Args:
        shard: name of the file, for messages.
    """

    def __init__(self, shard: str) -> None:
        self.shard = shard
        self.rows: list[Row] = []
        self._latest: dict[str, Row] = {}
        self._repeated: set[str] = set()
        self._base: str | None = None

    def add(self, base: str, infix: str, extension: str, location: Location, label: int = NO_LABEL) -> None:
        """Add a member to its example, or start a new example if there is already a member with the same extension.

        Args:
            base: see :class:`Row`.
            infix: see :class:`Row`.
            extension: a known extension.
            location: offset and size of the member.
            label: class in the member, if it is a cls member.
        """
        key = f"{base}.{infix}" if infix else base
        row = self._latest.get(key)
        if row is None or extension in row.members:
            if row is not None:
                self._repeated.add(key)
            row = self._latest[key] = Row(base, infix)
            self.rows.append(row)
        elif base != self._base:
            row.is_scattered = True
        row.members[extension] = location
        if extension == "cls":
            row.label = label
        self._base = base

    def drop_truncated(self, key: str) -> str:
        """Drop the example in which the file is truncated, if it can be identified.

        Args:
            key: key of the truncated member, '' if the file ends between two members.

        Returns:
            Key of the lost example, '' if it is not known.
        """
        last = self.rows[-1] if self.rows else None
        if last is not None and not key:
            # The last example is incomplete if it lacks a member that other examples have.
            others: set[str] = set().union(*(row.members for row in self.rows[:-1]))
            key = last.key if others - set(last.members) else ""
        if (row := self._latest.get(key)) is not None:
            self.rows = [other for other in self.rows if other is not row]
        return key

    def finish(self) -> tuple[list[tuple[str, Row]], list[Skipped]]:
        """Group the members.

        Returns:
            Key and members of each example, and the examples whose members are ambiguous.
        """
        bad: list[Skipped] = []
        rows = self._join_repeated(self.rows, bad) if self._repeated else self.rows
        families: dict[str, list[Row]] = {row.base: [] for row in rows if row.infix}
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
        """Resolve repeated keys. A repeated member replaces the earlier one, as when tar unpacks the file."""
        groups: dict[str, list[Row]] = {key: [] for key in self._repeated}
        for row in rows:
            if row.key not in groups:
                continue
            group = groups[row.key]
            if group and set(row.members) < set(group[-1].members):
                group[-1].merge(row)
            else:
                group.append(row)
        kept = {id(row) for group in groups.values() for row in group}
        for key, group in groups.items():
            if len(group) > 1 and any(row.is_scattered for row in group):
                kept -= {id(row) for row in group}
                bad += [self._ambiguous(key, "occurs several times, with other examples between its members")] * len(
                    group
                )
        return [row for row in rows if row.key not in groups or id(row) in kept]

    def _join_family(self, base: str, family: list[Row], bad: list[Skipped]) -> list[tuple[str, Row]]:
        """Group rows with the same key by webdataset's rule: into one example, or one for each key with a dot."""
        separate = [(row.key, row) for row in family]
        plain = [row for row in family if not row.infix]
        if any(row.has_content for row in plain):
            # Masks, depth maps and other views are not read. Only their class is used.
            extras = [row for row in family if row.infix and not (row.infix_is_number and row.has_content)]
            labels = [row for row in extras if "cls" in row.members and not row.infix_is_number]
            if len(plain) == len(labels) == 1 and "cls" not in plain[0].members:
                plain[0].members["cls"], plain[0].label = labels[0].members["cls"], labels[0].label
            dropped = {id(row) for row in extras}
            return [(row.key, row) for row in family if id(row) not in dropped]
        images = [row for row in family if row.has_content]
        annotations = [row for row in family if not row.has_content]
        if not images or not annotations or any(row.infix_is_number for row in family):
            return separate
        kinds = [kind for row in [*images, *annotations] for kind in row.members]
        if len(images) == 1 and len(set(kinds)) == len(kinds):
            for row in annotations:
                images[0].merge(row)
            return [(base, images[0])]
        if any(row.has_annotations for row in images):
            return separate
        names = ", ".join(f"{row.infix}.{kind}" if row.infix else kind for row in family for kind in row.members)
        bad.append(self._ambiguous(base, f"has the members {names[:200]}"))
        return []

    def _ambiguous(self, key: str, problem: str) -> Skipped:
        message = (
            f"example {key} of {self.shard} {problem}, so it is ambiguous which belong together; give each image its "
            "own key, and its class and caption the same key"
        )
        return Skipped(-1, key, UNCLEAR, message)


def _is_content(extension: str) -> bool:
    return extension in IMAGES or extension in OTHER_IMAGES or extension == "npy"
