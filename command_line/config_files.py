"""Configuration files before they are parsed: checks, files they extend, sections of stages, and older names."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from llamagen.parser_errors import RENAMED_CLASSES, RENAMED_OPTIONS

LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""The loader in C, if PyYAML was built with it: ten times faster."""

EXTENDS = "extends"
STAGES = ("fit", "validate", "test", "predict")


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
            _read_settings(Path(name), f"--config {name}")


def _read_settings(path: Path, mention: str) -> dict[str, Any]:
    try:
        settings = yaml.load(path.read_text(), LOADER)
        problem = "" if isinstance(settings, dict | None) else "it holds no settings"
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        problem = getattr(error, "strerror", None) or str(error)
    if problem:
        raise ValueError(f"{mention} cannot be read as YAML ({' '.join(problem.split())}); give a configuration file")
    return settings or {}


def configs_of_stage(value: str, stage: str | None) -> list[str]:
    """Split a configuration file into the configurations that it stands for in a stage.

    A file may have, at its top level, the list ``extends`` of files that are read before it, by paths relative to it,
    and a section ``fit``, ``validate``, ``test`` or ``predict``, which is read after it in that stage alone. A section
    may have ``extends``, too.

    Args:
        value: a path, or YAML.
        stage: the stage; None for none, so that nothing is split.

    Returns:
        Configurations to merge from first to last, each a path or YAML; ``[value]`` if there is nothing to split.

    Raises:
        ValueError: in one line with the file, if ``extends`` or a section is not valid.
    """
    path = Path(value)
    if stage is None or not _is_file(path):
        return [value]
    settings = _read_settings(path, f"--config {value}")
    if not {EXTENDS, *STAGES} & settings.keys():
        return [value]
    return [yaml.safe_dump(part, sort_keys=False, allow_unicode=True) for part in _parts_of_file(path, stage, ())]


def _parts_of_file(path: Path, stage: str, extending: tuple[Path, ...], mention: str = "") -> list[dict[str, Any]]:
    """Settings of a file to merge from first to last. ``extending``: files whose ``extends`` led to it."""
    settings = _read_settings(path, mention or f"--config {path}")
    for name in STAGES:
        if not isinstance(settings.get(name), dict | None):
            raise ValueError(f"{path}: {name} is {settings[name]!r:.60}; write the settings of that stage below it")
    own = {key: value for key, value in settings.items() if key not in STAGES}
    chain = (*extending, path.resolve())
    return _parts(own, path, stage, chain) + _parts(settings.get(stage) or {}, path, stage, chain)


def _parts(settings: dict[str, Any], path: Path, stage: str, chain: tuple[Path, ...]) -> list[dict[str, Any]]:
    names = settings.get(EXTENDS, [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path}: {EXTENDS} is {names!r:.60}; give a list of files, by paths relative to this file")
    parts: list[dict[str, Any]] = []
    for name in names:
        other = path.parent / name
        if other.resolve() in chain:
            raise ValueError(f"{path}: {EXTENDS} has {name}, which extends this file; remove one of the two")
        parts += _parts_of_file(other, stage, chain, f"{name}, in {EXTENDS} of {path},")
    own = {key: value for key, value in settings.items() if key != EXTENDS}
    return [*parts, current_names(own, str(path))] if own else parts


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # YAML, too long for a name
        return False


def current_names(settings: dict[str, Any], path: str) -> dict[str, Any]:
    """Replace older names of options and classes in settings by the current ones, with a warning.

    Args:
        settings: content of a configuration file.
        path: path of the file, for the warning.

    Returns:
        The same settings if they have no older names.
    """
    found: dict[str, str] = {}
    renamed: dict[str, Any] = _renamed(settings, found)
    if found:
        pairs = ", ".join(f"{old} is now {new}" for old, new in found.items())
        rank_zero_warn(f"{path or 'the configuration'} uses older names ({pairs}); rename them there")
    return renamed if found else settings


def with_current_names(content: str, path: str) -> str:
    """Replace older names of options and classes in a configuration file by the current ones, with a warning.

    Args:
        content: content of the file, YAML.
        path: path of the file, for the warning.

    Returns:
        The content with current names; unchanged if it has no older ones.
    """
    settings = yaml.load(content, LOADER)
    renamed = current_names(settings, path)
    return content if renamed is settings else yaml.safe_dump(renamed, sort_keys=False, allow_unicode=True)


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
