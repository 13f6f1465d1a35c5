"""Describes a machine for a bug report: ``python -m llamagen.environment``.

The command never fails: missing or broken parts are reported, because it is usually run on broken installations.
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from llamagen.cores import available_cores, usable_cores

ROOT = Path(__file__).resolve().parents[1]
PROJECT = "llamagen-lightning"
REQUIRED = (
    "torch",
    "lightning",
    "torchmetrics",
    "jsonargparse",
    "omegaconf",
    "webdataset",
    "fsspec",
    "kornia",
    "kornia-rs",
    "safetensors",
    "numpy",
    "pillow",
)
OPTIONAL = ("transformers", "sentencepiece", "ftfy", "s3fs", "gcsfs", "wandb", "scipy", "triton")
PROCESSOR_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16", "amx_int8")
"""Instruction sets that the compiled decode step, bfloat16 and int8 use; names as in ``/proc/cpuinfo``."""
VARIABLES = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "CXX")
TIMEOUT = 10
"""Seconds to wait for a program that does not answer, such as ``nvidia-smi`` with a hung driver."""


def main() -> None:
    """Print one line for each property of :func:`environment`."""
    for name, value in environment().items():
        print(f"{name + ':':<14} {value}")


def environment() -> dict[str, str]:
    """Versions, platform, processor, memory, GPUs, compiler and commit.

    Returns:
        A description of each in one line, in the order of printing; "not available" or the reason if there is none.
    """
    return {
        PROJECT: installed_version(PROJECT),
        "commit": commit(),
        "Python": f"{platform.python_version()} ({sys.executable})",
        **{name: installed_version(name) for name in REQUIRED},
        **{name: found for name in OPTIONAL if (found := installed_version(name)) != "not installed"},
        "platform": platform.platform(),
        "processor": processor(),
        "cores": cores(),
        "memory": memory(),
        "PyTorch": torch_build(),
        "GPUs": gpus(),
        "C++ compiler": compiler(),
        "variables": ", ".join(f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ) or "none set",
    }


def installed_version(distribution: str) -> str:
    """The version of an installed distribution, without importing it."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "not installed"
    except Exception as error:  # damaged metadata of an installation
        return _reason(error)


def commit(folder: Path = ROOT) -> str:
    """The commit of a git clone, and whether tracked files have been changed since."""
    if not (folder / ".git").exists():  # otherwise git would describe a repository around this folder
        return "not a git clone"
    head = _output(["git", "-C", str(folder), "rev-parse", "HEAD"])
    if head is None:
        return "not available"
    changes = _output(["git", "-C", str(folder), "status", "--porcelain", "--untracked-files=no"])
    return f"{head} with local changes" if changes else head


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Model name and instruction sets; without ``/proc/cpuinfo``, the name that Python reports."""
    lines = _lines(cpuinfo)
    entries = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    flags = entries.get("flags", entries.get("Features", "")).split()
    known = " ".join(flag for flag in PROCESSOR_FLAGS if flag in flags)
    name = entries.get("model name") or platform.processor() or platform.machine() or "unknown"
    return f"{name} ({known})" if known else name


def cores() -> str:
    """Number of cores that this process may use, and that the machine has."""
    return f"{usable_cores()} usable, {available_cores()} in the process's affinity, {os.cpu_count()} in the machine"


def memory(meminfo: Path = Path("/proc/meminfo")) -> str:
    """Memory of the machine, total and available, in GiB."""
    sizes = {}
    for line in _lines(meminfo):
        name, _, value = line.partition(":")
        if name in ("MemTotal", "MemAvailable") and value.split()[:1] and value.split()[0].isdigit():
            sizes[name] = int(value.split()[0]) / 2**20  # the file counts KiB
    if "MemTotal" not in sizes:
        return "not available"
    free = f", {sizes['MemAvailable']:.1f} GiB available" if "MemAvailable" in sizes else ""
    return f"{sizes['MemTotal']:.1f} GiB{free}"


def torch_build() -> str:
    """Target of the installed PyTorch build (CPU or CUDA version), usable GPUs and number of threads."""
    try:
        import torch

        built_for = "CPUs only" if torch.version.cuda is None else f"CUDA {torch.version.cuda}"
        usable = torch.cuda.device_count() if torch.cuda.is_available() else 0
        return f"built for {built_for}, can use {usable} GPUs and {torch.get_num_threads()} threads"
    except Exception as error:  # an installation can be broken in any way, which the report should show
        return f"cannot be imported or used: {_reason(error)}"


def gpus() -> str:
    """Names, memory and driver of NVIDIA GPUs as reported by the driver, including those that PyTorch cannot use."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    lines = (_output(query) or "").splitlines()
    return "; ".join(line.strip() for line in lines if line.strip()) or "none (nvidia-smi reports none)"


def compiler() -> str:
    """The C++ compiler that compiled sampling on a CPU uses, and its version."""
    command = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if command is None:
        return "not available"
    try:
        answer = _output([*shlex.split(command), "--version"])
    except ValueError as error:  # quotes in CXX that do not match
        return f"{command}: {_reason(error)}"
    return f"{command}: {answer.splitlines()[0] if answer else 'does not run'}"


def _output(command: list[str]) -> str | None:
    """Output of a program, stripped; None if it is missing, fails or does not answer."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=TIMEOUT, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(errors="replace").splitlines()
    except OSError:
        return []


def _reason(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


if __name__ == "__main__":
    main()
