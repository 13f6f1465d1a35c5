"""Run every command of README.md in a scratch copy of the project, to check that all of them work.

    python -m benchmarks.readme_commands [--out FILE.json] [--keep FOLDER] [--only REGEX]

Commands run in order, as written, and use the files of earlier commands. Small stand-ins of the same names replace data
and weights that are not in the repository (``readme_stand_ins.py``). ``EXTRA`` lists the options that are appended to
commands that would otherwise need GPUs, days or a download. A command of an unknown kind is an error. Prints a table,
then one JSON line.
"""

import argparse
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.readme_stand_ins import HUB
from llamagen.files import atomic_file

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
TIMEOUT = 1200.0
"""Seconds that a command may take."""

ELSEWHERE = {
    "make quickstart": "benchmarks/quickstart.py runs it in a fresh clone with an empty environment",
    "make test": ".ci/run runs it in an empty environment",
    "python -m serving.page c2i_B_256": "benchmarks/page.py opens pages and measures them",
    "python -m serving.server c2i_B_256": "benchmarks/serving_load.py starts a server and sends it requests",
    "curl http://127.0.0.1:8000/v1/images/generations -H 'Content-Type: application/json' "
    """-d '{"prompt": "golden retriever"}'""": "tests/serving/server/ sends such requests",
}
"""Commands that other scripts run, by the name of the script."""

KNOWN = ("main.py", "-m evaluation", "-m datamodules.", "-m llamagen.")
"""What may follow ``python`` in a command."""


class Command(NamedTuple):
    """A command of a Markdown file.

    Attributes:
        line: number of its first line, from 1.
        language: ``bash``, or ``python`` for a whole block of Python.
        text: the command in one line without comments, or the Python code.
    """

    line: int
    language: str
    text: str

    @property
    def words(self) -> list[str]:
        """The arguments of a shell command, the program included."""
        return shlex.split(self.text)


class Extra(NamedTuple):
    """Options that are appended to commands.

    Attributes:
        pattern: regular expression; the options are for commands in which it is found.
        reason: why they are needed.
        options: the appended options.
        unless: regular expression of commands that do not get them.
    """

    pattern: str
    reason: str
    options: str
    unless: str | None = None


EXTRA = (
    Extra(
        r"main\.py fit",
        "2 steps on one CPU instead of a training",
        "--trainer.max_steps 2 --trainer.limit_val_batches 1 --trainer.accelerator cpu --trainer.devices 1",
    ),
    Extra(
        r"vqgan/base\.yaml",
        "a narrow tokenizer; without LPIPS, whose weights are a download",
        "--model.init_args.net.channels 32 --model.init_args.net.num_res_blocks 1 --model.init_args.net.z_channels 32 "
        "--model.init_args.discriminator.init_args.channels 8 --model.init_args.loss.perceptual_weight 0 "
        "--data.init_args.batch_size 2 --data.init_args.num_workers 0",
    ),
    Extra(
        r"main\.py .*argen/base\.yaml",
        "a small autoregressive model",
        "--model.init_args.net.n_layer 2 --model.init_args.net.n_head 2 --model.init_args.net.dim 64",
    ),
    Extra(
        r"published/(c2i_L|t2i)",
        "a small autoregressive model",
        "--model.init_args.net.n_layer 2 --model.init_args.net.n_head 2 --model.init_args.net.dim 64",
    ),
    Extra(
        r"main\.py fit .*(argen/base|published/c2i_B_256)\.yaml",
        "small batches",
        "--data.init_args.batch_size 4 --data.init_args.num_workers 0",
    ),
    Extra(
        r"num_classes 10 .*--ckpt_path|argen/evaluate\.yaml|main\.py test .*published/c2i",
        "2 images for each of 10 classes",
        "--data.init_args.classes 10 --data.init_args.per_class 2",
    ),
    Extra(
        r"published/t2i",
        "a small text encoder; FLAN-T5-XL is a download",
        "--model.init_args.net.caption_dim 64 --model.init_args.text_encoder.name small-t5",
    ),
    Extra(
        r"main\.py test",
        "Inception with random weights; the published ones are a download",
        "--trainer.callbacks.features Inception --trainer.callbacks.features.weights inception.pth",
    ),
    Extra(
        r"-m evaluation (reference|compare)",
        "Inception with random weights; the published ones are a download",
        "--features Inception --features.weights inception.pth",
    ),
)


def read_commands(markdown: str) -> list[Command]:
    """The commands in the fenced blocks of a Markdown text.

    Raises:
        ValueError: for an indented block of code, whose language is not known.
    """
    commands: list[Command] = []
    block: list[str] = []
    language: str | None = None
    start = 0
    for number, line in enumerate(markdown.splitlines(), 1):
        if language is None and line.startswith("```"):
            language, block, start = line[3:].strip(), [], number + 1
        elif line.startswith("```"):
            if language == "bash":
                commands += _shell_commands(block, start)
            elif language == "python":
                commands.append(Command(start, "python", "\n".join(block)))
            language = None
        elif language is not None:
            block.append(line)
        elif line.startswith(("    python ", "    make ", "    pip ")):
            raise ValueError(f"line {number} is a command outside a fenced block; put it between ```bash and ```")
    return commands


