"""Requests for images of classes."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datamodules.requests.base import RequestDataModule
from datamodules.storage.index import MAX_CLASSES
from datamodules.storage.text_files import decode_text
from llamagen.class_names import ClassNames

CLASS_NUMBER = re.compile("[0-9]{1,9}")
FILE_NAME = re.compile(r"[/\\]|\.\w+$")
"""Found in paths and in names of files, but not in names of classes such as "St. Bernard"."""
NO_NAME = re.compile(r"[\W_]*|[-+\s]*[\d.,\s]+")
"""Texts that are neither names nor numbers of classes."""
ENTRIES = "a list of class numbers and names, or a text file with one of them per line"


def read_classes(path: Path) -> tuple[list[int | str], list[str]]:
    """Read the class numbers and names in a text file, one per line. Blank lines are ignored.

    Returns:
        The numbers and names, and where each stands, for messages.

    Raises:
        ValueError: if the file cannot be read, is empty, or a line is neither a class number nor a name.
    """
    try:
        lines = decode_text(path.read_bytes()).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise ValueError(
            f"classes is {path}, which cannot be read ({reason}); give a number, {ENTRIES}, or one name"
        ) from error
    entries: list[int | str] = []
    places = []
    for number, line in enumerate(lines, 1):
        if text := line.strip():
            entry = _entry(text)
            if entry is None:
                raise ValueError(
                    f"{path}, line {number}: {text[:40]!r} is neither a class number nor a name; write one name, or "
                    f"one integer from 0 to {MAX_CLASSES - 1}, in each line"
                )
            entries.append(entry if _number(entry) < 0 else _number(entry))  # digits in a file are a number
            places.append(f"{path}, line {number}")
    if not entries:
        raise ValueError(f"{path} holds no class numbers or names; write one in each line")
    return entries, places


class ClassRequestDataModule(RequestDataModule):
    """Requests for ``per_class`` images of each class.

    ``predict`` saves the images, ``test`` measures them. Batches hold ``index`` of each image in the run and
    ``condition``, its class, both (B,) int64.

    Args:
        classes: a list of classes; or a number of classes, where 10 means 0 to 9; or a text file with one class per
            line, which may repeat classes, for example 50,000 random labels with ``per_class`` 1; or the name of one
            class. Classes in lists and files are numbers or names: those of the data the model was trained on, or
            ImageNet's if it has 1,000 classes without names. Some words of a name are enough, see
            :meth:`llamagen.class_names.ClassNames.find`. In lists, digits in quotes are a name if a class has it.
        per_class: images per entry of ``classes``.
        batch_size: images per batch and rank.

    Attributes:
        classes: class of each entry, in order. With names, after ``setup``: the model knows them.
    """

    label_name = "class"

    def __init__(
        self, classes: int | list[str | int] | Path | str = 1000, per_class: int = 50, batch_size: int = 64
    ) -> None:
        self._distinct = not isinstance(classes, (str, Path))
        entries: Sequence[int | str | None]
        if isinstance(classes, (str, Path)) and (FILE_NAME.search(str(classes)) or _exists(classes)):
            entries, self._places = read_classes(Path(classes).expanduser())
        else:
            if isinstance(classes, int) and classes > MAX_CLASSES:
                raise ValueError(f"classes is {classes}; it must be at most {MAX_CLASSES}")
            listed = [str(classes)] if isinstance(classes, (str, Path)) else classes
            entries = list(range(listed)) if isinstance(listed, int) else [_entry(each) for each in listed or []]
            self._places = ["classes"] * len(entries)
            if not entries or None in entries or len(set(entries)) < len(entries):
                raise ValueError(
                    f"classes is {classes}; give a positive number of classes, {ENTRIES}, each class once in a list"
                )
        self._entries = [each for each in entries if each is not None]
        self.classes = [_number(each) for each in self._entries]
        super().__init__(self.classes, per_class, batch_size)

    def setup(self, stage: str) -> None:
        """Find the classes that are requested by name among those of the model.

        Raises:
            ValueError: in one line with near names, if one is unknown or ambiguous, or the model's classes have no
                names.
        """
        named = [each for each in self._entries if isinstance(each, str)]
        if not named:
            return
        model = None if self.trainer is None else self.trainer.lightning_module
        names: ClassNames | None = getattr(model, "class_names", None)
        if names is None and all(_number(each) >= 0 for each in named):
            return
        if names is None:
            raise ValueError(
                f"classes has {named[0]!r:.60}, but this model's classes have no names; give numbers of classes, or "
                "prompts (PromptDataModule) if its condition is text"
            )
        found: dict[str, int] = {}
        for entry, place in zip(self._entries, self._places, strict=True):
            if isinstance(entry, str) and entry not in found:
                try:
                    found[entry] = names.find(entry)
                except ValueError as error:
                    raise ValueError(f"{place}: {error}") from error
        self.classes = [each if isinstance(each, int) else found[each] for each in self._entries]
        if self._distinct and len(set(self.classes)) < len(self.classes):
            twice = next(each for each in self.classes if self.classes.count(each) > 1)
            both = [repr(entry) for entry, label in zip(self._entries, self.classes, strict=True) if label == twice]
            raise ValueError(f"classes has {' and '.join(both)}, which are all class {twice}; give each class once")
        self.set_labels(self.classes)

    def request(self, index: int) -> dict[str, Any]:
        """``index`` of the image in the run and ``condition``, its class."""
        return {"index": index, "condition": int(self.labels[index])}


def _entry(value: Any) -> int | str | None:
    """A class number, or the name of a class; None if it is neither. A text of digits may be a name or a number."""
    if isinstance(value, str):
        text = value.strip()
        is_valid = int(text) < MAX_CLASSES if CLASS_NUMBER.fullmatch(text) else not NO_NAME.fullmatch(text)
        return text if is_valid else None
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MAX_CLASSES else None


def _number(entry: int | str) -> int:
    """Number of a class; −1 for a name. Names of digits are known in ``setup``."""
    if isinstance(entry, int):
        return entry
    return int(entry) if CLASS_NUMBER.fullmatch(entry) else -1


def _exists(path: Path | str) -> bool:
    try:
        return Path(path).exists()
    except OSError:  # a list of names, too long for a path
        return False
