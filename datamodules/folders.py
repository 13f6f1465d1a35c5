"""A folder of class folders, as ImageFolder has it, read as it is: ``root/dog/1.jpg``, ``root/cat/a/2.png``; or one of
pictures alone: ``root/1.jpg``. A text file of the same name in a class folder, ``root/dog/1.txt``, is the caption of a
picture, where at least half of the pictures have one.
"""

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from datamodules.bad_samples import Skipped
from datamodules.index import NO_LABEL, OTHER_PICTURES, PICTURES, TEXT, WHOLE, SampleIndex, Strings


def class_folders(root: Path) -> list[str]:
    """The names of the classes, sorted; a class's number is its place in this list."""
    with os.scandir(root) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def index_folder(root: Path, classes: list[str]) -> SampleIndex:
    """The pictures of a folder of class folders, sorted by path.

    A key is the path without the suffix, and with ``_`` for each dot in the file's name; where two files would have the
    same one, the suffix is added to it.

    Args:
        root: the folder.
        classes: names of the classes; a folder of another name is refused.

    Raises:
        ValueError: if a class folder is not among ``classes``.
    """
    numbers = {name: number for number, name in enumerate(classes)}
    found = class_folders(root)
    for name in found:
        if name not in numbers:
            raise ValueError(
                f"{root} has the class folder {name}, which is none of the {len(classes)} classes of the training "
                "pictures; rename or remove it"
            )
    return _index(root, ((*place, numbers[name]) for name in found for place in _walk(root / name)))


def index_flat(root: Path) -> SampleIndex:
    """The pictures that lie in a folder itself, sorted by name, without classes; keys as in :func:`index_folder`."""
    return _index(root, [(str(root), flat_pictures(root), NO_LABEL)])


def flat_pictures(root: Path) -> list[str]:
    """Names of the pictures that lie in a folder itself, sorted, those that cannot be read included."""
    with os.scandir(root) as entries:
        names = [entry.name for entry in entries if not entry.name.startswith(".") and entry.is_file()]
    kinds = (*PICTURES, *OTHER_PICTURES)
    return sorted(name for name in names if name.rpartition(".")[0] and name.rpartition(".")[2].lower() in kinds)


def _walk(root: Path) -> Iterable[tuple[str, list[str]]]:
    """A folder and those within it, each with its files."""
    for folder, below, names in os.walk(root, followlinks=True):
        below[:] = sorted(entry for entry in below if not entry.startswith("."))
        yield folder, sorted(names)


def _index(root: Path, places: Iterable[tuple[str, list[str], int]]) -> SampleIndex:
    """The pictures among files, given by folder, names and label."""
    files: list[str] = []
    keys: list[str] = []
    labels: list[int] = []
    suffixes: list[str] = []
    captioned: list[bool] = []
    bad: list[Skipped] = []
    taken: set[str] = set()
    for folder, names, label in places:
        below = os.path.relpath(folder, root)
        prefix = "" if below == os.curdir else f"{below}/".replace(os.sep, "/")
        texts = {name for name in names if name.endswith(f".{TEXT}")}
        for file in names:
            stem, _, suffix = file.rpartition(".")
            path = os.path.join(folder, file)
            if stem and not file.startswith(".") and suffix.lower() in OTHER_PICTURES:
                story = f"{path} is no {', '.join(PICTURES)}; convert it, or remove it"
                bad.append(Skipped(-1, os.path.relpath(path, root), "no picture", story))
            if not stem or file.startswith(".") or suffix.lower() not in PICTURES:
                continue
            key = f"{prefix}{stem.replace('.', '_')}"
            if key in taken:
                key = f"{key}_{suffix}"
            while key in taken:
                key += "_"
            taken.add(key)
            files.append(path)
            keys.append(key)
            labels.append(label)
            suffixes.append(suffix.lower())
            captioned.append(f"{stem}.{TEXT}" in texts)
    kinds = np.array(suffixes, dtype="U4")
    members = {}
    for suffix in PICTURES:
        if (present := kinds == suffix).any():
            members[suffix] = np.where(present[:, None], [0, WHOLE], -1).astype(np.int64)
    if any(captioned) and 2 * sum(captioned) >= len(captioned):  # else they are notes
        members[TEXT] = np.where(np.array(captioned)[:, None], [0, WHOLE], -1).astype(np.int64)
    count = len(files)
    return SampleIndex(Strings.of(files), np.arange(count), Strings.of(keys), members, np.array(labels, np.int64), bad)