def _shell_commands(lines: list[str], first: int) -> list[Command]:
    commands: list[Command] = []
    joined, start = "", first
    for number, line in enumerate(lines, first):
        if not joined:
            start = number
        if line.endswith("\\"):
            joined += line[:-1].rstrip() + " "
            continue
        words = shlex.split(joined + line.strip(), comments=True)
        if words:
            commands.append(Command(start, "bash", shlex.join(words)))
        joined = ""
    return commands


def where_it_runs(command: Command) -> str:
    """``here``, or the script that runs a command instead.

    Raises:
        ValueError: for a command of an unknown kind.
    """
    if command.language == "python":
        return "here"
    if command.text in ELSEWHERE:
        return ELSEWHERE[command.text]
    program, *rest = command.words
    if program == "python" and " ".join(rest).startswith(KNOWN):
        return "here"
    raise ValueError(
        f"line {command.line}: nothing runs {command.text!r}; add its kind to benchmarks/readme_commands.py"
    )


def extra_options(command: Command) -> list[Extra]:
    """Options that are appended to a command, in order."""
    if command.language == "python":
        return []
    text = command.text
    return [
        extra
        for extra in EXTRA
        if re.search(extra.pattern, text) and not (extra.unless and re.search(extra.unless, text))
    ]


def arguments(command: Command) -> list[str]:
    """The process of a command, with the extra options."""
    if command.language == "python":
        return [sys.executable, "-c", command.text]
    options = [option for extra in extra_options(command) for option in shlex.split(extra.options)]
    return [sys.executable, *command.words[1:], *options]


def copy_project(folder: Path) -> None:
    """Copy all files that git does not ignore."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    output = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, output.split("\0")):
        if (ROOT / name).is_file():
            with atomic_file(folder / name) as temporary:
                shutil.copyfile(ROOT / name, temporary)


def run(command: Command, folder: Path) -> dict[str, Any]:
    """Run a command.

    Returns:
        Its record: status (0 if it succeeded), seconds, and the last lines of a failure.
    """
    hub = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / HUB)}
    environment = {**os.environ, **hub, "PYTHONPATH": str(folder)}
    started = time.perf_counter()
    try:
        done = subprocess.run(
            arguments(command), cwd=folder, env=environment, capture_output=True, text=True, timeout=TIMEOUT
        )
        status, output = done.returncode, done.stdout + done.stderr
    except subprocess.TimeoutExpired:
        status, output = -1, f"took more than {TIMEOUT:.0f} s"
    record: dict[str, Any] = {
        "line": command.line,
        "command": command.text,
        "extra options": {extra.reason: extra.options for extra in extra_options(command)},
        "status": status,
        "seconds": round(time.perf_counter() - started, 1),
    }
    if status:
        record["output"] = output.splitlines()[-15:]
    return record


def main() -> None:
    from benchmarks.readme_stand_ins import make_stand_ins

    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--out", type=Path, help="file for the record, .json")
    parser.add_argument("--keep", type=Path, help="work in this folder and keep it; stand-ins and runs are reused")
    parser.add_argument("--only", default="", help="regular expression: run only matching commands")
    options = parser.parse_args()
    commands = read_commands(README.read_text())
    places = [where_it_runs(command) for command in commands]  # an unknown command is an error before the first run
    old = read_records(options.out) if options.only else {}
    records: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "project" if options.keep is None else options.keep.resolve()
        folder.mkdir(parents=True, exist_ok=True)
        copy_project(folder)
        make_stand_ins(folder)
        for command, place in zip(commands, places, strict=True):
            if place != "here":
                records.append({"line": command.line, "command": command.text, "not run here": place})
            elif re.search(options.only, command.text, re.DOTALL):
                records.append(run(command, folder))
                show(records[-1])
            elif command.text in old:
                records.append({**old[command.text], "line": command.line})
            if options.out is not None:
                with atomic_file(options.out) as temporary_file:
                    temporary_file.write_text(json.dumps(as_result(records), indent=2, ensure_ascii=False) + "\n")
    print(json.dumps(as_result(records)))
    if any(record.get("status") for record in records):
        raise SystemExit(1)


def read_records(path: Path | None) -> dict[str, dict[str, Any]]:
    """The commands of a record by their text."""
    if path is None or not path.exists():
        return {}
    return {record["command"]: record for record in json.loads(path.read_text())["commands"]}


def as_result(records: list[dict[str, Any]]) -> dict[str, Any]:
    """The content of the file of results."""
    from benchmarks.timing import machine

    return {
        "benchmark": "readme_commands",
        "commands": records,
        "hardware": machine("cpu"),
        "versions": {"python": platform.python_version()},
        "command": "python -m benchmarks.readme_commands --out benchmarks/results/readme_commands.json",
    }


def show(record: dict[str, Any]) -> None:
    """Print a row of the table, and the output of a command that failed."""
    state = "ok" if record["status"] == 0 else f"failed ({record['status']})"
    first = record["command"].splitlines()[0]
    print(f"{record['line']:>4} | {record['seconds']:>7.1f} s | {state:<11} | {first[:90]}", flush=True)
    if record["status"]:
        print("\n".join(record["output"]), file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
