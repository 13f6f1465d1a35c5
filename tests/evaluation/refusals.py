"""Commands that end with an error: their message, with and without the command line."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest

from evaluation.__main__ import main
from llamagen.command import fault_of

BARS = ("image/s", "?image", "Loading weights")
"""Parts of progress bars."""


def shown_lines(errors: str) -> list[str]:
    """The lines of stderr that are not of progress bars."""
    lines = errors.replace("\r", "\n").split("\n")
    return [line for line in lines if line and not any(part in line for part in BARS)]


def fails(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    """The error message of the whole command; checks that it is one line, and all that is shown."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    assert stopped.value.code == 2
    shown = capsys.readouterr()
    assert not shown.out
    lines = shown_lines(shown.err)
    assert len(lines) == 1, shown.err
    assert lines[0].startswith("error: ")
    return lines[0]


def refusal(capsys: pytest.CaptureFixture[str], command: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    """The error message of a command without its command line; checks what :func:`fails` checks."""
    capsys.readouterr()
    with warnings.catch_warnings(record=True) as seen, pytest.raises((ValueError, OSError)) as error:
        command(*arguments, **options)
    fault = fault_of(error.value)
    assert fault is not None, "it would be reported as a bug"
    assert fault.status == 2
    shown = capsys.readouterr()
    assert not shown.out
    assert shown_lines(shown.err) + [str(warning.message) for warning in seen] == []
    return fault.message
