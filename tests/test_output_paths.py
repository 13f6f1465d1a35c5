"""Whether something can be written is found out before, and leaves nothing."""

from pathlib import Path

import pytest

from llamagen.output_paths import check_output, check_output_file


def test_what_can_be_written_is_let_pass_and_nothing_is_made(tmp_path: Path) -> None:
    (tmp_path / "there.npz").write_text("kept")
    for name in ("new.npz", "a/b/new.npz", "there.npz"):
        check_output(tmp_path / name)
        check_output_file(tmp_path / name, (".npz",))
    assert [path.name for path in tmp_path.iterdir()] == ["there.npz"]
    assert (tmp_path / "there.npz").read_text() == "kept"


def test_what_cannot_be_written_is_refused_with_its_option(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder.npz").mkdir()
    (tmp_path / "nowhere").symlink_to(tmp_path / "missing")
    for path, reason in (
        (tmp_path / "file/a.npz", f"{tmp_path / 'file'} is no folder"),
        (tmp_path / "file/b/a.npz", f"{tmp_path / 'file'} is no folder"),
        (tmp_path / "nowhere/a.npz", f"{tmp_path / 'nowhere'} is no folder"),
        (Path("/proc/nowhere/a.npz"), "no folder there allows it"),
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
