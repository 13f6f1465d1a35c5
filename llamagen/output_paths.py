"""Checks that outputs can be written, before the work that produces them. The checks leave no files."""

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

OTHER_FOLDER = "choose another folder"


def check_output(path: Path, what: str = "", remedy: str = OTHER_FOLDER) -> None:
    """Check that a file or folder can be created or replaced at a path. Missing parents count as creatable.

    Args:
        path: path of the output.
        what: name of the option or argument, for messages.
        remedy: remedy in messages.

    Raises:
        ValueError: in one line, if it cannot.
    """
    _check_writable(path, _existing(Path(os.path.abspath(path)).parents), what, remedy)


def check_output_folder(folder: Path, what: str = "", remedy: str = OTHER_FOLDER) -> None:
    """Check that files can be written into a folder, which may exist.

    Args:
        folder: folder of the output.
        what: name of the option or argument, for messages.
        remedy: remedy in messages.

    Raises:
        ValueError: in one line, if they cannot.
    """
    absolute = Path(os.path.abspath(folder))
    _check_writable(folder, _existing((absolute, *absolute.parents)), what, remedy)


def check_output_file(path: Path, suffixes: tuple[str, ...], what: str = "out") -> None:
    """Check that a file can be written: its suffix is valid, and there is no folder of this name.

    Args:
        path: path of the file, which may exist.
        suffixes: valid suffixes.
        what: name of the option or argument, for messages.

    Raises:
        ValueError: in one line, if it cannot.
    """
    if path.suffix not in suffixes or os.path.isdir(path):
        endings = " or ".join(f"*{suffix}" for suffix in suffixes if suffix)
        raise ValueError(f"{what} is {path}; give the name of a file, {endings}")
    check_output(path, what)


def _check_writable(path: Path, place: Path, what: str, remedy: str) -> None:
    name = f"{what} {path}".strip()
    if not place.is_dir():
        raise ValueError(f"{name} cannot be written: {place} is not a folder; {remedy}")
    try:
        path.exists()  # raises an error for a name that is too long
        # Not os.access, which returns True on a read-only file system.
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        reason = (error.strerror or type(error).__name__).lower()
        raise ValueError(f"{name} cannot be written: {place} does not allow it ({reason}); {remedy}") from error


def _existing(paths: Iterable[Path]) -> Path:
    """The first path that exists; a broken link counts."""
    return next(path for path in paths if os.path.lexists(path))
