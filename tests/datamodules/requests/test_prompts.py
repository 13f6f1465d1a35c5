"""Requests for images of prompts from lists, text files and tables, including unusual ones."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from datamodules import PromptDataModule
from llamagen.text.prompts import clean_prompt
from tests.datamodules.shard_files import assert_one_line

PARTI = (
    "Prompt\tCategory\tChallenge\tNote\r\n"
    '"Hello" on a sign, it\'s "open\tOutdoor Scenes\tWriting & Symbols\tquotes are literal\r\n'
    "a corgi, ünïcode, 柴犬 🐕‍🦺\tAnimals\tBasic\r\n"
    "\tAbstract\tBasic\tno words\r\n"
    "\r\n"
)


def requests(data: PromptDataModule, rank: int = 0, world_size: int = 1) -> list[tuple[int, str]]:
    """(index, prompt) of each image of a rank, in order."""
    trainer = SimpleNamespace(global_rank=rank, world_size=world_size, lightning_module=None)
    data.trainer = trainer  # type: ignore[assignment]
    return [
        request
        for batch in data.predict_dataloader()
        for request in zip(batch["index"].tolist(), batch["captions"], strict=True)
    ]


def test_byte_order_mark_before_a_prompt_is_dropped(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes("\ufeffa cat\r\na dog\r".encode())
    assert PromptDataModule(tmp_path / "p.txt").prompts == PromptDataModule(["\ufeffa cat", "a dog"]).prompts
    assert PromptDataModule(tmp_path / "p.txt").prompts == ["a cat", "a dog"]


def test_prompts_are_requested_in_rounds_and_keep_their_numbers() -> None:
    prompts = ["a cat", "", "a dog"]
    few, more = (PromptDataModule(prompts, per_prompt=n, batch_size=2) for n in (1, 3))
    assert requests(more) == list(enumerate(prompts * 3))
    assert requests(few) == requests(more)[:3]
    assert (more.labels.dtype, more.labels.tolist()) == (np.int64, [0, 1, 2] * 3)


def test_batches_are_distributed_over_ranks_without_finished_images() -> None:
    data = PromptDataModule([str(number) for number in range(10)], batch_size=3)
    data.leave_out([0, 4, 9])
    assert data.left == 7
    left = [(index, str(index)) for index in (1, 2, 3, 5, 6, 7, 8)]
    assert [requests(data, rank, 2) for rank in range(2)] == [left[0::2], left[1::2]]
    assert [len(batch["captions"]) for batch in data.test_dataloader()] == [3]


@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"], ids=repr)
def test_text_file_has_a_prompt_in_each_non_blank_line(tmp_path: Path, ends: str) -> None:
    path = tmp_path / "prompts.txt"
    lines = ["a cat", "", "  ein Hündchen 🐶 ", "\t", "one\x0bprompt\u2028only", '"quoted", with\ta tab', "x" * 10**6]
    path.write_bytes(b"\xef\xbb\xbf" + ends.join(lines).encode())
    expected = ["a cat", "ein Hündchen 🐶", "one prompt only", '"quoted", with a tab', "x" * 10**6]
    assert PromptDataModule(path).prompts == PromptDataModule(str(path)).prompts == expected
    assert PromptDataModule(path).columns == [{}] * 5


def test_table_is_read_literally_and_keeps_its_other_columns(tmp_path: Path) -> None:
    path = tmp_path / "PartiPrompts.TSV"
    path.write_bytes(b"\xef\xbb\xbf" + PARTI.encode())
    data = PromptDataModule(path)
    assert data.prompts == ['"Hello" on a sign, it\'s "open', "a corgi, ünïcode, 柴犬 🐕‍🦺", ""]
    assert data.columns[0] == {
        "Category": "Outdoor Scenes",
        "Challenge": "Writing & Symbols",
        "Note": "quotes are literal",
    }
    assert data.columns[1] == {"Category": "Animals", "Challenge": "Basic", "Note": ""}


def test_column_of_the_prompts_can_be_named_in_any_case(tmp_path: Path) -> None:
    path = tmp_path / "table.tsv"
    path.write_text("id\tCAPTION\tprompt\n7\ta cat\tan old cat\n")
    assert PromptDataModule(path).prompts == ["an old cat"]
    data = PromptDataModule(path, column="caption")
    assert (data.prompts, data.columns) == (["a cat"], [{"id": "7", "prompt": "an old cat"}])


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("a\0b\x07c\x7fd\x85e", "a b c d e"),
        ("two\nlines\r\n", "two lines"),
        ("a\u2028b\u2029c", "a b c"),
        ("half \ud83d of a pair", "half \ufffd of a pair"),
        ("👩‍👩‍👧 e\u0301 \u200f\u05d0", "👩‍👩‍👧 e\u0301 \u200f\u05d0"),
        (" \t\n", ""),
    ],
    ids=ascii,
)
def test_control_characters_become_spaces_and_the_rest_stays(text: str, cleaned: str) -> None:
    assert clean_prompt(text) == cleaned
    assert PromptDataModule([text]).prompts == [cleaned]


@pytest.mark.parametrize(
    ("name", "content", "options", "phrases"),
    [
        ("p.txt", None, {}, ("cannot be read (No such file or directory)", "give a list of prompts")),
        ("p\0.txt", None, {}, ("cannot be read",)),
        ("p" * 5000, None, {}, ("cannot be read (File name too long)",)),
        ("p.txt", b"\xff\xfea\0", {}, ("cannot be read (not a text file in UTF-8)",)),
        ("p.txt", b"", {}, ("has no prompts", "write one in each line")),
        ("p.txt", b" \n\x00\n", {}, ("has no prompts",)),
        ("p.tsv", b"", {}, ("has no column 'Prompt'",)),
        ("p.tsv", b"Prompt\tNote\n", {}, ("has no prompts",)),
        ("p.tsv", b"Text\tNote\na\tb\n", {}, ("no column 'Prompt', but 'Text, Note'", "set column to")),
        ("p.tsv", b"Text\tNote\na\tb\n", {"column": "Texts"}, ("no column 'Texts'",)),
        ("p.tsv", b"Prompt\tprompt\na\tb\n", {}, ("more than one column 'Prompt'",)),
        ("p.tsv", b"Prompt\tNote\n\na\tb\tc\n", {}, ("line 3", "has 3 of 2 columns", "use no tabs within a prompt")),
        ("p.tsv", b"Note\tPrompt\na\n", {}, ("line 2", "has 1 of 2 columns")),
        ("p.csv", b"Prompt,Note\na,b\n", {}, ("p.csv, but tables are read as .tsv",)),
        ("p.txt", b"a\n", {"column": "Prompt"}, ("column is 'Prompt'", "only a .tsv has columns")),
    ],
    ids=str,
)
def test_bad_prompt_file_is_refused_with_a_remedy(
    name: str, content: bytes | None, options: dict[str, Any], phrases: tuple[str, ...], tmp_path: Path
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        PromptDataModule(path, **options)
    assert_one_line(error, *phrases)
    assert len(str(error.value)) < 700


def test_list_with_json_escapes_is_read() -> None:
    assert PromptDataModule(r'["\ud83d\udc15 a", "\ud83d b", "http://c"]').prompts == ["🐕 a", "\ufffd b", "http://c"]


def test_prompts_are_cleaned_on_request() -> None:
    prompts = ["A <b>Red</b> HOUSE  http://a.com/b", "http://a.com"]
    assert PromptDataModule(prompts, clean_captions=True).prompts == ["a red house", ""]
    assert PromptDataModule(prompts, clean_captions="web").prompts == ["a red house", ""]
    assert PromptDataModule(prompts, clean_captions="published").prompts == ["a red house", ""]
    assert PromptDataModule(prompts, clean_captions=False).prompts == prompts
    assert PromptDataModule(prompts).prompts == prompts  # without a model whose record says otherwise


def test_folder_is_refused_as_prompt_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError) as error:
        PromptDataModule(tmp_path)
    assert_one_line(error, tmp_path, "cannot be read (Is a directory)")


@pytest.mark.parametrize(
    ("options", "phrase"),
    [
        ({"prompts": []}, "prompts is []"),
        ({"prompts": ["a", 3]}, "prompts is ['a', 3]"),
        ({"prompts": ["a"], "per_prompt": 0}, "per_prompt is 0"),
        ({"prompts": ["a"], "batch_size": 0}, "batch_size 0"),
        ({"prompts": ["a"], "column": "Prompt"}, "prompts is a list; leave it out"),
        ({"prompts": '["a", "b'}, "which is not a list (Unterminated string"),
        ({"prompts": "[1]"}, "prompts is [1]"),
    ],
    ids=str,
)
def test_invalid_request_is_refused_with_name_and_value(options: dict[str, Any], phrase: str) -> None:
    with pytest.raises(ValueError) as error:
        PromptDataModule(**options)
    assert_one_line(error, phrase)
