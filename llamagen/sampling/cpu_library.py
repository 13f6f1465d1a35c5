"""Compiles the decode step for this machine's processor, once."""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

FOLDER = Path(__file__).parent
SOURCES = [FOLDER / name for name in ("cpu_vector.h", "cpu_step.cpp", "cpu_draw.cpp")]


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
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llamagen"
    name = hashlib.sha256(
        "\0".join([*(file.read_text() for file in SOURCES), *command, _processor()]).encode()
    ).hexdigest()[:24]
    path = folder / f"cpu_step_{name}.so"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            made = Path(temporary) / path.name
            done = subprocess.run([*command, *map(str, SOURCES[1:]), "-o", str(made)], capture_output=True, text=True)
            if done.returncode:
                lines = (done.stderr or "no message").strip().splitlines()
                error = next((line for line in lines if "error" in line), lines[-1])
                raise ValueError(f"{compiler} could not compile {FOLDER}: {error}; sample without compiling")
            os.replace(made, path)
    library = ctypes.CDLL(str(path))
    library.scratch_bytes.restype = ctypes.c_int64
    library.scratch_bytes.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64]
    library.forward.restype, library.forward.argtypes = None, [ctypes.c_void_p, ctypes.c_void_p]
    library.draw.restype, library.draw.argtypes = None, [ctypes.c_void_p]
    return library


def _processor() -> str:
    """What native code depends on, for folders that several machines share."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return "\n".join([platform.platform(), *[line for line in lines if line.startswith(("flags", "Features"))][:1]])
