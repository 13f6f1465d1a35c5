"""Traversal of image folders, without folders that are not part of a dataset and without link cycles."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from datamodules.storage.index import IMAGES, OTHER_IMAGES

SYSTEM_FOLDERS = frozenset(
    {
        "__macosx",
        "__pycache__",
        "@eadir",
        "@recently-snapshot",
        "@recycle",
        "@tmp",
        "#recycle",
        "#snapshot",
        "$recycle.bin",
        "lost+found",
        "recycler",
        "system volume information",
    }
)
"""Folders of operating systems, archivers and file servers, in lower case. Some hold thumbnails of the images."""

RUN_FILES = ("fit.yaml", "validate.yaml", "test.yaml", "predict.yaml", ".plan.json")
"""Configuration or plan of a run. A folder with such a file holds grids and samples, not training images."""

RUN_FOLDERS = frozenset({"lightning_logs", "wandb"})


def is_image(name: str) -> bool:
    """Whether a file has the name of an image, including unsupported formats."""
    stem, _, suffix = name.rpartition(".")
    return bool(stem) and not name.startswith(".") and suffix.lower() in (*IMAGES, *OTHER_IMAGES)


def is_run_folder(path: str) -> bool:
    """Whether a folder belongs to a training or sampling run."""
    if os.path.basename(path) in RUN_FOLDERS or any(os.path.isfile(os.path.join(path, name)) for name in RUN_FILES):
        return True
    checkpoints = os.path.join(path, "checkpoints")
    return os.path.isdir(checkpoints) and any(name.endswith(".ckpt") for name in os.listdir(checkpoints))


class FolderWalk:
    """Traversal of the folders and files of a dataset.

    It leaves out hidden folders, :data:`SYSTEM_FOLDERS`, folders of runs, and links to a parent folder or to a folder
    that is read anyway. Links to folders outside the dataset are followed, each folder once per class.

    Args:
        root: folder of the dataset.
        run_folder: folder that the current run writes to, if there is one.

    Attributes:
        left_out: reason for each folder that was left out, by path; hidden folders only directly in ``root``.
    """

    def __init__(self, root: Path | str, run_folder: Path | str | None = None) -> None:
        self.root = os.fspath(root)
        self.left_out: dict[str, str] = {}
        self._real_root = os.path.realpath(self.root)
        self._run_folder = None if run_folder is None else os.path.realpath(run_folder)

    def folders(self) -> list[str]:
        """Names of the folders in the root, sorted. A folder that is also reachable by links is listed only once."""
        names_by_identity: dict[tuple[int, int], str] = {}
        found = []
        entries = self._entries(self.root)[0]
        for entry in sorted(entries, key=lambda entry: (entry.is_symlink(), entry.name)):
            if self._is_left_out(entry):
                continue
            identity = _identity(entry.path)
            if identity in names_by_identity:
                self.left_out[entry.path] = f"the same folder as {names_by_identity[identity]}"
                continue
            names_by_identity[identity] = entry.name
            found.append(entry.name)
        return sorted(found)

    def files(self, name: str = "") -> Iterator[tuple[str, list[str]]]:
        """Iterate over a folder in the root and its subfolders, each with the sorted names of its files.

        Raises:
            ValueError: if a folder cannot be read.
        """
        folder = os.path.join(self.root, name)
        return self._files(folder, {_identity(self.root), _identity(folder)})

    def _files(self, folder: str, seen: set[tuple[int, int]]) -> Iterator[tuple[str, list[str]]]:
        folders, names = self._entries(folder)
        yield folder, names
        for entry in folders:
            if self._is_left_out(entry):
                continue
            identity = _identity(entry.path)
            if identity in seen:
                self.left_out[entry.path] = "a link to a folder that was read before"
                continue
            seen.add(identity)
            yield from self._files(entry.path, seen)

    def holds_images(self, name: str = "") -> bool:
        """Whether there is an image in a folder or its subfolders; stops at the first one."""
        folder = os.path.join(self.root, name)
        with _readable(folder), os.scandir(folder) as entries:  # usually returns here without listing the whole folder
            if any(is_image(entry.name) and not _is_folder(entry) for entry in entries):
                return True
        return any(is_image(file) for _, names in self.files(name) for file in names)

    @staticmethod
    def _entries(folder: str) -> tuple[list["os.DirEntry[str]"], list[str]]:
        """Subfolders and names of files, sorted."""
        folders: list[os.DirEntry[str]] = []
        names = []
        with _readable(folder), os.scandir(folder) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                if _is_folder(entry):
                    folders.append(entry)
                else:
                    names.append(entry.name)
        return folders, names

    def _is_left_out(self, entry: "os.DirEntry[str]") -> bool:
        if entry.name.startswith("."):
            if os.path.dirname(entry.path) == self.root.rstrip(os.sep):
                self.left_out[entry.path] = "hidden"
            return True
        if reason := self._reason(entry):
            self.left_out[entry.path] = reason
        return bool(reason)

    def _reason(self, entry: "os.DirEntry[str]") -> str:
        if entry.name.lower() in SYSTEM_FOLDERS:
            return "a system folder"
        real = os.path.realpath(entry.path) if entry.is_symlink() or self._run_folder is not None else ""
        if entry.is_symlink():
            if _is_within(self._real_root, real):
                return "a link to a folder above it"
            if _is_within(real, self._real_root) and self._is_read(real):
                return f"a link to {os.path.relpath(real, self._real_root)}, which is read itself"
        if real and real == self._run_folder:
            return "the folder of this run"
        return "the folder of a run" if is_run_folder(entry.path) else ""

    def _is_read(self, real: str) -> bool:
        """Whether a folder within the root is read and not left out."""
        parts = os.path.relpath(real, self._real_root).split(os.sep)
        return not any(part.startswith(".") or part.lower() in SYSTEM_FOLDERS for part in parts)


@contextmanager
def _readable(folder: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"folder {folder} cannot be read ({error.strerror}); make it readable, or move it out of the dataset"
        ) from error


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _identity(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _is_within(path: str, folder: str) -> bool:
    return os.path.commonpath([path, folder]) == folder
