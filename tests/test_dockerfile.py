"""The Dockerfile: its rules, its build context, and the server that it starts.

``benchmarks/dockerfile_steps.py`` runs its steps.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.dockerfile_steps import copied_files, ignored, read_steps
from serving.server.__main__ import _parser

ROOT = Path(__file__).resolve().parents[1]
STEPS = read_steps((ROOT / "Dockerfile").read_text())
IGNORE = (ROOT / ".dockerignore").read_text().split()


def step(name: str) -> str:
    (found,) = (each.text for each in STEPS if each.name == name)
    return found


def test_the_linter_finds_nothing() -> None:
    linter = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([linter, ROOT / "Dockerfile"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_build_context_has_what_is_copied_and_nothing_else() -> None:
    sources = [source for each in STEPS if each.name == "COPY" for source in each.text.split()[:-1]]
    files = {name for source in sources for name in copied_files(source, IGNORE)}
    assert {"pyproject.toml", "serving/server/__main__.py", "llamagen/imagenet_classes.tsv"} <= files
    assert "llamagen/sampling/cpu/sampling.cpp" in files
    assert not any("__pycache__" in name for name in files)
    context = {path.name for path in ROOT.iterdir() if not ignored(path.name, IGNORE)}
    assert context <= set(sources)


@pytest.mark.parametrize(
    ("path", "excluded"),
    [
        ("tests/test_files.py", True),
        (".git/config", True),
        ("llamagen/models/gpt.py", False),
        ("llamagen/models/__pycache__/gpt.pyc", True),
        ("README.md", False),
        ("docs/README.md", True),
    ],
)
def test_patterns_of_the_build_context(path: str, excluded: bool) -> None:
    assert ignored(path, IGNORE) is excluded


def test_the_entry_point_is_the_server_with_options_that_exist() -> None:
    entry, model = json.loads(step("ENTRYPOINT")), json.loads(step("CMD"))
    assert entry[:3] == ["python", "-m", "serving.server"]
    options = _parser().parse_args([*entry[3:], *model])
    assert options.host == "0.0.0.0"  # a container's own loopback address cannot be reached from outside
    assert str(options.port) == step("EXPOSE")
    assert f"127.0.0.1:{options.port}/health" in step("HEALTHCHECK")


def test_the_server_is_not_run_by_root_and_owns_its_volume() -> None:
    names = [each.name for each in STEPS]
    assert step("USER") not in ("root", "0")
    assert names.index("USER") < names.index("ENTRYPOINT")
    assert f"chown llamagen {step('VOLUME')}" in " ".join(each.text for each in STEPS if each.name == "RUN")


def test_an_instruction_that_the_script_does_not_run_is_an_error() -> None:
    with pytest.raises(ValueError, match="the Dockerfile has the instruction ADD"):
        read_steps("FROM python:3.11\nADD a \\\n    b\n")
    assert [tuple(each) for each in read_steps("# a\nRUN a \\\n    # b\n    && c\n")] == [("RUN", "a && c")]
