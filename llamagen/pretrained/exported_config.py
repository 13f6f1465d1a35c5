"""``config.json``, which makes a folder an exported model: its format, files, name and settings."""

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from llamagen.files import atomic_file
from llamagen.models.gpt_config import GPTConfig
from llamagen.sampling import SamplingConfig
from llamagen.text import TextEncoderConfig

CONFIG_FILE = "config.json"
MODEL_FILE = "model.safetensors"
TOKENIZER_FILE = "tokenizer.safetensors"
FORMAT = "llamagen-lightning 1"
ARCHITECTURE = "LlamaGenGPT"
MODEL_TYPE = "llamagen"
"""Names of the model in transformers and vLLM."""
SAVED = ("resolution", "sampling", "dtype", "classes", "text_encoder")
"""Settings of a :class:`~llamagen.pretrained.source.Source` that the file may hold."""
TYPES: Mapping[str, type] = {
    "name": str,
    "files": list,
    "resolution": int,
    "sampling": dict,
    "dtype": str,
    "classes": list,
    "text_encoder": dict,
    "gpt": dict,
    "guided": bool,
}


def write_config(
    folder: Path,
    name: str,
    files: list[str],
    settings: Mapping[str, Any],
    gpt: GPTConfig | None = None,
    guided: bool = True,
) -> None:
    """Write the ``config.json`` of an exported model.

    Args:
        folder: folder of the model.
        name: name of the model.
        files: names of its files of weights.
        settings: settings of :data:`SAVED`.
        gpt: configuration of the autoregressive model; None for a tokenizer alone.
        guided: whether vLLM computes the unconditional branch, too.
    """
    content = {"format": FORMAT, "name": name, "files": files, **settings}
    if gpt is not None:
        # What transformers and vLLM need to know, see serving/vllm/; ``from_pretrained`` reads the file of the weights.
        content = {"architectures": [ARCHITECTURE], "model_type": MODEL_TYPE, **content, "gpt": asdict(gpt)}
        content["guided"] = guided
    with atomic_file(folder / CONFIG_FILE) as temporary:
        temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def is_exported(folder: Path) -> bool:
    """Whether a folder holds an exported model, complete or not."""
    return bool(_format(_read(folder / CONFIG_FILE)) == FORMAT)


def read_config(folder: Path) -> dict[str, Any]:
    """Read the ``config.json`` of an exported model, and check that the folder is complete.

    Raises:
        ValueError: in one line, if it is damaged or of another program, or a file is missing.
    """
    file = folder / CONFIG_FILE
    config: dict[str, Any] | None = _read(file)
    if config is None:
        raise ValueError(f"{file} cannot be read as JSON; get the folder again")
    if (found := _format(config)) != FORMAT:
        raise ValueError(
            f"{file} has the format {found!r}, not {FORMAT!r}; give a folder written by python -m "
            "llamagen.checkpoints.export"
        )
    for name, kind in TYPES.items():
        if config.get(name) is not None and not isinstance(config[name], kind):
            raise ValueError(f"{name} in {file} is {config[name]!r:.60}; it must be of type {kind.__name__}")
    _check_settings(config, file)
    for name in config.get("files") or [TOKENIZER_FILE]:
        if not (folder / str(name)).is_file():
            raise ValueError(f"{folder} has no {name}; it is incomplete, get it again")
    return config


def _check_settings(config: dict[str, Any], file: Path) -> None:
    for name, settings in (("sampling", SamplingConfig), ("text_encoder", TextEncoderConfig)):
        given = config.get(name) or {}
        known = [each.name for each in fields(settings)]
        if unknown := sorted(set(given) - set(known)):
            raise ValueError(f"{name} in {file} has no option {unknown[0]}; its options are {', '.join(known)}")
        try:
            settings(**given)
        except ValueError as error:
            raise ValueError(f"{name} in {file} is wrong: {error}") from error
    if not all(isinstance(each, str) for each in config.get("classes") or ()):
        raise ValueError(f"classes in {file} are not all texts; give the name of each class")


def _read(file: Path) -> Any:
    """Content of a JSON file; None if it cannot be read."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def _format(config: Any) -> Any:
    return config.get("format") if isinstance(config, dict) else None
