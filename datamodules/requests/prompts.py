"""Requests for images of prompts. B: images in a batch."""

import json
from pathlib import Path
from typing import Any, Literal, NamedTuple

from datamodules.loading.loader import EvaluationLoader
from datamodules.requests.base import RequestDataModule
from datamodules.storage.text_files import decode_text
from llamagen.text.cleaning import UNKNOWN, Cleaning, RecordedCleaning, clean_caption, cleaning_of_option
from llamagen.text.prompts import clean_prompt

TABLE = ".tsv"
OTHER_TABLES = (".csv", ".json", ".jsonl", ".parquet", ".xlsx")
PROMPT = "Prompt"
HINT = 'give a list of prompts, as \'["a red house", "two dogs"]\', a text file with one prompt per line, or a .tsv'


class PromptTable(NamedTuple):
    """Prompts with the other columns of their table.

    Attributes:
        prompts: prompts in the order of the file.
        columns: other columns of each prompt, by name; empty if the prompts are not from a table.
    """

    prompts: list[str]
    columns: list[dict[str, str]]


def read_prompts(path: Path, column: str | None = None) -> PromptTable:
    """Read the prompts in a text file, one per line, or in a table of tab-separated values with a header.

    Both are UTF-8, with or without a byte order mark, with any line ends. Blank lines are ignored. Files named
    ``….tsv`` are tables. Quotes in a table have no special meaning, and an empty cell is an empty prompt.

    Args:
        path: text file or table.
        column: name of the column with the prompts, in any case; None for ``Prompt``.

    Raises:
        ValueError: if the file cannot be read or has no prompts, a row does not fit the header, or the column does not
            exist.
    """
    if path.suffix.lower() in OTHER_TABLES:
        raise ValueError(f"prompts is {path}, but tables are read as {TABLE}; {HINT}")
    try:
        text = decode_text(path.read_bytes()).replace("\r\n", "\n").replace("\r", "\n")
        lines = text.split("\n")  # footgun: splitlines also splits at ten other characters
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
            "set column to the name of the one with the prompts"
        )
    place = folded.index(wanted.strip().casefold())
    table = PromptTable([], [])
    for number, line in enumerate(rows, 2):
        if not line.strip(" "):
            continue
        cells = line.split("\t")
        if not place < len(cells) <= len(header):
            raise ValueError(
                f"{path}, line {number}: {line[:40]!r} has {len(cells)} of {len(header)} columns; separate columns by "
                "one tab each, and use no tabs within a prompt"
            )
        cells = [clean_prompt(cell) for cell in cells] + [""] * (
            len(header) - len(cells)
        )  # editors strip tabs at line ends
        table.prompts.append(cells[place])
        table.columns.append(
            {name: cell for i, (name, cell) in enumerate(zip(header, cells, strict=True)) if i != place}
        )
    return table


def _read_list(text: str) -> list[str]:
    """Parse a JSON list that the YAML parser of the command line rejects, for example with escaped surrogates."""
    try:
        prompts: list[str] = json.loads(text)
    except ValueError as error:
        raise ValueError(f"prompts is {text[:200]!r}, which is not a list ({error}); {HINT}") from error
    return prompts


class PromptDataModule(RequestDataModule):
    """Requests for ``per_prompt`` images of each prompt.

    Image i has prompt i modulo the number of prompts. With a larger ``per_prompt``, the first images stay the same.
    ``predict`` saves the images, ``test`` measures them. Batches hold ``index`` of each image in the run, (B,) int64,
    and ``captions``, a list of B texts.

    Args:
        prompts: a list; or a text file with one prompt per line; or a table of tab-separated values with a header
            (``.tsv``), the format of PartiPrompts. An empty prompt is encoded as the end token alone. See
            :func:`read_prompts` and :func:`clean_prompt`.
        per_prompt: images per prompt.
        batch_size: images per batch and rank.
        column: name of the column with the prompts in a table; None for ``Prompt``.
        clean_captions: cleaning of the prompts, see :func:`llamagen.text.clean_caption`: ``published``, ``web``, or
            false; true is ``web``. ``auto`` cleans them as the model records for the captions of its training. A prompt
            may become empty.

    Attributes:
        columns: other columns of the table, for each prompt.
    """

    label_name = "prompt"

    def __init__(
        self,
        prompts: list[str] | str | Path,
        per_prompt: int = 1,
        batch_size: int = 16,
        column: str | None = None,
        clean_captions: Literal["auto", "published", "web"] | bool | None = "auto",
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
        self._given, self.columns = table
        self.clean_captions = clean_captions
        self._cleaned: dict[Cleaning | None, list[str]] = {}
        if clean_captions != "auto":
            clean_caption("", cleaning_of_option(clean_captions))  # raises now if a package is missing

    @property
    def cleaning(self) -> Cleaning | None:
        """Cleaning of the prompts. With ``auto`` it is known once the model's weights are loaded; None before."""
        if self.clean_captions != "auto":
            return cleaning_of_option(self.clean_captions)
        module = getattr(self.trainer, "lightning_module", None)
        recorded: RecordedCleaning = getattr(module, "caption_cleaning", UNKNOWN)
        return None if recorded == UNKNOWN else recorded

    @property
    def prompts(self) -> list[str]:  # type: ignore[override]
        """Prompts in order, as the model reads them.

        Raises:
            ValueError: if the cleaning needs a package that is not installed.
        """
        cleaning = self.cleaning
        if cleaning not in self._cleaned:
            self._cleaned[cleaning] = [clean_caption(prompt, cleaning) for prompt in self._given]
        return self._cleaned[cleaning]

    def predict_dataloader(self) -> EvaluationLoader:
        """Requests of this rank, in order. Lightning asks for them after it has loaded the checkpoint.

        Raises:
            ValueError: if the prompts are cleaned differently from the captions that the model was trained on.
        """
        module: Any = getattr(self.trainer, "lightning_module", None)
        if hasattr(module, "check_prompt_cleaning"):
            module.check_prompt_cleaning(self.clean_captions)
        return super().predict_dataloader()

    def request(self, index: int) -> dict[str, Any]:
        """``index`` of the image in the run and ``captions``, its prompt."""
        return {"index": index, "captions": self.prompts[self.labels[index]]}
