"""Indexes of image folders: class folders as in ImageFolder, ``root/dog/1.jpg`` and ``root/cat/a/2.png``, or a flat
folder, ``root/1.jpg``. A text file with the same name, ``root/dog/1.txt``, is the caption of the image, if at least
half of the images have one.
"""

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from datamodules.storage.bad_examples import Skipped
from datamodules.storage.class_order import class_numbers
from datamodules.storage.folder_walk import FolderWalk, is_image
from datamodules.storage.index import IMAGES, NO_LABEL, OTHER_IMAGES, TEXT, WHOLE_FILE, ExampleIndex, Strings
from datamodules.storage.layout import warn_about_left_out
from llamagen.rank_zero import warn_on_rank_zero


def class_folders(root: Path, run_folder: Path | None = None) -> list[str]:
    """Names of the class folders, sorted: folders with images that
    :class:`~datamodules.storage.folder_walk.FolderWalk` does not leave out.

    Args:
        root: folder of the dataset.
        run_folder: folder that the current run writes to, if there is one.
    """
    walk = FolderWalk(root, run_folder)
    return [name for name in walk.folders() if walk.holds_images(name)]


def index_folder(root: Path, classes: list[str], run_folder: Path | None = None) -> ExampleIndex:
    """Index a folder of class folders, sorted by path. Warns about files and folders left out and about empty classes.

    The key of an image is its path without the suffix, with ``_`` for each dot in the file name. If two files would
    have the same key, the suffix is added.

    Args:
        root: folder of the dataset.
        classes: names of the classes, by their numbers. If they are integers, the folder ``01`` is class 1.
        run_folder: folder that the current run writes to, if there is one.

    Raises:
        ValueError: if a class folder is not among ``classes``, or a folder cannot be read.
    """
    walk = FolderWalk(root, run_folder)
    files = {name: list(walk.files(name)) for name in walk.folders()}
    found = [name for name, parts in files.items() if any(is_image(file) for _, names in parts for file in names)]
    empty = {os.path.join(root, name): "no images" for name in files if name not in set(found)}
    numbers = class_numbers(found, classes, str(root))
    index = _index(root, ((*part, numbers[name]) for name in found for part in files[name]))
    warn_about_left_out(root, {**walk.left_out, **empty}, flat_images(root) if found else [])
    counts = np.bincount(index.labels, minlength=1)
    if unread := [name for name in found if numbers[name] >= len(counts) or not counts[numbers[name]]]:
        warn_on_rank_zero(f"class folders in {root} without a readable image: {', '.join(unread[:10])}")
    return index


def index_flat(root: Path) -> ExampleIndex:
    """Index the images directly in a folder, sorted by name, without classes; keys as in :func:`index_folder`."""
    return _index(root, [(str(root), flat_images(root), NO_LABEL)])


def flat_images(root: Path) -> list[str]:
    """Names of the images directly in a folder, sorted, including unsupported formats."""
    return sorted(name for name in os.listdir(root) if is_image(name) and os.path.isfile(os.path.join(root, name)))


def _index(root: Path, folders: Iterable[tuple[str, list[str], int]]) -> ExampleIndex:
    """Index the images in folders, given with the names of their files and their label."""
    files: list[str] = []
    keys: list[str] = []
    labels: list[int] = []
    suffixes: list[str] = []
    captioned: list[bool] = []
    bad: list[Skipped] = []
    taken: set[str] = set()
    for folder, names, label in folders:
        relative = os.path.relpath(folder, root)
        prefix = "" if relative == os.curdir else f"{relative}/".replace(os.sep, "/")
        texts = {name for name in names if name.endswith(f".{TEXT}")}
        for file in names:
            stem, _, suffix = file.rpartition(".")
            path = os.path.join(folder, file)
            if stem and not file.startswith(".") and suffix.lower() in OTHER_IMAGES:
                message = f"{path} is not in a supported format ({', '.join(IMAGES)}); convert or remove it"
                bad.append(Skipped(-1, os.path.relpath(path, root), "no image", message))
            if not stem or file.startswith(".") or suffix.lower() not in IMAGES:
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
    for suffix in IMAGES:
        if (present := kinds == suffix).any():
            members[suffix] = np.where(present[:, None], [0, WHOLE_FILE], -1).astype(np.int64)
    if any(captioned) and 2 * sum(captioned) >= len(captioned):  # otherwise the text files are notes
        members[TEXT] = np.where(np.array(captioned)[:, None], [0, WHOLE_FILE], -1).astype(np.int64)
    count = len(files)
    return ExampleIndex(
        Strings.from_strings(files),
        np.arange(count),
        Strings.from_strings(keys),
        members,
        np.array(labels, np.int64),
        bad,
    )
