"""The README: short enough, and each of its commands is one that exists. benchmarks/readme_commands.py runs them."""

import importlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import evaluation.__main__
import main
from benchmarks.readme_commands import (
    ELSEWHERE,
    EXTRA,
    README,
    ROOT,
    Command,
    arguments,
    extra_options,
    read_commands,
    where_it_runs,
)
from command_line import interpolations

COMMANDS = read_commands(README.read_text())
RECORD = ROOT / "benchmarks/results/readme_commands.json"
WORK = {
    "datamodules.inspection": ("inspect", lambda *_: []),
    "datamodules.packing": ("pack", lambda **_: None),
    "llamagen.checkpoints.export": ("export", lambda *_: None),
    "llamagen.checkpoints.export --to": ("_export_model", lambda *_: None),
    "llamagen.cost.__main__": ("report", lambda *_: ""),
}
"""What a tool does after it has parsed its arguments, and what the tests do instead."""


def commands_with(text: str) -> list[Command]:
    return [command for command in COMMANDS if command.language == "bash" and text in command.text]


def name_of(command: Command) -> str:
    return f"line {command.line}"


def test_is_short() -> None:
    lines = README.read_text().splitlines()
    assert len(lines) <= 220
    assert [line for line in lines if len(line) > 120] == []


def test_shows_an_image_and_the_shortest_ways_to_images_on_the_first_screen() -> None:
    first = "\n".join(README.read_text().splitlines()[:45])
    assert all(
        text in first
        for text in ("![", "make quickstart", "LlamaGen.from_pretrained(", "main.py predict", "serving.page")
    )


def test_each_command_is_of_a_known_kind() -> None:
    assert {where_it_runs(command) for command in COMMANDS} == {"here", *ELSEWHERE.values()}


def test_an_unknown_command_is_an_error() -> None:
    (command,) = read_commands("```bash\nconda install llamagen\n```")
    with pytest.raises(ValueError, match="line 2: nothing runs 'conda install llamagen'"):
        where_it_runs(command)


def test_a_command_outside_a_fenced_block_is_an_error() -> None:
    with pytest.raises(ValueError, match="line 2 is a command outside a fenced block"):
        read_commands("Run\n    python main.py fit\n")


def test_reads_continued_lines_and_drops_comments() -> None:
    text = "```bash\nmake a  # the first\n\npython main.py fit \\\n    --x '[1, 2]'\n```\n```text\nno command\n```\n"
    assert read_commands(text) == [
        Command(2, "bash", "make a"),
        Command(4, "bash", "python main.py fit --x '[1, 2]'"),
    ]


@pytest.mark.parametrize("command", commands_with("python main.py"), ids=name_of)
def test_options_of_a_stage_exist(
    command: Command, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interpolations, "read_meta", lambda *_: {"num_classes": 10})  # the codes of an earlier command
    with pytest.raises(SystemExit) as end:
        main.main([*command.words[2:], "--print_config"])
    assert end.value.code == 0, capsys.readouterr().err


@pytest.mark.parametrize("command", commands_with("python -m evaluation"), ids=name_of)
def test_options_of_the_evaluation_exist(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        evaluation.__main__.main([*command.words[3:], "--print_config"])
    assert end.value.code == 0, capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [*commands_with("python -m datamodules."), *commands_with("python -m llamagen.")],
    ids=name_of,
)
def test_options_of_a_tool_exist(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    name = command.words[2]
    name = f"{name}.__main__" if f"{name}.__main__" in WORK else name
    module: Any = importlib.import_module(name)
    work: tuple[str, Callable[..., Any]] = WORK[f"{name} --to" if "--to" in command.words else name]
    done: list[str] = []

    def record(*args: Any, **options: Any) -> Any:
        done.append(name)
        return work[1](*args, **options)

    monkeypatch.setattr(module, work[0], record)
    monkeypatch.chdir(ROOT)
    module.main(command.words[3:])
    assert done


def test_extra_options_are_used() -> None:
    used = {extra for command in COMMANDS for extra in extra_options(command)}
    assert used == set(EXTRA)
    command = next(command for command in COMMANDS if "main.py fit" in command.text)
    assert arguments(command)[1:4] == ["main.py", "fit", "-c"]


def test_the_record_has_every_command_and_all_succeeded() -> None:
    record = json.loads(RECORD.read_text())["commands"]
    assert [entry["command"] for entry in record] == [command.text for command in COMMANDS]
    for entry in record:
        assert entry.get("status") == 0 or entry["not run here"] in ELSEWHERE.values()


def test_python_compiles() -> None:
    blocks = [command.text for command in COMMANDS if command.language == "python"]
    assert blocks
    for block in blocks:
        compile(block, "README.md", "exec")
        for module, names in re.findall(r"^from ([\w.]+) import (.+)$", block, re.MULTILINE):
            assert all(hasattr(importlib.import_module(module), name) for name in names.split(", "))


def test_names_of_files_exist() -> None:
    code = "\n".join(re.findall(r"```bash\n(.*?)```", README.read_text(), re.DOTALL))
    configs = set(re.findall(r"configs/[\w./]+\.yaml", code))
    assert configs
    assert [name for name in configs if not (ROOT / name).is_file()] == []
    tree = re.search(r"```text\n(.*?)```", README.read_text(), re.DOTALL)
    assert tree is not None
    folders = re.findall(r"^([a-z_]+)/", tree[1], re.MULTILINE)
    assert [name for name in folders if not Path(ROOT / name).is_dir()] == []


def test_the_list_of_configurations_is_complete() -> None:
    configs = ROOT / "configs"
    text = (configs / "README.md").read_text()
    links = set(re.findall(r"\]\(((?:vqgan|argen|logger|text|published|finetune)[^)]*)\)", text))
    assert all((configs / link).exists() for link in links)
    folders = ("argen/size", "vqgan/quantizer", "published", "published/base")
    listed = {path for folder in folders for path in (configs / folder).glob("*.yaml")}
    shipped = {path.relative_to(configs).as_posix() for path in set(configs.rglob("*.y*ml")) - listed}
    assert links == shipped | set(folders)
    for folder in folders:
        row = next(line for line in text.splitlines() if f"({folder})" in line)
        names = [path.stem for path in (configs / folder).glob("*.yaml")]
        assert [name for name in names if not re.search(rf"\b{name}\b", row)] == []
