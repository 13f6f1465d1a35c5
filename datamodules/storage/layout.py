"""What the folders of a dataset are: splits, classes, or neither."""

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePath

from datamodules.storage.folder_walk import FolderWalk, is_image
from datamodules.storage.rank_zero_warning import warn_on_rank_zero

SPLITS = ("train", "val")
TEST = "test"

SPLIT_NAMES = {
    "train": re.compile(r"(train|training|trn)(set|split|data|images?|imgs?)?\d*"),
    "val": re.compile(r"(val|valid|validation|validate|dev|development|eval)(set|split|data|images?|imgs?)?\d*"),
    TEST: re.compile(r"(test|testing|tst)(set|split|data|images?|imgs?)?\d*"),
}
"""Usual names of splits, in lower case and without separators: ``Train``, ``train2017``, ``val_set``, ``dev-images``.
"""

SEPARATORS = re.compile(r"[\s_.\-]+")
MAX_LISTED = 10
PROBED = 3
"""Class folders that are looked into for splits."""

CHOOSE = "name the folders or shards of each split with train and val"


def split_of(name: str) -> str | None:
    """Which split a folder is by its name: ``train``, ``val`` or ``test``; None for other names."""
    plain = SEPARATORS.sub("", name.casefold())
    return next((split for split, pattern in SPLIT_NAMES.items() if pattern.fullmatch(plain)), None)


def split_folders(root: Path, run_folder: Path | None = None) -> dict[str, Path]:
    """The splits that the folders in a root are: those with class folders or shards in them and usual names.

    A folder of such a name that holds images itself is a class, as long as other classes are next to it: a class may be
    called train, too. Test splits are left out, with a warning.

    Args:
        root: folder of a dataset.
        run_folder: folder that the current run writes to, if there is one.

    Returns:
        Folder of ``train`` and ``val``, as far as they are there; empty where the folders are no splits.

    Raises:
        ValueError: if it is not clear what is what.
    """
    walk = FolderWalk(root, run_folder)
    kinds: dict[str, tuple[bool, bool]] = {}  # of each folder: has shards or folders of images, has images itself
    for name in (names := walk.folders()):
        if split_of(name) is not None:
            kinds[name] = _holds_examples(root / name), _holds_images_itself(root / name)
    splits = {name for name, (structured, _) in kinds.items() if structured}
    others = [name for name in names if name not in kinds and (not kinds or walk.holds_images(name))]
    if others:
        pure = {name for name in splits if not kinds[name][1]}
        if not {"train", "val"} <= {split_of(name) for name in pure}:
            if pure:
                raise ValueError(
                    f"{root} holds {_some(sorted(pure))}, which looks like a split, next to other folders of images "
                    f"({_some(others)}); {CHOOSE}, or give {root} as train if all are classes"
                )
            if classes := sorted(name for name, kind in kinds.items() if any(kind)):
                warn_on_rank_zero(
                    f"{_some(classes)} in {root} may be meant as a split, but is read as a class, for it holds images "
                    f"itself and lies next to {_some(others)}; {CHOOSE} if it is none"
                )
            return {}
        warn_on_rank_zero(f"of {root}, which holds splits, other folders are left out: {_some(others)}")
        splits = pure
    flat = sorted(name for name, kind in kinds.items() if kind == (False, True))
    if not splits and len(flat) < 2:
        return {}
    if empty := sorted(name for name, kind in kinds.items() if splits and not any(kind) and split_of(name) != TEST):
        raise ValueError(f"{root / empty[0]} looks like a split, but holds no images; remove or fill it, or {CHOOSE}")
    if unclassed := [name for name in flat if split_of(name) != TEST or not splits]:
        raise ValueError(
            f"{root} holds {_some(unclassed)}, which looks like a split, but its images are not in class folders; move "
            f"them into one, for example {root / unclassed[0] / 'all'}, or {CHOOSE}"
        )
    return _one_each(root, {name: root / name for name in sorted(splits | set(flat))})


