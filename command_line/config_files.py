"""Configuration files: checks before they are parsed, and older names of options and classes."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from llamagen.parser_errors import RENAMED_CLASSES, RENAMED_OPTIONS

LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""The loader in C, if PyYAML was built with it: ten times faster."""


def check_config_files(args: list[str] | dict[str, Any]) -> None:
    """Check that each ``--config`` is YAML with settings. The parser's own error has the line, but not the file.

    Args:
        args: arguments of the command line.

    Raises:
        ValueError: in one line with the file, if it is not.
    """
    words = [word for arg in args for word in arg.split("=", 1)] if isinstance(args, list) else []
    for option, name in pairwise(words):
        if option in ("-c", "--config") and Path(name).is_file():
            try:
                is_mapping = isinstance(yaml.load(Path(name).read_text(), LOADER), dict | None)
                problem = "" if is_mapping else "it holds no settings"
            except (yaml.YAMLError, UnicodeDecodeError) as error:
                problem = str(error)
            if problem:
                raise ValueError(f"--config {name} cannot be read as YAML ({problem}); give a configuration file")


def with_current_names(content: str, path: str) -> str:
    """Replace older names of options and classes in a configuration file by the current ones, with a warning.

    Args:
        content: content of the file, YAML.
        path: path of the file, for the warning.

    Returns:
        The content with current names; unchanged if it has no older ones.
    """
    settings = yaml.load(content, LOADER)
    found: dict[str, str] = {}
    renamed = _renamed(settings, found)
    if not found:
        return content
    pairs = ", ".join(f"{old} is now {new}" for old, new in found.items())
    rank_zero_warn(f"{path or 'the configuration'} uses older names ({pairs}); rename them there")
    return yaml.safe_dump(renamed, sort_keys=False, allow_unicode=True)


def _renamed(value: Any, found: dict[str, str]) -> Any:
    if isinstance(value, list):
        return [_renamed(each, found) for each in value]
    if not isinstance(value, dict):
        return value
    result = {}
    for key, each in value.items():
        if key in RENAMED_OPTIONS:
            found[key] = key = RENAMED_OPTIONS[key]
        if key == "class_path" and isinstance(each, str):
            package, dot, name = each.rpartition(".")
            if name in RENAMED_CLASSES:
                found[name] = RENAMED_CLASSES[name]
                each = f"{package}{dot}{RENAMED_CLASSES[name]}"
        result[key] = _renamed(each, found)
    return result
