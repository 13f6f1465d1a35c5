"""Class names: from any words of a name to the number of its class. Plain Python, no other imports."""

import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from functools import cache
from pathlib import Path

IMAGENET_FILE = Path(__file__).with_name("imagenet_classes.tsv")
"""The 1,000 classes of ImageNet in their usual order: WordNet id, tab, names. Names are WordNet 3.0's
(© 2006 Princeton University, https://wordnet.princeton.edu/license-and-commercial-use)."""
MAX_LISTED = 8


class ClassNames:
    """The names of a model's classes.

    Args:
        names: names of each class, in the order of their numbers; each in one text, with synonyms separated by commas.
        ids: another name of each class, such as the name of its folder. It is found, but not shown.

    Raises:
        ValueError: if there are not as many ids as names.
    """

    def __init__(self, names: Sequence[str], ids: Sequence[str] | None = None) -> None:
        if ids is not None and len(ids) != len(names):
            raise ValueError(f"{len(ids)} ids were given for {len(names)} classes; give one for each class")
        self.names, self.ids = tuple(names), None if ids is None else tuple(ids)
        self._exact: dict[str, list[int]] = {}
        self._words: dict[str, set[int]] = {}
        for number, name in enumerate(names):
            synonyms = {_normal(part) for part in (name, *name.split(","), *((ids[number],) if ids else ()))}
            for synonym in synonyms - {""}:
                self._exact.setdefault(synonym, []).append(number)
                for word in synonym.split():
                    self._words.setdefault(word, set()).add(number)

    def __len__(self) -> int:
        """Number of classes."""
        return len(self.names)

    def __getitem__(self, number: int) -> str:
        """First name of a class, for display."""
        return self.names[number].partition(",")[0].strip()

    def find(self, wanted: str | int) -> int:
        """Number of a class.

        Args:
            wanted: a number; or a name, or some words of one, in any case. A whole name takes precedence over classes
                that only contain its words, "tiger" is not the tiger cat, and over numbers, if classes are named "10".

        Raises:
            ValueError: in one line with near names, if there is no such class, or several.
        """
        if not isinstance(wanted, str):
            return self._number(wanted)
        text = _normal(wanted)
        if found := self._exact.get(text):
            return self._only(wanted, found)
        if re.fullmatch("-?[0-9]{1,9}", wanted.strip()):
            return self._number(int(wanted))
        if found := sorted(set.intersection(*(self._words.get(word, set()) for word in text.split() or [""]))):
            return self._only(wanted, found)
        near = self._near(text)
        hint = f"near it are {self._listed(near)}" if near else f"the classes are {self._listed(range(len(self)))}"
        raise ValueError(f"there is no class {wanted!r:.60}; {hint}")

    def _number(self, wanted: int) -> int:
        if isinstance(wanted, bool) or not hasattr(wanted, "__index__") or not 0 <= wanted < len(self):
            raise ValueError(f"class {wanted!r:.40} was requested, but the model has classes 0 to {len(self) - 1}")
        return wanted.__index__()

    def _only(self, wanted: str, found: Sequence[int]) -> int:
        if len(found) > 1:
            raise ValueError(
                f"{wanted!r:.60} fits {len(found)} classes: {self._listed(found)}; give more words or a number"
            )
        return found[0]

    def _near(self, text: str) -> list[int]:
        names = get_close_matches(text, self._exact, MAX_LISTED, 0.6)
        for word in text.split():
            names += get_close_matches(word, self._words, 3, 0.7)
        found = [
            number for name in names for number in (*self._exact.get(name, ()), *sorted(self._words.get(name, ())))
        ]
        return list(dict.fromkeys(found))

    def _listed(self, numbers: Iterable[int]) -> str:
        numbers = list(numbers)
        first = [self[number] for number in numbers]
        # All names of a class whose first name is also another's, such as the two cranes.
        shown = ", ".join(
            f"{number} ({name if first.count(name) == 1 else self.names[number]})"
            for number, name in list(zip(numbers, first, strict=True))[:MAX_LISTED]
        )
        return shown if len(numbers) <= MAX_LISTED else f"{shown} and {len(numbers) - MAX_LISTED} more"


@cache
def imagenet_classes() -> ClassNames:
    """Names of ImageNet's 1,000 classes, by number; WordNet ids such as "n02099601" are found, too."""
    ids, names = zip(*(line.split("\t") for line in IMAGENET_FILE.read_text().splitlines()), strict=True)
    return ClassNames(names, ids)


def class_names_of(names: Sequence[str] | None, count: int) -> ClassNames | None:
    """Names of a model's classes.

    Args:
        names: names of the classes of its dataset, in the order of their numbers, if known.
        count: number of classes of the model. Those beyond the names are named by their numbers.

    Returns:
        The names; ImageNet's if there are none and the model has 1,000 classes; otherwise None.
    """
    if names and len(names) <= count:
        return named_classes([*names, *map(str, range(len(names), count))])
    return imagenet_classes() if count == len(imagenet_classes()) else None


def named_classes(names: Sequence[str]) -> ClassNames:
    """Class names of a dataset. Folders named by WordNet ids of ImageNet get ImageNet's names."""
    imagenet = imagenet_classes()
    try:
        known = [imagenet.names[imagenet.find(name)] if re.fullmatch(r"n\d{8}", name) else name for name in names]
    except ValueError:  # ids of other classes of WordNet
        return ClassNames(names)
    return ClassNames(known, names)


def _normal(text: str) -> str:
    """Lower case, words separated by single spaces, without punctuation."""
    return " ".join(re.findall(r"[^\W_]+", text.casefold().replace("'", "").replace("’", "")))
