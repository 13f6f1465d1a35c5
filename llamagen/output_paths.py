"""Whether something can be written to a path, found out before there is anything to write. Nothing is left behind."""

import os
import tempfile
from pathlib import Path


def check_output(path: Path, what: str = "", remedy: str = "choose another folder") -> None:
    """See that a file or folder can be made at a path, or in the folders above it that do not exist yet.

    Args:
        path: to write to.
        what: option or argument that it comes from, for messages.
        remedy: what to do, for messages.

    Raises:
        ValueError: in one line, if not.
    """
    name = f"{what} {path}".strip()
    try:
        parent = next(each for each in Path(os.path.abspath(path)).parents if os.path.lexists(each))
        if not parent.is_dir():
            raise ValueError(f"{name} cannot be written ({parent} is no folder that allows it); {remedy}")
        path.exists()  # refuses names that are too long
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ValueError(f"{name} cannot be written ({reason.lower()}: no folder there allows it); {remedy}") from error


def check_output_file(path: Path, suffixes: tuple[str, ...], what: str = "out") -> None:
    """See that a file can be written: its name has an ending that says its format, and no folder is in its place.

    Args:
        path: to write to; an existing file is no fault.
        suffixes: possible endings.
        what: option or argument that it comes from, for messages.

    Raises:
        ValueError: in one line, if not.
    """
    if path.suffix not in suffixes or os.path.isdir(path):
        endings = " or ".join(f"*{suffix}" for suffix in suffixes if suffix)
        raise ValueError(f"{what} is {path}; give the name of a file, {endings}")
    check_output(path, what)
