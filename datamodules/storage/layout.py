"""Layout of a dataset of folders: which folders are splits, which are classes."""

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePath

from datamodules.storage.folder_walk import FolderWalk, is_image
from llamagen.rank_zero import warn_on_rank_zero

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
"""Number of class folders that are searched for splits."""

CHOOSE_HINT = "name the folders or shards of each split with train and val"


def split_of(name: str) -> str | None:
    """Split that a folder name means: ``train``, ``val`` or ``test``; None for other names."""
    plain = SEPARATORS.sub("", name.casefold())
    return next((split for split, pattern in SPLIT_NAMES.items() if pattern.fullmatch(plain)), None)


def split_folders(root: Path, run_folder: Path | None = None) -> dict[str, Path]:
    """Find the splits among the folders of a dataset: folders with the name of a split that hold class folders or
    shards.

    A folder with such a name that holds images directly, next to other classes, is a class, because a class may be
    called train. Test splits are left out, with a warning.

    Args:
        root: folder of the dataset.
        run_folder: folder that the current run writes to, if there is one.

    Returns:
        Folders of ``train`` and ``val``, if they exist; empty if the folders are not splits.

    Raises:
        ValueError: if the layout is ambiguous.
    """
    walk = FolderWalk(root, run_folder)
    kinds: dict[str, tuple[bool, bool]] = {}  # by folder: has shards or folders of images, has images directly
    for name in (names := walk.folders()):
        if split_of(name) is not None:
            kinds[name] = _holds_examples(root / name), _holds_images_directly(root / name)
    splits = {name for name, (structured, _) in kinds.items() if structured}
    others = [name for name in names if name not in kinds and (not kinds or walk.holds_images(name))]
    if others:
        pure = {name for name in splits if not kinds[name][1]}
        if not {"train", "val"} <= {split_of(name) for name in pure}:
            if pure:
                raise ValueError(
                    f"{root} holds {_listed(sorted(pure))}, which looks like a split, next to other folders of images "
                    f"({_listed(others)}); {CHOOSE_HINT}, or give {root} as train if all are classes"
                )
            if classes := sorted(name for name, kind in kinds.items() if any(kind)):
                warn_on_rank_zero(
                    f"{_listed(classes)} in {root} has the name of a split, but is read as a class, because it holds "
                    f"images directly and is next to {_listed(others)}; if it is a split, {CHOOSE_HINT}"
                )
            return {}
        warn_on_rank_zero(f"{root} holds splits; other folders in it are left out: {_listed(others)}")
        splits = pure
    flat = sorted(name for name, kind in kinds.items() if kind == (False, True))
    if not splits and len(flat) < 2:
        return {}
    if empty := sorted(name for name, kind in kinds.items() if splits and not any(kind) and split_of(name) != TEST):
        raise ValueError(
            f"{root / empty[0]} looks like a split, but holds no images; remove or fill it, or {CHOOSE_HINT}"
        )
    if unclassed := [name for name in flat if split_of(name) != TEST or not splits]:
        raise ValueError(
            f"{root} holds {_listed(unclassed)}, which looks like a split, but its images are not in class folders; "
            f"move them into one, for example {root / unclassed[0] / 'all'}, or {CHOOSE_HINT}"
        )
    return _one_per_split(root, {name: root / name for name in sorted(splits | set(flat))})


def split_shards(shards: Sequence[str]) -> dict[str, list[str]]:
    """Group shards by the split in their names, as in ``imagenet-train-000000.tar``.

    Returns:
        Shards of ``train`` and ``val``, if they exist; empty unless each name has one split and there are several
        splits.
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
        warn_on_rank_zero(f"{len(tests)} shards of a test split are left out, for example {tests[0]}")
    return dict(found)


def check_classes(root: Path, names: Sequence[str], run_folder: Path | None = None) -> None:
    """Check that class folders are neither splits nor the parent folder of the classes.

    Args:
        root: folder of class folders.
        names: names of the class folders.
        run_folder: folder that the current run writes to, if there is one.

    Raises:
        ValueError: if they are splits, or contain splits.
    """
    structured = [name for name in names if split_of(name) is not None and _holds_examples(root / name)]
    if len(names) > 1 and len(structured) == len(names):
        raise ValueError(
            f"the folders in {root} look like splits ({_listed(structured)}), not classes; give {root} as root, or "
            f"{CHOOSE_HINT}"
        )
    for name in names[:PROBED]:
        if _holds_images_directly(root / name):
            return
    walks = {name: FolderWalk(root / name, run_folder) for name in names[:PROBED]}
    subfolders = {name: [part for part in walk.folders() if walk.holds_images(part)] for name, walk in walks.items()}
    if all(_are_splits(parts) for parts in subfolders.values()):
        name, parts = next(iter(subfolders.items()))
        remedy = f"give {root / name} as root" if len(names) == 1 else f"move them to {root / 'train' / name} and so on"
        raise ValueError(f"{root / name} holds {_listed(parts)}, which look like splits of a class; {remedy}")
    if len(names) == 1 and len(subfolders[names[0]]) > 1:
        warn_on_rank_zero(
            f"{root} holds only one class folder, {names[0]}; if the folders in it are the classes "
            f"({_listed(subfolders[names[0]])}), give {root / names[0]} instead"
        )


def warn_about_left_out(root: Path, left_out: Mapping[str, str], images: Sequence[str] = ()) -> None:
    """Warn about folders and images that are not read.

    Args:
        root: folder of the dataset.
        left_out: reason for each folder that was left out, by path.
        images: names of images next to the class folders.
    """
    if left_out:
        reasons = [f"{os.path.relpath(path, root)} ({reason})" for path, reason in sorted(left_out.items())]
        warn_on_rank_zero(f"folders in {root} are left out: {_listed(reasons)}")
    if images:
        warn_on_rank_zero(f"images in {root} outside of class folders are left out: {_listed(images)}")


def _are_splits(names: Iterable[str]) -> bool:
    kinds = [split_of(name) for name in names]
    return None not in kinds and "train" in kinds and len(set(kinds)) > 1


def _one_per_split(root: Path, folders: Mapping[str, Path]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for name, path in folders.items():
        split = str(split_of(name))
        if split in found and split != TEST:
            raise ValueError(
                f"{found[split].name} and {name} in {root} both look like the {split} split; {CHOOSE_HINT}"
            )
        found[split] = path
    tests = [name for name in folders if split_of(name) == TEST]
    found.pop(TEST, None)
    if not found:
        raise ValueError(f"{root} holds only a test split, {tests[0]}; give {root / tests[0]} as train or val")
    if tests:
        warn_on_rank_zero(f"the test split of {root} is left out: {_listed(tests)}; to use it, {CHOOSE_HINT}")
    return found


def _holds_examples(folder: Path) -> bool:
    """Whether a folder holds shards or folders of images."""
    if any(path.suffix == ".tar" for path in folder.iterdir() if not path.name.startswith(".")):
        return True
    walk = FolderWalk(folder)
    return any(walk.holds_images(name) for name in walk.folders())


def _holds_images_directly(folder: Path) -> bool:
    return any(is_image(name) and (folder / name).is_file() for name in os.listdir(folder))


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return f"{', '.join(names[:MAX_LISTED])}{more}"
