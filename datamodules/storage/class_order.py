"""Numbering of class folders."""

import re
from argparse import ArgumentParser
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from datamodules.storage.index import MAX_CLASSES

ClassOrder = Literal["auto", "number", "name"]
CLASS_ORDERS: tuple[ClassOrder, ...] = ("auto", "number", "name")

INTEGER = re.compile("[0-9]+")
"""ASCII digits only. footgun: Python's `int` also accepts signs, underscores and digits of other scripts."""

MAX_SPARSE = 1000
"""Up to this number of classes, integers are always class numbers: a subset of ImageNet keeps its class numbers."""

MAX_CLASSES_PER_FOLDER = 10
"""Above this ratio of classes to folders, integers are taken for names, such as years."""

MAX_LISTED = 10


def add_class_order(parser: ArgumentParser) -> None:
    """Add the option ``--class_order`` to a command."""
    parser.add_argument(
        "--class_order",
        choices=CLASS_ORDERS,
        default="auto",
        help="number class folders by the integers in their names, or in the order of their names (default: auto, by "
        "number if all names are integers)",
    )


class Numbering(NamedTuple):
    """Classes of a dataset of folders.

    Attributes:
        classes: name of each class, by its number; for a number without a folder, the number itself.
        rule: how the folders were numbered, for messages.
        warnings: possible mistakes of the user, each in one line.
    """

    classes: list[str]
    rule: str
    warnings: list[str]


def number_classes(names: Sequence[str], order: ClassOrder, where: str) -> Numbering:
    """Number class folders by their names, if these are integers, or otherwise in the order of their names.

    Args:
        names: names of the folders, at least one.
        order: ``number`` requires integers. ``name`` always uses the order of the names, as text. ``auto`` uses
            integers as class numbers, unless some names are not integers, or there would be more than
            :data:`MAX_SPARSE` classes and more than :data:`MAX_CLASSES_PER_FOLDER` per folder.
        where: folder that contains them, for messages.

    Raises:
        ValueError: if two names are the same number, or ``order`` is ``number`` and a name is not a valid class number.
    """
    names = sorted(names)
    by_name = Numbering(names, "numbered in the order of their folders' names", [])
    others = [name for name in names if not INTEGER.fullmatch(name)]
    if order == "name":
        return by_name
    if others:
        if order == "number":
            raise ValueError(
                f"class_order is number, but the folder {others[0]} in {where} is not an integer; rename it, or set "
                "class_order to name"
            )
        numbers = [name for name in names if INTEGER.fullmatch(name)]
        wrong = [name for name in numbers if len(name) < len(str(MAX_SPARSE)) and names.index(name) != int(name)]
        if wrong:
            by_name.warnings.append(
                f"{len(numbers)} of {len(names)} class folders in {where} are integers, but {others[0]} is not, so "
                f"folders are numbered in the order of their names: folder {wrong[0]} is class {names.index(wrong[0])}"
            )
        return by_name
    return _by_number(names, order, where) or _as_text(by_name, where)


def _as_text(by_name: Numbering, where: str) -> Numbering:
    highest = max(by_name.classes, key=int)
    by_name.warnings.append(
        f"the {len(by_name.classes)} class folders in {where} have numbers up to {highest}, too high for class "
        "numbers, so folders are numbered in the order of their names; set class_order to number if they are class "
        "numbers"
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
            f"class_order is number, but the folder {folders[count - 1]} in {where} is greater than {MAX_CLASSES - 1}, "
            "the maximum class number; set class_order to name"
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
            f"the class folders in {where} are integers and used as class numbers, 0 to {count - 1}, but there is no "
            f"folder for {', '.join(missing[:MAX_LISTED])}{more}: {len(missing)} of {count} classes have no images; "
            "set class_order to name to number the folders in the order of their names"
        )
    return Numbering(classes, "numbered by the integers in their folders' names", warnings)


def outlying_label(labels: np.ndarray) -> int | None:
    """The highest class number, if it is so far above the number of different classes that it may be a mistake.

    Args:
        labels: (N,) int64, −1 for none.
    """
    different = np.unique(labels[labels >= 0])
    count = int(different[-1]) + 1 if len(different) else 0
    return count - 1 if count > max(MAX_SPARSE, MAX_CLASSES_PER_FOLDER * len(different)) else None


def class_numbers(found: Sequence[str], classes: Sequence[str], where: str) -> dict[str, int]:
    """Find the class numbers of folders among given classes, for example those of the training split.

    If the classes are numbers, ``1`` and ``01`` are the same class.

    Args:
        found: names of the folders.
        classes: name of each class, by its number.
        where: folder that contains them, for messages.

    Raises:
        ValueError: if a folder is not among the classes, or two folders are the same class.
    """
    numbers = {name: number for number, name in enumerate(classes)}
    if all(INTEGER.fullmatch(name) and int(name) == number for number, name in enumerate(classes)):
        short = {name: int(name) for name in found if INTEGER.fullmatch(name) and len(name) < 100}
        numbers |= {name: number for name, number in short.items() if number < len(classes)}
    labels: dict[int, str] = {}
    for name in found:
        if name not in numbers:
            raise ValueError(
                f"{where} has the class folder {name}, which is not among the {len(classes)} classes of the training "
                "images; rename or remove it"
            )
        if (other := labels.setdefault(numbers[name], name)) != name:
            raise ValueError(f"the folders {other} and {name} in {where} are the same class; rename or merge them")
    return {name: number for number, name in labels.items()}
