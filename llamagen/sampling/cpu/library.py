"""Compilation of the C++ decode step for this machine's processor, cached on disk."""

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
SOURCES = [FOLDER / name for name in ("vector.h", "product.h", "tiles.h", "attention.h", "step.cpp", "sampling.cpp")]


@cache
def cpu_library(weight: str, narrow: str) -> ctypes.CDLL:
    """Load the library for given types of weights and activations; compile it if it is not cached.

    The cache is ``~/.cache/llamagen`` (or ``llamagen`` in ``XDG_CACHE_HOME``). Another processor, compiler or source
    file gets a library of its own.

    Args:
        weight: C type of weights: ``float``, ``uint16_t`` for bfloat16, ``int8_t``.
        narrow: C type of activations and cache: ``float`` or ``uint16_t``.

    Raises:
        ValueError: if there is no C++ compiler, it fails, the library cannot be loaded, or the kernel refuses the
            processor's matrix unit.
    """
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if compiler is None:
        raise ValueError(
            "compiled sampling on a CPU needs a C++ compiler; install g++ or clang++, or sample without compiling"
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
            done = _run(
                [*command, *(str(file) for file in SOURCES if file.suffix == ".cpp"), "-o", str(temporary)], compiler
            )
            if done.returncode:
                lines = done.stderr.strip().splitlines() or ["no message"]
                full = next((line for line in lines if "No space left" in line), None)
                if full is not None:  # the disk of the cache, or of the compiler's temporary files
                    raise OSError(errno.ENOSPC, full)
                error = next((line for line in lines if "error" in line), lines[-1])
                raise ValueError(f"{compiler} could not compile {FOLDER}: {error}; sample without compiling")
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise ValueError(
            f"{path} cannot be loaded ({error}); set XDG_CACHE_HOME to a folder on a disk without noexec"
        ) from error
    if refused := library.prepare_processor():
        raise ValueError(
            f"the kernel refuses this processor's matrix unit, AMX ({os.strerror(refused)}); update Linux to 5.16 or "
            f"newer, or set CXX='{compiler} -mno-amx-tile' to sample without it"
        )
    library.scratch_bytes.restype = ctypes.c_int64
    library.scratch_bytes.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64]
    library.forward.restype, library.forward.argtypes = None, [ctypes.c_void_p, ctypes.c_void_p]
    library.sample_codes.restype, library.sample_codes.argtypes = ctypes.c_bool, [ctypes.c_void_p]
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
    """A writable cache folder: in the home folder, or else in the folder of temporary files."""
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
    raise ValueError(f"none of {homes} is writable; set XDG_CACHE_HOME to a folder that you can write to")


def _processor() -> str:
    """Platform and instruction sets, which native code depends on: several machines may share the cache folder."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return "\n".join([platform.platform(), *[line for line in lines if line.startswith(("flags", "Features"))][:1]])