def split_shards(shards: Sequence[str]) -> dict[str, list[str]]:
    """Shards by split, where all of them have a split in their names, as in ``set-train-000000.tar``, and not the same.

    Returns:
        Shards of ``train`` and ``val``, as far as they are there; empty where the names say nothing.
    """
    found: dict[str, list[str]] = defaultdict(list)
    for shard in shards:
        words = {split_of(word) for word in SEPARATORS.split(PurePath(shard).stem)} - {None}
        if len(words) != 1:
            return {}
        found[str(words.pop())].append(shard)
    if len(found) < 2:
        return {}
    if tests := found.pop(TEST, []):
        warn_on_rank_zero(f"{len(tests)} shards of a test split are left out, such as {tests[0]}")
    return dict(found)


def check_classes(root: Path, names: Sequence[str], run_folder: Path | None = None) -> None:
    """See that class folders are class folders, and neither splits nor the folder that holds the classes.

    Args:
        root: folder of class folders.
        names: of the class folders.
        run_folder: folder that the current run writes to, if there is one.

    Raises:
        ValueError: if they are splits, or hold splits.
    """
    structured = [name for name in names if split_of(name) is not None and _holds_examples(root / name)]
    if len(names) > 1 and len(structured) == len(names):
        raise ValueError(
            f"the folders in {root} look like splits ({_some(structured)}), not like classes; give {root} as root, or "
            f"{CHOOSE}"
        )
    for name in names[:PROBED]:
        if _holds_images_itself(root / name):
            return
    within = {name: FolderWalk(root / name, run_folder) for name in names[:PROBED]}
    below = {name: [part for part in inner.folders() if inner.holds_images(part)] for name, inner in within.items()}
    if all(_are_splits(parts) for parts in below.values()):
        name, parts = next(iter(below.items()))
        better = f"give {root / name} as root" if len(names) == 1 else f"move them to {root / 'train' / name} and so on"
        raise ValueError(f"{root / name} holds {_some(parts)}, which look like splits of a class; {better}")
    if len(names) == 1 and len(below[names[0]]) > 1:
        warn_on_rank_zero(
            f"{root} holds one class folder only, {names[0]}; if the folders in it are the classes "
            f"({_some(below[names[0]])}), give {root / names[0]} instead"
        )


def report_left_out(root: Path, left_out: Mapping[str, str], images: Sequence[str] = ()) -> None:
    """Warn of folders and images that are no part of a dataset.

    Args:
        root: folder of the dataset.
        left_out: path of each folder, and why it was left out.
        images: names of images that lie next to the class folders.
    """
    if left_out:
        told = _some([f"{os.path.relpath(path, root)} ({reason})" for path, reason in sorted(left_out.items())])
        warn_on_rank_zero(f"folders in {root} that are left out: {told}")
    if images:
        warn_on_rank_zero(f"images in {root} that are in no class folder are left out: {_some(images)}")


def _are_splits(names: Iterable[str]) -> bool:
    kinds = [split_of(name) for name in names]
    return None not in kinds and "train" in kinds and len(set(kinds)) > 1


def _one_each(root: Path, folders: Mapping[str, Path]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for name, path in folders.items():
        split = str(split_of(name))
        if split in found and split != TEST:
            raise ValueError(f"{found[split].name} and {name} in {root} both look like the {split} split; {CHOOSE}")
        found[split] = path
    tests = [name for name in folders if split_of(name) == TEST]
    found.pop(TEST, None)
    if not found:
        raise ValueError(f"{root} holds a test split only, {tests[0]}; give {root / tests[0]} as train or val")
    if tests:
        warn_on_rank_zero(f"the test split of {root} is left out: {_some(tests)}; {CHOOSE} to use it")
    return found


def _holds_examples(folder: Path) -> bool:
    """Whether a folder holds shards or folders of images."""
    if any(path.suffix == ".tar" for path in folder.iterdir() if not path.name.startswith(".")):
        return True
    inner = FolderWalk(folder)
    return any(inner.holds_images(name) for name in inner.folders())


def _holds_images_itself(folder: Path) -> bool:
    return any(is_image(name) and (folder / name).is_file() for name in os.listdir(folder))


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return f"{', '.join(names[:MAX_LISTED])}{more}"
