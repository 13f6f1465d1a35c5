"""Numbers that a user gives, in the words in which they are refused."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def check_whole(name: str, value: Any, least: int = 1) -> None:
    """Refuse what is no whole number, or too small.

    Args:
        name: of the option.
        value: that was given.
        least: smallest value with a meaning.

    Raises:
        ValueError: in one line.
    """
    try:
        whole = value == int(value) and hasattr(value, "__index__")
    except (TypeError, ValueError, OverflowError):  # no number, NaN, infinity
        whole = False
    if not whole:
        raise ValueError(f"{name} is {value}; it must be a whole number of at least {least}")
    if value < least:
        raise ValueError(f"{name} is {value}; it must be at least {least}")


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
