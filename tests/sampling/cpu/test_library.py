"""The C++ code is compiled on the machine that runs it. Errors name what is missing."""

import os
import stat
from pathlib import Path

import pytest

from llamagen.sampling import Sampler
from llamagen.sampling.cpu import library as cpu_library
from tests.small_models import small_gpt


@pytest.fixture(autouse=True)
def nothing_loaded() -> None:
    """Forget the libraries that other tests have loaded."""
    cpu_library.cpu_library.cache_clear()


def test_a_missing_compiler_is_reported_with_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match=r"needs a C\+\+ compiler; install g\+\+ or clang\+\+"):
        Sampler(small_gpt(), 1, compiled=True)


def test_the_error_of_a_compiler_is_quoted_and_no_file_is_left(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = tmp_path / "broken"
    compiler.write_text("#!/bin/sh\necho 'x.cpp:1: error: unknown flag' >&2\nexit 1\n")
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(ValueError, match=r"broken could not compile .*unknown flag"):
        Sampler(small_gpt(), 1, compiled=True)
    assert os.listdir(tmp_path / "cache" / "llamagen") == []


def test_a_changed_source_file_is_compiled_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler, source = tmp_path / "compiler", tmp_path / "step.cpp"
    compiler.write_text('#!/bin/sh\nfor last; do :; done\n[ "$last" = --version ] || echo > "$last"\n')
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(cpu_library, "SOURCES", [source])
    for text, libraries in (("old", 1), ("old", 1), ("new", 2)):
        source.write_text(text)
        with pytest.raises(ValueError, match="cannot be loaded"):  # the output of this compiler is empty
            cpu_library.cpu_library("float", "float")
        assert len(os.listdir(tmp_path / "cache" / "llamagen")) == libraries


def test_a_compiler_that_does_not_exist_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match=r"no-such-compiler cannot be run .*; set CXX"):
        Sampler(small_gpt(), 1, compiled=True)


def test_a_cache_folder_that_is_not_writable_is_replaced_by_a_temporary_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cpu_library.cpu_library.cache_clear()
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    Sampler(small_gpt(), 1, compiled=True)
    assert len(list(tmp_path.glob("cache-*/llamagen/cpu_step_*.so"))) == 1


def test_a_library_that_cannot_be_loaded_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str) -> None:
        raise OSError("failed to map segment from shared object")

    cpu_library.cpu_library.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr("ctypes.CDLL", refuse)
        with pytest.raises(ValueError, match=r"cannot be loaded \(failed to map .*; set XDG_CACHE_HOME"):
            Sampler(small_gpt(), 1, compiled=True)
