"""Output paths are checked before any work, and the checks leave no files."""

from pathlib import Path

import pytest

from llamagen.output_paths import check_output, check_output_file, check_output_folder


def test_accepts_writable_paths_and_creates_nothing(tmp_path: Path) -> None:
    (tmp_path / "there.npz").write_text("kept")
    for name in ("new.npz", "a/b/new.npz", "there.npz"):
        check_output(tmp_path / name)
        check_output_file(tmp_path / name, (".npz",))
    for name in (".", "new", "a/b/new"):
        check_output_folder(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["there.npz"]
    assert (tmp_path / "there.npz").read_text() == "kept"


def test_rejects_paths_that_cannot_be_written_and_names_the_option(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder.npz").mkdir()
    (tmp_path / "nowhere").symlink_to(tmp_path / "missing")
    for path, reason in (
        (tmp_path / "file/a.npz", f"{tmp_path / 'file'} is not a folder"),
        (tmp_path / "file/b/a.npz", f"{tmp_path / 'file'} is not a folder"),
        (tmp_path / "nowhere/a.npz", f"{tmp_path / 'nowhere'} is not a folder"),
        (Path("/proc/nowhere/a.npz"), "/proc does not allow it"),
        (tmp_path / f"{'x' * 300}.npz", "file name too long"),
    ):
        with pytest.raises(ValueError) as error:
            check_output_file(path, (".npz",), "out")
        assert str(error.value).startswith(f"out {path} cannot be written")
        assert reason in str(error.value)
        assert "\n" not in str(error.value)
    for path in (tmp_path / "folder.npz", tmp_path / "a.pt", tmp_path / "a"):
        with pytest.raises(ValueError, match=r"out is .*; give the name of a file, \*\.npz or \*\.npy$"):
            check_output_file(path, (".npz", ".npy"))


def test_rejects_folders_that_cannot_be_written_into(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder, reason in (
        (tmp_path / "file", f"{tmp_path / 'file'} is not a folder"),
        (tmp_path / "file/run", f"{tmp_path / 'file'} is not a folder"),
        (Path("/proc"), "/proc does not allow it"),
        (Path("/proc/nowhere/run"), "/proc does not allow it"),
    ):
        with pytest.raises(ValueError) as error:
            check_output_folder(folder, "root", "set another one")
        assert str(error.value).startswith(f"root {folder} cannot be written: {reason}")
        assert str(error.value).endswith("; set another one")
