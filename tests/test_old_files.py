"""Files that were written before modules, options and folders were renamed: see ``fixtures/before/README.md``."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import main
from tests.before import EXPECTED, FACTS, ROOT, rows, saved, unpack


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files, which tests only read."""
    folder = tmp_path_factory.mktemp("old_files")
    unpack(folder)
    return folder


@pytest.fixture(autouse=True)
def old_files(unpacked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in a temporary folder with a copy of the files."""
    shutil.copytree(unpacked, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)


def assert_same(found: Any, expected: Any, where: str) -> None:
    """Assert that primitives in containers are equal; floats only up to rounding."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key, value in expected.items():
            assert_same(found[key], value, f"{where}, {key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for number, value in enumerate(expected):
            assert_same(found[number], value, f"{where}, {number}")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-7), where
    else:
        assert found == expected, where


@pytest.mark.parametrize("name", FACTS)
def test_old_files_give_the_values_of_the_commit_that_wrote_them(name: str) -> None:
    found = json.loads(json.dumps(FACTS[name]()))
    assert_same(found, json.loads(EXPECTED.read_text())[name], name)


def test_files_of_the_same_weights_and_data_give_the_same_values() -> None:
    expected = json.loads(EXPECTED.read_text())
    assert expected["tokenizer"]["weights"] == expected["tokenizer"]["exported"]
    sampled = expected["sampled"]
    assert sampled["argen .ckpt"] == sampled["argen .pt"] == sampled["argen .safetensors"]
    assert sampled["text_argen .ckpt"] == sampled["text_argen .safetensors"]
    assert expected["extraction"] == expected["codes"]["codes"]["meta"]["splits"]
    assert expected["prompts"]["prompts"] == expected["prompts"]["prompts_stopped"]


def test_an_old_run_is_not_overwritten() -> None:
    before = rows("argen")
    with pytest.raises(ValueError, match="already holds a run"):
        main.main(saved("fit", "argen"))
    assert rows("argen") == before


def test_a_complete_old_folder_of_samples_is_not_overwritten() -> None:
    before = {path: path.stat().st_mtime_ns for path in (ROOT / "prompts").rglob("*.png")}
    assert len(before) == 7
    with pytest.raises(ValueError, match="already holds samples"):
        main.main(saved("predict", "prompts"))
    assert {path: path.stat().st_mtime_ns for path in before} == before
