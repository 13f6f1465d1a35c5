"""Atomic files and folders: complete or absent."""

import errno
import os
import resource
import signal
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from llamagen import files, full_disk
from llamagen.files import PendingFile, atomic_file, atomic_folder, remove, remove_leftovers, temporary_name
from llamagen.full_disk import DiskFullError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def left_by(process: int, path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A temporary name of another process."""
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: process)
        return temporary_name(path)


@pytest.fixture
def dead() -> int:
    """The id of a process that has ended."""
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return pid


@pytest.fixture
def small_files() -> Iterator[int]:
    """Limits files of this process to 100,000 bytes, which acts like a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    yield 100_000
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, before)


def test_a_file_gets_its_name_after_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "new/file.txt"
    with atomic_file(path) as temporary:
        temporary.write_text("text")
        assert not path.exists()
        assert temporary.parent == path.parent
        assert temporary.name.startswith(".")
        assert temporary.suffix == ".tmp"
    assert path.read_text() == "text"
    assert names(path.parent) == ["file.txt"]


def test_the_file_is_synced_before_and_the_folder_after_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, events = tmp_path / "file.txt", list[tuple[str, bool]]()
    sync = os.fsync

    def note(descriptor: int) -> None:
        sync(descriptor)
        kind = "folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file"
        events.append((kind, path.exists()))

    monkeypatch.setattr(os, "fsync", note)
    with atomic_file(path) as temporary:
        temporary.write_text("text")
    assert events == [("file", False), ("folder", True)]


