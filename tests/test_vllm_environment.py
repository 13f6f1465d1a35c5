"""The environment of the tests of vLLM: it is complete, or made again."""

import re
import subprocess
from pathlib import Path

import pytest

from tests import vllm_environment
from tests.vllm_environment import MARKER, ROOT, environment_folder, make_environment


def test_an_interrupted_installation_starts_again_and_a_complete_one_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, commands, failing, for_cuda = tmp_path / "cache" / "vllm", list[str](), [True], [True]

    def run(command: list[str]) -> None:
        commands.append(" ".join(command))
        if "venv" in command:
            folder.mkdir()
        elif "-r" in command:
            pins = Path(command[-1]).read_text()
            assert "\nvllm-cpu==" in pins
            assert "\nvllm==" not in pins
            if failing.pop():
                raise subprocess.CalledProcessError(1, command)
            failing.append(False)
        elif "import torch" in command and for_cuda:
            for_cuda.clear()
            raise subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(vllm_environment, "_run", run)
    with pytest.raises(subprocess.CalledProcessError):
        make_environment(folder)
    (folder / "half").write_text("")
    failing.append(False)
    with pytest.raises(SystemExit, match="most likely it is a build for CUDA: repeat the command with PIP_ARGS="):
        make_environment(folder)
    assert make_environment(folder, ["--extra"]) == folder / "bin" / "python"
    assert not (folder / "half").exists()
    assert (folder / MARKER).is_file()
    made = len(commands)
    make_environment(folder)
    assert commands[made:] == [commands[-1]]
    assert commands[-1].endswith(f"--no-deps -e {ROOT}")
    assert any("--no-deps --extra -r" in command for command in commands)


def test_its_name_depends_on_its_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = environment_folder()
    assert re.fullmatch(r"vllm-[0-9a-f]{16}", before.name)
    monkeypatch.setattr(vllm_environment, "CONSTRAINTS", tmp_path / "pins")
    (tmp_path / "pins").write_text("torch==1\n")
    assert environment_folder() != before
    assert environment_folder().parent == tmp_path / "llamagen-lightning"
