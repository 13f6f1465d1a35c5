"""What a user meets on the command line: errors in one line, and devices that are there."""

import re
import sys
from typing import Any, NoReturn

import torch
from jsonargparse import ArgumentParser

NOISE = (
    "Does not validate against",
    "Subtypes:",
    "Errors:",
    "Expected a <class 'NoneType'>",
    "Expected a path but",
    "Given value type:",
    "Given value: Namespace(",
)
"""How those lines of jsonargparse's messages begin that tell a user nothing."""

SUBCLASSES = re.compile(r",\s+known\s+subclasses:[^)]*\)")
"""What it says of an argument that is any module: hundreds of PyTorch's."""


class Parser(ArgumentParser):
    """Says in one line what is wrong with the arguments, and takes no abbreviations of their names."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def format_help(self, *args: Any, **kwargs: Any) -> str:
        """The help, without a list of all modules that there are."""
        return SUBCLASSES.sub(")", super().format_help(*args, **kwargs))

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the message and leave with status 2, or raise it, if the parser is told to."""
        if not self.exit_on_error:
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        program = parser.prog.replace(" [options]", "")
        print(f"error: {one_line(message)}; see {program} --help", file=sys.stderr)
        raise SystemExit(2)


def one_line(message: str) -> str:
    """A message in one line, without what only programmers of jsonargparse want to know."""
    lines = [line.strip().removeprefix("- ") for line in message.splitlines()]
    return " ".join(line for line in lines if line and not line.startswith(NOISE))


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
