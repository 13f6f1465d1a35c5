"""Options of data modules, checked when they are constructed: one line with the option, its value and its range."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def check_whole_number(name: str, value: Any, least: int, most: int | None = None) -> None:
    """See that an option is a whole number of a range.

    Raises:
        ValueError: if it is not.
    """
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}; it must be a whole number, at least {least}")
    if value < least:
        raise ValueError(f"{name} is {value}; it must be at least {least}")
    if most is not None and value > most:
        raise ValueError(f"{name} is {value}; it must be at most {most}")


def check_share(name: str, value: float, with_ends: bool = True) -> None:
    """See that an option is a share: from 0 to 1, or between them.

    Raises:
        ValueError: if it is not.
    """
    if not (0 <= value <= 1 if with_ends else 0 < value < 1):
        raise ValueError(f"{name} is {value}; it must lie between 0 and 1{'' if with_ends else ', without these'}")


def check_positive(name: str, value: float) -> None:
    """See that an option is a positive, finite number.

    Raises:
        ValueError: if it is not.
    """
    if not 0 < value < math.inf:
        raise ValueError(f"{name} is {value}; it must be positive and finite")


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    """See that an option is one of a few.

    Raises:
        ValueError: if it is not.
    """
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(map(str, choices))}")


def check_folder_name(name: str, value: Path | str | None) -> None:
    """See that an option can be a folder: not empty, and not a file. None is fine.

    Raises:
        ValueError: if it cannot.
    """
    if value is None:
        return
    if not str(value).strip():
        raise ValueError(f"{name} is {str(value)!r}; give the name of a folder, or leave it out")
    if Path(value).is_file():
        raise ValueError(f"{name} is {value}, which is a file; give the name of a folder")
