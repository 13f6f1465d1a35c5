"""Which number each class folder gets."""

import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from datamodules.storage.index import MAX_CLASSES

ClassOrder = Literal["auto", "number", "name"]
CLASS_ORDERS: tuple[ClassOrder, ...] = ("auto", "number", "name")

WHOLE_NUMBER = re.compile("[0-9]+")
"""ASCII digits alone: Python's `int` also takes signs, underscores and other scripts."""

MAX_SPARSE = 1000
"""So many classes are always taken from numbers: a part of ImageNet's 1,000 classes keeps their numbers."""

MAX_CLASSES_PER_FOLDER = 10
"""With more classes than this for each folder, numbers are taken to be years or codes."""

MAX_LISTED = 10


class Numbering(NamedTuple):
    """The classes of a dataset of folders.

    Attributes:
        classes: name of each class, by its number; where no folder has a number, the number itself.
        rule: how the folders were numbered, for messages.
        warnings: what may not be as the user wants it, each in one line.
    """

    classes: list[str]
    rule: str
    warnings: list[str]


def number_classes(names: Sequence[str], order: ClassOrder, where: str) -> Numbering:
    """Number class folders: by their names if these are whole numbers, else in the order of their names.

    Args:
        names: of the folders, at least one.
        order: ``number`` wants whole numbers, ``name`` takes the order of the names as text whatever they are, ``auto``
            decides: numbers, unless some names are none, or there would be more than :data:`MAX_SPARSE` classes and
            more than :data:`MAX_CLASSES_PER_FOLDER` for each folder.
        where: the folders are, for messages.

    Raises:
        ValueError: if two names are the same number, or ``number`` cannot be.
    """
    names = sorted(names)
    by_name = Numbering(names, "numbered in the order of their folders' names", [])
    others = [name for name in names if not WHOLE_NUMBER.fullmatch(name)]
    if order == "name":
        return by_name
    if others:
        if order == "number":
            raise ValueError(
                f"class_order is number, but the folder {others[0]} in {where} is no whole number; rename it, or set "
                "class_order to name"
            )
        numbers = [name for name in names if WHOLE_NUMBER.fullmatch(name)]
        wrong = [name for name in numbers if len(name) < len(str(MAX_SPARSE)) and names.index(name) != int(name)]
        if wrong:
            by_name.warnings.append(
                f"{len(numbers)} of {len(names)} class folders in {where} are whole numbers, but {others[0]} is not: "
                f"class numbers are places in the order of names, folder {wrong[0]} is class {names.index(wrong[0])}"
            )
        return by_name
    return _by_number(names, order, where) or _as_text(by_name, where)


def _as_text(by_name: Numbering, where: str) -> Numbering:
    highest = max(by_name.classes, key=int)
    by_name.warnings.append(
        f"the {len(by_name.classes)} class folders in {where} have numbers up to {highest}, too many to be class "
        "numbers, so class numbers are places in the order of names; set class_order to number if they are"
    )
    return by_name


def _by_number(names: list[str], order: ClassOrder, where: str) -> Numbering | None:
    folders: dict[int, str] = {}
    for name in names:
        if len(name.lstrip("0")) > len(str(MAX_CLASSES)):  # also too long for `int`
            number = MAX_CLASSES
        elif (number := int(name)) in folders:
            raise ValueError(
                f"the folders {folders[number]} and {name} in {where} have the same class number; rename or merge "
                "them, or set class_order to name"
            )
        folders[number] = name
    count = max(folders) + 1
    if count > MAX_CLASSES and order == "number":
        raise ValueError(
            f"class_order is number, but the folder {folders[count - 1]} in {where} is more than {MAX_CLASSES - 1}, "
            "the highest class number; set class_order to name"
        )
    if count > MAX_CLASSES or (order == "auto" and count > max(MAX_SPARSE, MAX_CLASSES_PER_FOLDER * len(names))):
        return None
    widths = {len(name) for name in names}
    width = widths.pop() if len(widths) == 1 else 0
    classes = [folders.get(number, str(number).zfill(width)) for number in range(count)]
    warnings = []
    if missing := [str(number) for number in range(count) if number not in folders]:
        more = f" and {len(missing) - MAX_LISTED} more" if len(missing) > MAX_LISTED else ""
        warnings.append(
            f"the class folders in {where} are whole numbers and taken as class numbers, 0 to {count - 1}, but there "
            f"is no folder for {', '.join(missing[:MAX_LISTED])}{more}: {len(missing)} of {count} classes have no images;"
            " set class_order to name to number the folders in the order of their names"
        )
    return Numbering(classes, "numbered by their folders' names, which are whole numbers", warnings)


def far_label(labels: np.ndarray) -> int | None:
    """The highest class number, where it is so far above the number of different ones that it may be a mistake.

    Args:
        labels: (N,) int64, −1 for none.
    """
    different = np.unique(labels[labels >= 0])
    count = int(different[-1]) + 1 if len(different) else 0
    return count - 1 if count > max(MAX_SPARSE, MAX_CLASSES_PER_FOLDER * len(different)) else None


def class_numbers(found: Sequence[str], classes: Sequence[str], where: str) -> dict[str, int]:
    """The number of each class folder, where the classes are known already, for example from training.

    Where the classes are numbers, ``1`` and ``01`` are the same.

    Args:
        found: names of the folders.
        classes: name of each class, by its number.
        where: the folders are, for messages.

    Raises:
        ValueError: if a folder is none of the classes, or two folders are one class.
    """
    numbers = {name: number for number, name in enumerate(classes)}
    if all(WHOLE_NUMBER.fullmatch(name) and int(name) == number for number, name in enumerate(classes)):
        short = {name: int(name) for name in found if WHOLE_NUMBER.fullmatch(name) and len(name) < 100}
        numbers |= {name: number for name, number in short.items() if number < len(classes)}
    labels: dict[int, str] = {}
    for name in found:
        if name not in numbers:
            raise ValueError(
                f"{where} has the class folder {name}, which is none of the {len(classes)} classes of the training "
                "images; rename or remove it"
            )
        if (other := labels.setdefault(numbers[name], name)) != name:
            raise ValueError(f"the folders {other} and {name} in {where} are the same class; rename or merge them")
    return {name: number for number, name in labels.items()}
