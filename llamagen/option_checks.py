"""Checks of option values. Errors are one line with the option, its value and its range."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def check_integer(name: str, value: Any, minimum: int = 1, maximum: int | None = None) -> None:
    """Check that a value is an integer in a range.

    Args:
        name: name of the option.
        value: value of the option.
        minimum: smallest valid value.
        maximum: largest valid value; None for no limit.

    Raises:
        ValueError: in one line, if it is not.
    """
    try:
        is_integer = value == int(value) and hasattr(value, "__index__") and not isinstance(value, bool)
    except (TypeError, ValueError, OverflowError):  # no number, NaN, infinity
        is_integer = False
    if not is_integer:
        raise ValueError(f"{name} is {value!r}; it must be an integer of at least {minimum}")
    if value < minimum:
        raise ValueError(f"{name} is {value}; it must be at least {minimum}")
    if maximum is not None and value > maximum:
        raise ValueError(f"{name} is {value}; it must be at most {maximum}")


def check_not_negative(name: str, value: Any) -> None:
    """Check that a value is finite and at least 0.

    Args:
        name: name of the option.
        value: value of the option.

    Raises:
        ValueError: in one line, if it is not.
    """
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} is {value}; it must be at least 0{' and finite' if value == math.inf else ''}")


def check_positive(name: str, value: float) -> None:
    """Check that a value is positive and finite.

    Args:
        name: name of the option.
        value: value of the option.

    Raises:
        ValueError: in one line, if it is not.
    """
    if not 0 < value < math.inf:
        raise ValueError(f"{name} is {value}; it must be positive and finite")


def check_share(name: str, value: float, with_ends: bool = True) -> None:
    """Check that a value is a fraction between 0 and 1.

    Args:
        name: name of the option.
        value: value of the option.
        with_ends: whether 0 and 1 are valid, too.

    Raises:
        ValueError: in one line, if it is not.
    """
    if not (0 <= value <= 1 if with_ends else 0 < value < 1):
        raise ValueError(f"{name} is {value}; it must be {'between 0 and 1' if with_ends else 'above 0 and below 1'}")


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    """Check that a value is one of some choices.

    Args:
        name: name of the option.
        value: value of the option.
        choices: all valid values.

    Raises:
        ValueError: in one line, if it is not.
    """
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(map(str, choices))}")


def check_folder_name(name: str, value: Path | str | None) -> None:
    """Check that a value can be the name of a folder: neither empty nor a file.

    Args:
        name: name of the option.
        value: value of the option; None is valid.

    Raises:
        ValueError: in one line, if it cannot.
    """
    if value is None:
        return
    if not str(value).strip():
        raise ValueError(f"{name} is {str(value)!r}; give the name of a folder, or leave it out")
    if Path(value).is_file():
        raise ValueError(f"{name} is {value}, which is a file; give the name of a folder")


@contextmanager
def option_named(name: str) -> Iterator[None]:
    """Prefix errors of the block with the name of an option.

    Raises:
        ValueError: if the block raises one.
    """
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
