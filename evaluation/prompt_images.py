"""Images with their prompts, as ``metadata.jsonl`` in their folder lists them."""

import json
from pathlib import Path
from typing import Any, NamedTuple

METADATA = "metadata.jsonl"
TEXTS = ("prompt", "text")
"""What the prompt is called in a line: by ``predict``, and in other people's sets."""


class PromptImage(NamedTuple):
    """An image and what it was drawn of.

    Attributes:
        file: of the image.
        prompt: it was drawn of.
        number: of the prompt; None if the line has none.
        columns: what else is known of the prompt, by name.
    """

    file: Path
    prompt: str
    number: int | None
    columns: dict[str, str]


def read_prompt_images(folder: Path) -> list[PromptImage]:
    """The images of a folder that ``predict`` of prompts has completed, or of any with such a ``metadata.jsonl``.

    Each line is a JSON object with ``file_name``, which is relative to the folder, and ``prompt`` or ``text``; perhaps
    with ``prompt_number`` and ``columns``, an object of texts.

    Args:
        folder: of the file.

    Raises:
        ValueError: in one line, if there is no such file, a line of it is something else, or an image is missing.
    """
    path = folder / METADATA
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; give the folder of samples that predict of prompts has written")
    if not path.is_file():
        raise ValueError(
            f"{folder} has no {METADATA}; predict of prompts writes it when all images are there: run the same "
            "predict again to go on, or give the folder of a run that is complete"
        )
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # not splitlines: prompts may have other separators
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read ({error}); draw the samples again") from error
    found = [_image(folder, path, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise ValueError(f"{path} lists no images; draw the samples again")
    return found


def _image(folder: Path, path: Path, number: int, line: str) -> PromptImage:
    where = f"line {number} of {path}"
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is no JSON ({error}); mend it, or draw the samples again") from error
    if not isinstance(entry, dict) or not isinstance(entry.get("file_name"), str) or not entry["file_name"]:
        raise ValueError(f"{where} is {line.strip()[:60]!r}; it must be a JSON object with file_name and prompt")
    text = next((entry[key] for key in TEXTS if key in entry), None)
    if not isinstance(text, str):
        raise ValueError(f"{where} has no prompt for {entry['file_name']}; give it a text as {' or '.join(TEXTS)}")
    file = folder / entry["file_name"]
    if not file.is_file():
        raise ValueError(f"{file} does not exist, but {where} lists it; draw it again, or take the line out")
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
    """A text with a "?" for half a surrogate pair, which JSON can name and no file can hold."""
    return text.encode("utf-8", "replace").decode("utf-8")
