"""The command line's parser and its check of devices."""

import re
from typing import Any

import torch
from jsonargparse import ArgumentParser

from llamagen.parser_errors import OneLineErrors

SUBCLASSES = re.compile(r",\s+known\s+subclasses:[^)]*\)")
"""Part of the help in which jsonargparse lists every known module, among them hundreds of PyTorch's."""


class Parser(OneLineErrors, ArgumentParser):
    """A parser with errors of one line that accepts no abbreviated options."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def format_help(self, *args: Any, **kwargs: Any) -> str:
        """The help text without the list of all known modules."""
        return SUBCLASSES.sub(")", super().format_help(*args, **kwargs))


def usable_device(device: str | None) -> str:
    """Check a device. If none is given, choose a GPU if there is one, else the CPU.

    Raises:
        ValueError: if the device is not available.
    """
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=device).cpu()
    except (AssertionError, RuntimeError, NotImplementedError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"device is {device!r}, which cannot be used here ({reason}); give cpu, or cuda") from error
    return device
