"""What a user meets on the command line: errors in one line, and devices that are there."""

import re
from typing import Any

import torch
from jsonargparse import ArgumentParser

from llamagen.parser_errors import OneLineErrors

SUBCLASSES = re.compile(r",\s+known\s+subclasses:[^)]*\)")
"""What it says of an argument that is any module: hundreds of PyTorch's."""


class Parser(OneLineErrors, ArgumentParser):
    """Says in one line what is wrong with the arguments, and takes no abbreviations of their names."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def format_help(self, *args: Any, **kwargs: Any) -> str:
        """The help, without a list of all modules that there are."""
        return SUBCLASSES.sub(")", super().format_help(*args, **kwargs))


def usable_device(device: str | None) -> str:
    """The device that was asked for; a GPU, if there is one, if none was.

    Raises:
        ValueError: if it is not there.
    """
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=device).cpu()
    except (AssertionError, RuntimeError, NotImplementedError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"device is {device!r}, which cannot be used here ({reason}); give cpu, or cuda") from error
    return device
