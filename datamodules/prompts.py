"""What to sample: prompts × how many. B images a batch."""

import json
import unicodedata
from pathlib import Path
from typing import Any, NamedTuple

from datamodules.requests import RequestDataModule
from datamodules.storage.text_files import MARK, decode_text
from llamagen.text.cleaning import clean_caption

TABLE = ".tsv"
OTHER_TABLES = (".csv", ".json", ".jsonl", ".parquet", ".xlsx")
PROMPT = "Prompt"
HINT = 'give a list of prompts, as \'["a red house", "two dogs"]\', a text file with one prompt a line, or a .tsv'
REPLACED = {"Cc": " ", "Zl": " ", "Zp": " ", "Cs": "\ufffd"}
"""By Unicode category: controls, separators of lines and paragraphs, halves of surrogate pairs."""


class PromptTable(NamedTuple):
    """Prompts, and what a table says of them beside.

    Attributes:
        prompts: in order.
        columns: the other columns of each prompt, by name; empty where there is no table.
    """

    prompts: list[str]
    columns: list[dict[str, str]]


def clean_prompt(text: str) -> str:
    """A prompt as it is asked for, without spaces at its ends.

    A byte order mark before it is dropped. NUL, other control characters and separators of lines become spaces, halves
    of surrogate pairs U+FFFD. All else stays, emoji and their joiners included.
    """
    return "".join(
        REPLACED.get(unicodedata.category(character), character) for character in text.removeprefix(MARK)
    ).strip()


def read_prompts(path: Path, column: str | None = None) -> PromptTable:
    """The prompts of a text file, one a line, or of a table of tab-separated values with a header.

    Both are UTF-8, with or without a byte order mark, and with any line ends. Blank lines do not count. In a table,
    which is known by its name ``….tsv``, quotes are characters like any others, and an empty cell is an empty prompt.

    Args:
        path: the file.
        column: of the prompts in a table, upper or lower case; ``Prompt`` if it is not given.

    Raises:
        ValueError: if the file cannot be read or has no prompts, a row does not fit the header, or there is no such
            column.
    """
    if path.suffix.lower() in OTHER_TABLES:
        raise ValueError(f"prompts is {path}, but tables are read as {TABLE}; {HINT}")
    try:
        text = decode_text(path.read_bytes()).replace("\r\n", "\n").replace("\r", "\n")
        lines = text.split("\n")  # not splitlines, which knows ten more separators
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not a text file in UTF-8"
        raise ValueError(f"prompts is {str(path)[:200]!r}, which cannot be read ({reason}); {HINT}") from error
    if path.suffix.lower() == TABLE:
        table = _read_table(path, lines, column)
    elif column is not None:
        raise ValueError(f"column is {column!r}, but only a {TABLE} has columns, and prompts is {path}; leave it out")
    else:
        prompts = [prompt for line in lines if (prompt := clean_prompt(line))]
        table = PromptTable(prompts, [{} for _ in prompts])
    if not table.prompts:
        raise ValueError(f"{path} has no prompts; write one in each line")
    return table


def _read_table(path: Path, lines: list[str], column: str | None) -> PromptTable:
    header, rows = [name.strip() for name in lines[0].split("\t")], lines[1:]
    folded = [name.casefold() for name in header]
    wanted = PROMPT if column is None else column
    if (count := folded.count(wanted.strip().casefold())) != 1:
        raise ValueError(
            f"{path} has {'no' if not count else 'more than one'} column {wanted!r}, but {', '.join(header)[:200]!r}; "
            "name the one with the prompts by column"
        )
    place = folded.index(wanted.strip().casefold())
    table = PromptTable([], [])
    for number, line in enumerate(rows, 2):
        if not line.strip(" "):
            continue
        cells = line.split("\t")
        if not place < len(cells) <= len(header):
            raise ValueError(
                f"{path}, line {number}: {line[:40]!r} has {len(cells)} of {len(header)} columns; separate them by one "
                "tab each, and write none in a prompt"
            )
        cells = [clean_prompt(cell) for cell in cells] + [""] * (len(header) - len(cells))  # editors cut off tabs
        table.prompts.append(cells[place])
        table.columns.append(
            {name: cell for i, (name, cell) in enumerate(zip(header, cells, strict=True)) if i != place}
        )
    return table


def _read_list(text: str) -> list[str]:
    """A list that the command line, which speaks YAML, could not read: JSON's escapes know halves of characters."""
    try:
        prompts: list[str] = json.loads(text)
    except ValueError as error:
        raise ValueError(f"prompts is {text[:200]!r}, which is no list ({error}); {HINT}") from error
    return prompts


class PromptDataModule(RequestDataModule):
    """Requests for images of prompts: the prompts in turn, until each was asked for ``per_prompt`` times.

    So image i is one of prompt i modulo their number, and with a larger ``per_prompt`` the first images stay what
    they were. ``predict`` is for images that are kept, ``test`` for images that are measured. Batches hold
    ``index`` of each image in the run, (B,) int64, and ``captions``, a list of B texts.

    Args:
        prompts: a list, in which an empty prompt asks for an image of no words; a text file with one prompt a line;
            or a table of tab-separated values with a header (``.tsv``), as PartiPrompts are published. See
            :func:`read_prompts` and :func:`clean_prompt`.
        per_prompt: images of each prompt.
        batch_size: images a rank and batch.
        column: of the prompts in a table; ``Prompt`` if it is not given.
        clean_captions: clean the prompts, see :func:`llamagen.text.clean_caption`: for models that were trained on such
            captions. What is nothing then asks for an image of no words.

    Attributes:
        prompts: in order, as they are read by the model.
        columns: the other columns of a table, for each prompt.
    """

    label_name = "prompt"
    prompts: list[str]

    def __init__(
        self,
        prompts: list[str] | str | Path,
        per_prompt: int = 1,
        batch_size: int = 16,
        column: str | None = None,
        clean_captions: bool = False,
    ) -> None:
        if isinstance(prompts, str) and prompts.lstrip().startswith("["):
            prompts = _read_list(prompts)
        if isinstance(prompts, (str, Path)):
            table = read_prompts(Path(prompts).expanduser(), column)
        else:
            if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
                raise ValueError(f"prompts is {str(prompts)[:200]}; {HINT}")
            if column is not None:
                raise ValueError(
                    f"column is {column!r}, but only a {TABLE} has columns, and prompts is a list; leave it out"
                )
            table = PromptTable([clean_prompt(prompt) for prompt in prompts], [{} for _ in prompts])
        super().__init__(range(len(table.prompts)), per_prompt, batch_size)
        self.prompts, self.columns = table
        self.clean_captions = clean_captions
        if clean_captions:
            self.prompts = [clean_caption(prompt) for prompt in self.prompts]

    def request(self, index: int) -> dict[str, Any]:
        """``index`` of the image in the run and ``captions``, its prompt."""
        return {"index": index, "captions": self.prompts[self.labels[index]]}
