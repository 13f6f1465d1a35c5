"""Values that a user gives to options: refused in one line with the option, its value and its range."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def check_integer(name: str, value: Any, least: int = 1, most: int | None = None) -> None:
    """Refuse what is no whole number of a range.

    Args:
        name: of the option.
        value: that was given.
        least: smallest value with a meaning.
        most: largest value with a meaning, if there is one.

    Raises:
        ValueError: in one line.
    """
    try:
        whole = value == int(value) and hasattr(value, "__index__") and not isinstance(value, bool)
    except (TypeError, ValueError, OverflowError):  # no number, NaN, infinity
        whole = False
    if not whole:
        raise ValueError(f"{name} is {value}; it must be a whole number of at least {least}")
    if value < least:
        raise ValueError(f"{name} is {value}; it must be at least {least}")
    if most is not None and value > most:
        raise ValueError(f"{name} is {value}; it must be at most {most}")


def check_not_negative(name: str, value: Any) -> None:
    """Refuse what is no finite number, or below 0.

    Args:
        name: of the option.
        value: that was given.

    Raises:
        ValueError: in one line.
    """
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} is {value}; it must be at least 0{' and finite' if value == math.inf else ''}")


def check_positive(name: str, value: float) -> None:
    """Refuse what is no positive, finite number.

    Args:
        name: of the option.
        value: that was given.

    Raises:
        ValueError: in one line.
    """
    if not 0 < value < math.inf:
        raise ValueError(f"{name} is {value}; it must be positive and finite")


def check_share(name: str, value: float, with_ends: bool = True) -> None:
    """Refuse what is no share.

    Args:
        name: of the option.
        value: that was given.
        with_ends: 0 and 1 have a meaning, too.

    Raises:
        ValueError: in one line.
    """
    if not (0 <= value <= 1 if with_ends else 0 < value < 1):
        raise ValueError(f"{name} is {value}; it must lie between 0 and 1{'' if with_ends else ', without these'}")


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    """Refuse what is not one of a few.

    Args:
        name: of the option.
        value: that was given.
        choices: all that have a meaning.

    Raises:
        ValueError: in one line.
    """
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(map(str, choices))}")


def check_folder_name(name: str, value: Path | str | None) -> None:
    """Refuse what cannot be a folder: nothing, or the name of a file.

    Args:
        name: of the option.
        value: that was given; None is fine.

    Raises:
        ValueError: in one line.
    """
    if value is None:
        return
    if not str(value).strip():
        raise ValueError(f"{name} is {str(value)!r}; give the name of a folder, or leave it out")
    if Path(value).is_file():
        raise ValueError(f"{name} is {value}, which is a file; give the name of a folder")


@contextmanager
def option_named(name: str) -> Iterator[None]:
    """Put the name of an option in front of what is wrong with its value.

    Raises:
        ValueError: where one is raised within.
    """
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
