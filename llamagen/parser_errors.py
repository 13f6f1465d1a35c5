"""Errors of argparse and jsonargparse in one line that names the option."""

import argparse
import re
import sys
from typing import Any, NoReturn

NOISE = (
    "Does not validate against",
    "Subtypes:",
    "Errors:",
    "Expected a <class 'NoneType'>",
    "Expected a path but",
    "Given value type:",
)
"""Prefixes of lines in jsonargparse's messages that do not help a user."""

GIVEN = "Given value: "
NESTED = ("Namespace(", "NestedArg(", "{", "[{")
"""Prefixes of values that are whole trees of options."""

PHRASES = (
    (r"Expected a dot import path string: (.+)", r"no class \1 is known here; check its name, or give its class path"),
    (r"Expected an? <class '(\w+)'>\. Got value: (.+)", r"must be of type \1, not \2"),
    (r"Expected an? <class '(\w+)'>", r"must be of type \1"),
    (r"Expected a typing\.Literal\[(.+)\]", r"must be one of \1"),
    (r"Key '([^']+)' is not expected", r"has no option \1"),
    (r"Option '([^']+)' is not accepted", r"has no option \1"),
    (r"Group '[^']*' does not accept option '([^']+)'", r"has no option \1"),
    (r"Problem with given class_path '[^']*':", ""),
)
"""Patterns of jsonargparse's messages, and their replacements."""

EXPECTED = "must be "
"""Prefix of the messages that say what a value must be."""

RENAMED_OPTIONS = {"picture_size": "image_size"}
"""Older names of options. Configuration files may use them; arguments are rejected with the current name."""

RENAMED_CLASSES = {"SampleDataModule": "ClassRequestDataModule"}
"""Older names of classes, without their packages, which configuration files may use."""


def one_line(message: str) -> str:
    """Convert a message of jsonargparse to one line: the full name of the option, then the problem."""
    keys: list[str] = []
    reasons: list[str] = []
    given = ""
    for line in message.splitlines():
        line = line.strip().removeprefix("- ")
        if key := re.match(r'Parser key "([^"]+)":?\s*', line):
            if not reasons:  # keys after a reason belong to another attempt at parsing the same value
                keys.append(key[1])
            line = line[key.end() :]
        if line.startswith(GIVEN):
            value = line.removeprefix(GIVEN)
            given = given or ("" if value.startswith(NESTED) else value)
            continue
        if line.startswith(NOISE):
            continue
        for pattern, phrase in PHRASES:
            line = re.sub(pattern, phrase, line)
        if (line := line.strip().rstrip(".:")) and line not in reasons:
            reasons.append(line)
    reason = _join(reasons) or "is not valid"
    for old, new in RENAMED_OPTIONS.items():
        reason = reason.replace(f"has no option {old}", f"has no option {old}, which is now {new}")
    if given and given not in reason:
        reason = f"{reason}, not {given}"
    return f"{'.'.join(keys)}: {reason}" if keys else reason


def _join(reasons: list[str]) -> str:
    """Join reasons. What each type of a union expects becomes "must be of type int or one of 'auto'"."""
    expected = [reason.removeprefix(EXPECTED) for reason in reasons if reason.startswith(EXPECTED)]
    others = [reason for reason in reasons if not reason.startswith(EXPECTED)]
    return "; ".join([*([EXPECTED + " or ".join(expected)] if expected else []), *others])


class OneLineErrors:
    """Mixin for parsers: errors are one line on stderr, without the list of all options, and exit code 2."""

    exit_on_error: Any
    prog: Any

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the message and exit, or raise an error if ``exit_on_error`` is false."""
        if not self.exit_on_error:
            super().error(message, *([] if ex is None else [ex]))  # type: ignore[misc]
        program = str((getattr(ex, "subcommand_parser", None) or self).prog).replace(" [options]", "")
        print(f"error: {one_line(message)}; see {program} --help", file=sys.stderr)
        raise SystemExit(2)


class OneLineParser(OneLineErrors, argparse.ArgumentParser):
    """argparse's parser with one-line errors and without abbreviations.

    Args:
        program: the command, shown in the help text.
        description: description of the command, shown in the help text.
        **options: other arguments of argparse's parser.
    """

    def __init__(self, program: str, description: str, **options: Any) -> None:
        super().__init__(program, description=description, allow_abbrev=False, **options)
