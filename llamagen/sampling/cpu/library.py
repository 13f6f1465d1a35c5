"""Compiles the decode step for this machine's processor, once."""

import ctypes
import errno
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from llamagen.files import atomic_file

FOLDER = Path(__file__).parent
SOURCES = [FOLDER / name for name in ("vector.h", "step.cpp", "sampling.cpp")]


@cache
def cpu_library(weight: str, narrow: str) -> ctypes.CDLL:
    """The library for a type of weights and one of activations, from the cache if it was compiled before.

    It is kept in ``~/.cache/llamagen`` (or below ``XDG_CACHE_HOME``) and made anew for another processor, compiler or
    source.

    Args:
        weight: C type of weights: ``float``, ``uint16_t`` for bfloat16, ``int8_t``.
        narrow: C type of activations and cache: ``float`` or ``uint16_t``.

    Raises:
        ValueError: if there is no C++ compiler, or it fails.
    """
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if compiler is None:
        raise ValueError(
            "compiled sampling on a CPU needs a C++ compiler; install g++ or clang++, or sample without it"
        )
    native = "-march=native" if platform.machine().lower() in ("x86_64", "amd64") else "-mcpu=native"
    command = [*shlex.split(compiler), "-O3", "-std=c++17", native, "-fopenmp", "-fno-math-errno", "-shared", "-fPIC"]
    command += [f"-DWEIGHT={weight}", f"-DNARROW={narrow}"]
    version = _run([*shlex.split(compiler), "--version"], compiler).stdout
    parts = [*(file.read_text() for file in SOURCES), *command, version, _processor()]
    name = f"cpu_step_{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:24]}.so"
    path = _cache_folder() / name
    if not path.exists():
        with atomic_file(path) as temporary:
            done = _run([*command, *map(str, SOURCES[1:]), "-o", str(temporary)], compiler)
            if done.returncode:
                lines = done.stderr.strip().splitlines() or ["no message"]
                full = next((line for line in lines if "No space left" in line), None)
                if full is not None:  # here, or where the compiler keeps its temporary files
                    raise OSError(errno.ENOSPC, full)
                error = next((line for line in lines if "error" in line), lines[-1])
                raise ValueError(f"{compiler} could not compile {FOLDER}: {error}; sample without compiling")
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise ValueError(
            f"{path} cannot be loaded ({error}); set XDG_CACHE_HOME to a folder from which programs may run"
        ) from error
    library.scratch_bytes.restype = ctypes.c_int64
    library.scratch_bytes.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64]
    library.forward.restype, library.forward.argtypes = None, [ctypes.c_void_p, ctypes.c_void_p]
    library.draw.restype, library.draw.argtypes = None, [ctypes.c_void_p]
    return library


def _run(command: list[str], compiler: str) -> "subprocess.CompletedProcess[str]":
    try:
        return subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise ValueError(
            f"the C++ compiler {compiler} cannot be run ({error.strerror}); set CXX to another one, or sample without "
            "compiling"
        ) from error


def _cache_folder() -> Path:
    """Below the home folder or, where nothing can be written there, below the one for temporary files."""
    homes = [os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")]
    homes.append(os.path.join(tempfile.gettempdir(), f"cache-{os.getuid()}"))
    for home in homes:
        folder = Path(home) / "llamagen"
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError:
            continue
        if os.access(folder, os.W_OK) and folder.stat().st_uid == os.getuid():
            return folder
    raise ValueError(f"none of {homes} can be written to; set XDG_CACHE_HOME to a folder of yours")


def _processor() -> str:
    """What native code depends on, for folders that several machines share."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return "\n".join([platform.platform(), *[line for line in lines if line.startswith(("flags", "Features"))][:1]])
