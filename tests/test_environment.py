"""``python -m llamagen.environment`` describes any machine, also one on which nothing works."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llamagen import environment
from llamagen.command import run_command

ROOT = Path(__file__).resolve().parents[1]


def test_prints_versions_platform_and_hardware() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "llamagen.environment"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stderr == ""
    printed = dict(line.split(":", 1) for line in done.stdout.splitlines())
    assert {name: value.strip() for name, value in printed.items()}["torch"] == torch.__version__
    assert printed["Python"].split()[0] == sys.version.split()[0]
    for name in ("llamagen-lightning", "commit", "lightning", "numpy", "processor", "cores", "memory", "GPUs"):
        assert printed[name].strip(), name


def test_missing_programs_and_packages_are_reported_without_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # no git, no nvidia-smi, no compiler
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setitem(sys.modules, "torch", None)  # importing it fails
    found = environment.environment()
    assert found["GPUs"] == "none (nvidia-smi reports none)"
    assert found["C++ compiler"] == "not available"
    assert found["commit"] in ("not available", "not a git clone")
    assert found["PyTorch"].startswith("cannot be imported or used: ModuleNotFoundError")
    assert environment.installed_version("no-such-distribution") == "not installed"
    assert environment.memory(tmp_path / "meminfo") == "not available"
    assert environment.processor(tmp_path / "cpuinfo")


def test_optional_packages_are_listed_only_if_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "installed_version", lambda name: "not installed" if name == "wandb" else "1.0")
    found = environment.environment()
    assert "wandb" not in found
    assert found["scipy"] == "1.0"


def test_reads_processor_and_memory(tmp_path: Path) -> None:
    cpuinfo, meminfo = tmp_path / "cpuinfo", tmp_path / "meminfo"
    cpuinfo.write_text("processor\t: 0\nmodel name\t: Xeon\nflags\t\t: fpu avx2 amx_tile avx512f\n\n")
    meminfo.write_text("MemTotal:       16777216 kB\nMemFree: 1 kB\nMemAvailable:    8388608 kB\n")
    assert environment.processor(cpuinfo) == "Xeon (avx2 avx512f amx_tile)"
    assert environment.memory(meminfo) == "16.0 GiB, 8.0 GiB available"


@pytest.mark.parametrize("command", ["/nowhere/c++", "'unbalanced", "false"])
def test_a_compiler_that_does_not_run_is_named(monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    monkeypatch.setenv("CXX", command)
    assert environment.compiler().startswith(f"{command}: ")


def test_a_folder_without_git_has_no_commit(tmp_path: Path) -> None:
    assert environment.commit(tmp_path) == "not a git clone"


def test_the_message_of_a_bug_asks_for_it(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run_command(lambda: [][0])
    assert "python -m llamagen.environment" in capfd.readouterr().err