def test_an_error_keeps_the_old_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")

    def fail() -> None:
        with atomic_file(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        fail()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file.txt"]


@pytest.mark.parametrize("stop", ["written", "synced"])
def test_a_kill_before_the_rename_keeps_the_old_file(tmp_path: Path, stop: str) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")
    pid = os.fork()
    if pid == 0:
        try:
            if stop == "synced":
                Path.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
            with atomic_file(path) as temporary:
                temporary.write_text("half")
                if stop == "written":
                    os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    _, status = os.waitpid(pid, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert path.read_text() == "old"
    assert len(names(tmp_path)) == 2
    with atomic_file(path) as temporary:  # the next writer removes leftovers of the dead one
        temporary.write_text("new")
    assert path.read_text() == "new"
    assert names(tmp_path) == ["file.txt"]


def test_temporary_files_of_live_processes_and_other_machines_are_kept(
    tmp_path: Path, dead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "last.ckpt"
    gone, alive = left_by(dead, path, monkeypatch), left_by(os.getppid(), path, monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(files, "_machine", lambda: "0" * 8)
        other, idle = temporary_name(path), temporary_name(path)
    for file in (gone, alive, other, idle):
        file.write_text("half")
    folder = left_by(dead, path, monkeypatch)
    (folder / "shard").mkdir(parents=True)
    os.utime(idle, (1, 1))
    (tmp_path / ".mine.tmp").touch()
    remove_leftovers(tmp_path)
    assert set(names(tmp_path)) == {alive.name, other.name, ".mine.tmp"}
    gone.write_text("half")
    remove_leftovers(tmp_path)  # only once per process, not for each of thousands of images
    assert gone.exists()
    remove_leftovers(tmp_path, owned=True)
    assert set(names(tmp_path)) == {alive.name, other.name}


def test_a_zombie_counts_as_dead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # as in containers whose init process reaps no zombies
    left_by(pid, tmp_path / "file", monkeypatch).touch()
    remove_leftovers(tmp_path)
    os.waitpid(pid, 0)
    assert names(tmp_path) == []


def test_two_writers_of_one_file_do_not_disturb_each_other(tmp_path: Path) -> None:
    path, start = tmp_path / "file.bin", threading.Barrier(4)

    def write(number: int) -> None:
        start.wait()
        for _ in range(10):
            with atomic_file(path) as temporary:
                temporary.write_bytes(bytes([number]) * 50_000)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    start.wait()
    seen = set()
    while any(thread.is_alive() for thread in threads):
        if path.exists():
            content = path.read_bytes()
            assert len(content) == 50_000
            seen.add(len(set(content)))
    assert seen <= {1}
    assert len(set(path.read_bytes())) == 1
    assert names(tmp_path) == ["file.bin"]


def test_a_file_has_the_usual_permissions(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with atomic_file(tmp_path / "a.safetensors") as temporary:
            save_file({"a": torch.ones(2)}, temporary)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.safetensors").stat().st_mode) == 0o640


def test_writes_files_with_long_names_and_devices(tmp_path: Path) -> None:
    path = tmp_path / ("ü" * 125 + ".txt")
    with atomic_file(path) as temporary:
        temporary.write_text("text")
    assert path.read_text() == "text"
    with atomic_file(Path(os.devnull)) as temporary:
        temporary.write_text("text")
    assert not Path(os.devnull).is_file()


def test_a_file_replaces_a_folder_only_if_allowed(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    path.mkdir()
    (path / "inside").touch()
    with pytest.raises(IsADirectoryError, match="is a folder; choose another name"), atomic_file(path):
        pass
    with atomic_file(path, replaces_folder=True) as temporary:
        temporary.write_text("one file")
    assert path.read_text() == "one file"
    assert names(tmp_path) == ["last.ckpt"]


@pytest.mark.parametrize("old", ["nothing", "a folder", "a file", "a link"])
def test_a_folder_gets_its_name_after_it_is_complete(tmp_path: Path, old: str) -> None:
    path = tmp_path / "report"
    if old == "a folder":
        path.mkdir()
        (path / "old").touch()
    elif old == "a file":
        path.touch()
    elif old == "a link":
        path.symlink_to(tmp_path / "nowhere")
    with atomic_folder(path) as temporary:
        (temporary / "inner").mkdir()
        (temporary / "inner/new").write_text("text")
        assert not (path / "inner").exists()
    assert names(path) == ["inner"]
    assert names(tmp_path) == ["report"]


def test_a_failed_rename_of_a_folder_keeps_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report"
    path.mkdir()
    (path / "old").touch()
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if target == path and self.suffix == ".tmp" and "replaced" not in self.name:
            raise PermissionError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(PermissionError), atomic_folder(path) as temporary:
        (temporary / "new").touch()
    assert names(path) == ["old"]
    assert names(tmp_path) == ["report"]


def test_a_folder_is_renamed_before_it_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "step.ckpt"
    path.mkdir()
    (path / "meta.pt").touch()

    def die(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("shutil.rmtree", die)
    with pytest.raises(KeyboardInterrupt):
        remove(path)
    assert not path.exists()


def write_text(path: Path) -> None:
    path.write_text("a" * 300_000)


def write_torch(path: Path) -> None:
    with path.open("wb") as file:
        torch.save({"a": torch.ones(100_000)}, file)


def write_torch_by_name(path: Path) -> None:
    torch.save({"a": torch.ones(100_000)}, path)


def write_safetensors(path: Path) -> None:
    save_file({"a": torch.ones(100_000)}, path)


def write_npz(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, a=np.ones(100_000))


def write_png(path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, format="png")


@pytest.mark.parametrize("write", [write_text, write_torch, write_safetensors, write_npz, write_png])
def test_a_full_disk_is_a_one_line_error_with_path_and_bytes(
    write: Callable[[Path], None], tmp_path: Path, small_files: int
) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(DiskFullError) as error, atomic_file(path, 123_456) as temporary:
        write(temporary)
    assert isinstance(error.value, OSError)
    assert error.value.errno == errno.EFBIG
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(f"{path} was not written: ")
    assert "it needs 123,456 bytes, and" in str(error.value)
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_or_quota_is_detected_at_sync(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sync = os.fsync

    def fail(descriptor: int) -> None:  # network file systems report it only here
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        reason = r"needs more than 4 bytes, and [\d,]+ bytes are free"
        with pytest.raises(DiskFullError, match=reason) as error, atomic_file(tmp_path / "file") as temporary:
            temporary.write_text("text")
        with pytest.raises(DiskFullError, match=r"needs more than 4 bytes"), atomic_folder(tmp_path / "f") as temporary:
            (temporary / "a").write_text("text")
    assert os.strerror(number) in str(error.value)
    assert names(tmp_path) == []
    assert os.fsync is sync


def test_an_error_of_the_pytorch_writer_means_a_full_disk_if_nothing_is_free(
    tmp_path: Path, small_files: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RuntimeError), atomic_file(tmp_path / "file") as temporary:
        write_torch_by_name(temporary)
    monkeypatch.setattr(full_disk, "_free", lambda _: 1000)
    with pytest.raises(DiskFullError, match="and 1,000 bytes are free"), atomic_file(tmp_path / "file") as temporary:
        write_torch_by_name(temporary)
    assert names(tmp_path) == []


def test_other_errors_are_unchanged(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), atomic_file(tmp_path / "file"):
        raise PermissionError(errno.EACCES, "no")
    pending = PendingFile(tmp_path / "file")
    pending.discard()
    assert names(tmp_path) == []
