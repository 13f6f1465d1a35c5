"""Reads images and their prompts from a folder with a ``metadata.jsonl``."""

import json
from pathlib import Path
from typing import Any, NamedTuple

METADATA = "metadata.jsonl"
TEXTS = ("prompt", "text")
"""Keys of the prompt: that of ``predict``, and a common one of other datasets."""


class PromptImage(NamedTuple):
    """An image and its prompt.

    Attributes:
        file: the image.
        prompt: text that the image was generated from.
        number: number of the prompt; None if the line has none.
        columns: other columns of the prompt's row in its table, by name.
    """

    file: Path
    prompt: str
    number: int | None
    columns: dict[str, str]


def read_prompt_images(folder: Path) -> list[PromptImage]:
    """Read the ``metadata.jsonl`` that ``predict`` writes for prompts, or one of the same form.

    Each line is a JSON object with ``file_name``, relative to the folder, and ``prompt`` or ``text``. Optional are
    ``prompt_number`` and ``columns``, an object of texts.

    Args:
        folder: folder with the file and the images.

    Raises:
        ValueError: in one line, if the file is missing, a line has another form, or an image is missing.
    """
    path = folder / METADATA
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; give the folder of samples that predict wrote for prompts")
    if not path.is_file():
        raise ValueError(
            f"{folder} has no {METADATA}, which predict writes when all images of the prompts are complete; run the "
            "same predict again to resume, or give a complete folder"
        )
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # not splitlines: prompts may have other separators
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read ({error}); generate the samples again") from error
    found = [_image(folder, path, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise ValueError(f"{path} lists no images; generate the samples again")
    return found


def _image(folder: Path, path: Path, number: int, line: str) -> PromptImage:
    where = f"line {number} of {path}"
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON ({error}); fix it, or generate the samples again") from error
    if not isinstance(entry, dict) or not isinstance(entry.get("file_name"), str) or not entry["file_name"]:
        raise ValueError(f"{where} is {line.strip()[:60]!r}; it must be a JSON object with file_name and prompt")
    text = next((entry[key] for key in TEXTS if key in entry), None)
    if not isinstance(text, str):
        raise ValueError(f"{where} has no prompt for {entry['file_name']}; give it a text as {' or '.join(TEXTS)}")
    file = folder / entry["file_name"]
    if not file.is_file():
        raise ValueError(f"{file} does not exist, but {where} lists it; generate it again, or remove the line")
    prompt_number, columns = entry.get("prompt_number"), entry.get("columns")
    return PromptImage(
        file,
        _printable(text),
        prompt_number if isinstance(prompt_number, int) else None,
        _texts(columns) if isinstance(columns, dict) else {},
    )


def _texts(columns: dict[str, Any]) -> dict[str, str]:
    return {_printable(name): _printable(str(value)).strip() for name, value in columns.items() if value is not None}


def _printable(text: str) -> str:
    """The text with "?" for lone surrogates, which JSON can express and UTF-8 cannot."""
    return text.encode("utf-8", "replace").decode("utf-8")
