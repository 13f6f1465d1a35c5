"""Layouts of dataset folders: ambiguous ones are refused, folders left out are reported."""

import warnings
from pathlib import Path
from typing import Any

import pytest

from datamodules import ImageDataModule
from datamodules.inspection import inspect
from datamodules.storage.layout import split_of
from datamodules.storage.sources import Source, find_sources
from tests.datamodules.shard_files import assert_one_line, grey_image, write_shards


def write(root: Path, *names: str) -> Path:
    """Write images; a name that ends in a slash creates an empty folder."""
    for level, name in enumerate(names):
        path = root / name
        (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
        if not name.endswith("/"):
            path.write_bytes(grey_image(level % 200))
    return root


def find(root: Path, **more: Any) -> tuple[Source | None, Source | None, str]:
    """The splits and the warnings."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        train, val, _ = find_sources(root, more.get("train"), None, hint="HINT")
        for source in (train, val):
            if source is not None and source.folder is not None:
                source.index(None)  # type: ignore[arg-type]
    return train, val, " | ".join(str(warning.message) for warning in seen)


def refusal(root: Path, *phrases: str | Path, **more: Any) -> None:
    with pytest.raises(ValueError) as error:
        find(root, **more)
    assert_one_line(error, *phrases)


def names_of(source: Source | None) -> tuple[str, list[str]]:
    assert source is not None
    assert source.folder is not None
    return source.folder.name, source.classes


def test_gaps_among_the_validation_classes_are_not_reported_again(tmp_path: Path) -> None:
    first, second, said = find(write(tmp_path, "train/0/1.png", "train/1/1.png", "train/3/1.png", "val/03/1.png"))
    assert second is not None
    assert names_of(first)[1] == second.classes == ["0", "1", "2", "3"]
    assert second.index(None).labels.tolist() == [3]  # type: ignore[arg-type]
    assert said.count("no folder for") == 1
    assert "no folder for 2: 1 of 4" in said


def test_usual_split_names_are_recognized() -> None:
    for split, names in {
        "train": "train training Train TRAIN train_set trainset train-set train2017 train_256 training_images",
        "val": "val valid validation validate Val VALIDATION val_set valset val2017 dev dev-set",
        "test": "test testing Test test_set test2014",
    }.items():
        assert [split_of(name) for name in names.split()] == [split] * len(names.split())
    for name in ("trains", "trainer", "valley", "value", "device", "testament", "images", "cat", "2017", ""):
        assert split_of(name) is None


@pytest.mark.parametrize(
    ("train", "val"), [("training", "validation"), ("Train", "Val"), ("train_set", "valid"), ("TRAIN2017", "dev")]
)
def test_splits_with_other_names_are_not_classes(tmp_path: Path, train: str, val: str) -> None:
    write(tmp_path, *(f"{split}/{name}/{i}.png" for split in (train, val) for name in ("ant", "cat") for i in range(2)))
    first, second, said = find(tmp_path)
    assert (names_of(first), names_of(second), said) == ((train, ["ant", "cat"]), (val, ["ant", "cat"]), "")


def test_test_split_is_left_out_and_reported(tmp_path: Path) -> None:
    write(tmp_path / "a", "Train/ant/1.png", "Test/ant/1.png")
    first, second, said = find(tmp_path / "a")
    assert names_of(first) == ("Train", ["ant"])
    assert second is None, "some of the training images are kept for validation"
    assert "the test split" in said
    assert "Test" in said
    write(tmp_path / "b", "train/ant/1.png", "val/ant/1.png", "test/1.png")  # without classes, as usual
    first, second, said = find(tmp_path / "b")
    assert (names_of(first)[0], names_of(second)[0]) == ("train", "val")
    assert "the test split" in said
    refusal(write(tmp_path / "c", "test/ant/1.png"), "only a test split", "as train or val")


def test_shards_in_folders_or_with_names_of_splits_are_splits(tmp_path: Path) -> None:
    example = [("0", {"png": grey_image(0)})]
    for split in ("Training", "validation"):
        write_shards(tmp_path / "folders" / split, example)
    (tmp_path / "names").mkdir()
    for place, split in enumerate(("imagenet-train", "imagenet-val", "imagenet-test")):
        for number in range(2):
            (path,) = write_shards(tmp_path / f"{place}{number}", example)
            path.rename(tmp_path / "names" / f"{split}-{number:06d}.tar")
    for root, counts in ((tmp_path / "folders", [1, 1]), (tmp_path / "names", [2, 2])):
        first, second, said = find(root)
        assert [len(source.shards) for source in (first, second) if source is not None] == counts
        assert ("test" in said) == (root.name == "names")
    (tmp_path / "names/more.tar").write_bytes((tmp_path / "names/imagenet-val-000000.tar").read_bytes())
    first, second, _ = find(tmp_path / "names")
    assert second is None, "names of which not all have a split say nothing"


def test_ambiguous_layouts_are_refused_with_a_remedy(tmp_path: Path) -> None:
    two = write(tmp_path / "two", "train/ant/1.png", "val/ant/1.png", "valid/ant/1.png")
    refusal(two, two, "val and valid", "both look like the val split", "with train and val")
    mixed = write(tmp_path / "mixed", "bus/1.png", "car/1.png", "train/steam/1.png", "train/tram/1.png")
    refusal(mixed, mixed, "train, which looks like a split", "bus, car", "as train if all are classes")
    source = find(mixed, train=str(mixed))[0]
    assert source is not None
    assert source.classes == ["bus", "car", "train"]
    flat = write(tmp_path / "flat", "train/1.png", "val/1.png")
    refusal(flat, "not in class folders", flat / "train/all")
    half = write(tmp_path / "half", "train/ant/1.png", "val/1.png")
    refusal(half, "val, which looks like a split", "not in class folders")
    empty = write(tmp_path / "empty", "train/ant/1.png", "val/ant/")
    refusal(empty, empty / "val", "holds no images", "remove or fill it")
    given = write(tmp_path / "given", "training/ant/1.png", "validation/ant/1.png")
    refusal(given, "look like splits", f"give {given} as root", train=str(given))
    within = write(tmp_path / "within", "ant/train/1.png", "ant/val/1.png", "cat/train/1.png", "cat/val/1.png")
    refusal(within, within / "ant", "look like splits of a class", within / "train/ant")
    deeper = write(tmp_path / "deeper", "data/train/ant/1.png", "data/val/ant/1.png")
    refusal(deeper, f"give {deeper / 'data'} as root")
    images = write(tmp_path / "images", "1.png", "2.png")
    refusal(images, "holds images (1.png) but no class folders", images / "all")
    (tmp_path / "file").write_text("")
    refusal(tmp_path / "file", "is a file, not a folder", "HINT")


def test_single_class_with_subfolders_is_warned_about(tmp_path: Path) -> None:
    first, _, said = find(write(tmp_path, "dataset/cat/1.png", "dataset/dog/1.png"))
    assert names_of(first)[1] == ["dataset"]
    assert f"the folders in it are the classes (cat, dog), give {tmp_path / 'dataset'}" in said


def test_class_named_train_is_warned_about(tmp_path: Path) -> None:
    first, _, said = find(write(tmp_path, "bus/1.png", "car/1.png", "train/1.png"))
    assert names_of(first)[1] == ["bus", "car", "train"]
    assert "train in" in said
    assert "is read as a class" in said


def test_folders_that_are_not_classes_are_left_out_and_reported(tmp_path: Path) -> None:
    root = write(
        tmp_path, "ant/1.png", "ant/@eaDir/1.png", "ant/.thumbs/1.png", "cat/more/1.png", "__MACOSX/ant/._1.png",
        "__MACOSX/1.png", "@eaDir/1.png", "lost+found/", "$RECYCLE.BIN/1.png", ".ipynb_checkpoints/1.png",
        "new folder/", "notes/", "stray.png",
    )  # fmt: skip
    (root / "notes/read.txt").write_text("text")
    for name in ("Thumbs.db", ".DS_Store", "._1.png"):
        (root / "ant" / name).write_bytes(b"")
    first, _, said = find(root)
    assert names_of(first)[1] == ["ant", "cat"]
    assert first is not None
    assert list(first.index(None).keys) == ["ant/1", "cat/more/1"]  # type: ignore[arg-type]
    for phrase in ("$RECYCLE.BIN (a system folder)", ".ipynb_checkpoints (hidden)", "@eaDir (a system folder)",
                   "__MACOSX (a system folder)", "ant/@eaDir (a system folder)", "lost+found (a system folder)",
                   "new folder (no images)", "notes (no images)",
                   "outside of class folders are left out: stray.png"):  # fmt: skip
        assert phrase in said


def test_link_cycles_and_duplicate_links_are_left_out(tmp_path: Path) -> None:
    root = write(tmp_path / "set", *(f"{name}/{i}.png" for name in ("ant", "cat") for i in range(3)))
    write(tmp_path / "elsewhere", "1.png", "more/2.png")
    for link, target in (("ant/up", ".."), ("ant/root", "../.."), ("ant/itself", "."), ("cat/other", "../ant"),
                         ("dog", "cat"), ("fox", "../elsewhere"), ("gnu", "../elsewhere")):  # fmt: skip
        (root / link).symlink_to(target, target_is_directory=True)
    (tmp_path / "elsewhere/back").symlink_to(root, target_is_directory=True)
    (tmp_path / "elsewhere/self").symlink_to("more/..", target_is_directory=True)
    (root / "cat/endless").symlink_to("endless")
    (root / "cat/endless.png").symlink_to("endless.png")
    linked = tmp_path / "linked"
    linked.symlink_to(root, target_is_directory=True)
    for place in (root, linked):
        first, _, said = find(place)
        assert names_of(first)[1] == ["ant", "cat", "fox"]
        assert first is not None
        assert len(first.index(None)) == 9  # type: ignore[arg-type]  # endless.png is bad when it is read
        for phrase in ("ant/up (a link to a folder above", "ant/root (a link to a folder above", "cat/other (a link to",
                       "dog (a link to cat", "gnu (the same folder as fox)", "fox/back (a link to a folder above",
                       "fox/self (a link to a folder that was read before)"):  # fmt: skip
            assert phrase in said


class Trainer:
    """The part of a trainer that a DataModule uses."""

    global_rank, world_size = 0, 1

    def __init__(self, folder: Path) -> None:
        self.default_root_dir = str(folder)


def test_folders_of_runs_never_become_training_images(tmp_path: Path) -> None:
    root = write(tmp_path, *(f"ant/{i}.png" for i in range(9)), "ant/runs/b/grid.png", "runs/a/grids/1.png",
                 "mine/grids/1.png", "lightning_logs/1.png")  # fmt: skip
    (root / "runs/a/checkpoints").mkdir()
    (root / "runs/a/checkpoints/last.ckpt").write_bytes(b"")
    (root / "ant/runs/b/fit.yaml").write_text("")
    data = ImageDataModule(root, image_size=4, num_workers=0)
    data.trainer = Trainer(root / "mine")  # type: ignore[assignment]
    with pytest.warns(UserWarning, match=r"mine .the folder of this run.*runs/a .the folder of a run"):
        data.setup("fit")
    assert data.class_names == ["ant"]
    assert sum(len(data.datasets[split]) for split in ("train", "val")) == 9  # type: ignore[arg-type]
    data = ImageDataModule(root, image_size=4, num_workers=0)
    data.trainer = Trainer(root)  # type: ignore[assignment]
    with pytest.raises(ValueError) as error:
        data.setup("fit")
    assert_one_line(error, "trainer.default_root_dir", root, "choose another folder")


def test_contact_sheet_among_the_images_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "ant/1.png", "cat/1.png")
    with pytest.raises(ValueError) as error:
        inspect(str(tmp_path), tmp_path / "ant/sheet.png", num_workers=0)
    assert_one_line(error, "--sheet", tmp_path / "ant/sheet.png", "elsewhere")
