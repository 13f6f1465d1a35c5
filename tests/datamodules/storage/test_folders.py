"""Folders of class folders: which files are images, and their classes and keys."""

from pathlib import Path

import pytest

from datamodules.images import ImageDataModule
from datamodules.storage.bad_examples import BadExampleError
from datamodules.storage.folders import class_folders, index_folder
from datamodules.storage.index import ExampleIndex
from tests.datamodules.shard_files import assert_one_line, grey_image


def write(root: Path, *names: str) -> None:
    """Write files that contain their own names."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode("utf-8", "surrogateescape"))


def index(root: Path) -> ExampleIndex:
    return index_folder(root, class_folders(root))


def keys(root: Path) -> list[str]:
    return list(index(root).keys)


def test_classes_are_numbered_by_their_sorted_names(tmp_path: Path) -> None:
    write(tmp_path, "dog/1.jpg", "cat/2.jpg", "ant/3.jpg", "Zebra/4.jpg", "dog/0.jpg")
    assert class_folders(tmp_path) == ["Zebra", "ant", "cat", "dog"]
    found = [(example.key, example.label, example.source) for example in index(tmp_path)]
    assert found == [
        ("Zebra/4", 0, str(tmp_path / "Zebra")),
        ("ant/3", 1, str(tmp_path / "ant")),
        ("cat/2", 2, str(tmp_path / "cat")),
        ("dog/0", 3, str(tmp_path / "dog")),
        ("dog/1", 3, str(tmp_path / "dog")),
    ]


def test_folder_without_images_is_left_out_and_reported(tmp_path: Path) -> None:
    write(tmp_path, "b/1.png", "c/README")
    (tmp_path / "a/nested").mkdir(parents=True)
    assert class_folders(tmp_path) == ["b"]
    with pytest.warns(UserWarning, match=r"left out: a .no images., c .no images."):
        assert index(tmp_path).labels.tolist() == [0]


def test_class_without_a_readable_image_keeps_its_number_and_is_reported(tmp_path: Path) -> None:
    write(tmp_path, "a/1.bmp", "b/1.png")
    with pytest.warns(UserWarning, match=r"without a readable image: a$"):
        assert index(tmp_path).labels.tolist() == [1]


def test_image_files_are_read_unchanged(tmp_path: Path) -> None:
    names = ["a/1.jpg", "a/2.JPEG", "a/3.Png", "a/4.webp"]
    write(tmp_path, *names)
    examples = list(index(tmp_path))
    assert [list(example.members) for example in examples] == [["jpg"], ["jpeg"], ["png"], ["webp"]]
    assert [example.read(*example.members).decode() for example in examples] == names


def captioned(root: Path, **texts: str) -> Path:
    """Write images 0 to 3 and captions for some of them."""
    root.mkdir(parents=True)
    for number in range(4):
        (root / f"{number}.png").write_bytes(grey_image(number))
    for name, text in texts.items():
        (root / f"{name[1:]}.txt").write_text(text)
    return root


def test_text_files_next_to_images_are_their_captions(tmp_path: Path) -> None:
    captioned(tmp_path / "pairs", _0=" a cat\n", _1="ein Hündchen", _3="two", _README="read me")
    data = ImageDataModule(tmp_path, image_size=4, num_workers=0, val_share=0.2)
    data.setup("predict")
    found = {}
    for loader in data.predict_dataloader():
        for batch in loader:
            found |= dict(zip(batch["keys"], batch["captions"], strict=True))
    assert found == {"pairs/0": "a cat", "pairs/1": "ein Hündchen", "pairs/2": "", "pairs/3": "two"}


def test_single_text_file_next_to_images_is_not_a_caption(tmp_path: Path) -> None:
    captioned(tmp_path / "pairs", _0="crop this")
    data = ImageDataModule(tmp_path, image_size=4, num_workers=0, val_share=0.2)
    data.setup("predict")
    assert not data.captioned
    assert sum(len(data.datasets[split].examples) for split in ("train", "val")) == 4  # type: ignore[attr-defined]


def test_folders_within_a_class_belong_to_it(tmp_path: Path) -> None:
    write(tmp_path, "a/z/2.png", "a/b/c/1.png", "a/3.png", "b/0.png")
    assert keys(tmp_path) == ["a/3", "a/b/c/1", "a/z/2", "b/0"]
    assert index(tmp_path).labels.tolist() == [0, 0, 0, 1]


def test_hidden_files_and_folders_are_ignored(tmp_path: Path) -> None:
    write(tmp_path, "a/.2.png", "a/._1.png", "a/.thumbnails/1.png", ".git/1.png", "a/1.png", "a/.png")
    assert class_folders(tmp_path) == ["a"]
    assert keys(tmp_path) == ["a/1"]


def test_other_files_are_ignored(tmp_path: Path) -> None:
    write(tmp_path, "README.md", "1.png", "a/Thumbs.db", "a/1.gif", "a/png", "a/2.png.txt", "a/3.tar", "a/1.png")
    assert keys(tmp_path) == ["a/1"]


def test_link_to_a_folder_is_followed(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere", "1.png", "more/2.png")
    write(tmp_path / "set", "a/0.png")
    (tmp_path / "set/b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set/a/below").symlink_to(tmp_path / "elsewhere/more")
    assert keys(tmp_path / "set") == ["a/0", "a/below/2", "b/1", "b/more/2"]


def test_dots_within_a_name_become_underscores(tmp_path: Path) -> None:
    write(tmp_path, "v1.0/photo.old.final.png", "v1.0/a.b/x..y.jpg")
    assert keys(tmp_path) == ["v1.0/photo_old_final", "v1.0/a.b/x__y"]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["1.jpg", "1.png", "1.webp"], {"1": "1.jpg", "1_png": "1.png", "1_webp": "1.webp"}),
        (["1.JPG", "1.jpg"], {"1": "1.JPG", "1_jpg": "1.jpg"}),
        (["a.b.png", "a_b.png"], {"a_b": "a.b.png", "a_b_png": "a_b.png"}),
        (["1.jpg", "1.png", "1_png.jpg"], {"1": "1.jpg", "1_png": "1.png", "1_png_jpg": "1_png.jpg"}),
    ],
)
def test_files_with_the_same_stem_get_unique_keys(tmp_path: Path, names: list[str], expected: dict[str, str]) -> None:
    write(tmp_path, *(f"a/{name}" for name in names))
    found = {example.key: example.read(*example.members).decode() for example in index(tmp_path)}
    assert found == {f"a/{key}": f"a/{name}" for key, name in expected.items()}


def test_names_of_any_script_are_kept(tmp_path: Path) -> None:
    write(tmp_path, "Füchse/狐 1.png", "Füchse/a\tb.png")
    assert keys(tmp_path) == ["Füchse/a\tb", "Füchse/狐 1"]


def test_file_name_that_is_not_unicode_is_read(tmp_path: Path) -> None:
    name = b"\xff\xfe.png".decode("utf-8", "surrogateescape")
    try:
        write(tmp_path, f"a/{name}")
    except OSError:
        pytest.skip("the file system takes only names in UTF-8")
    (example,) = index_folder(tmp_path, ["a"])
    assert example.read("png") == b"a/\xff\xfe.png"
    assert example.key == f"a/{name.removesuffix('.png')}"


def test_folder_without_images_has_no_examples(tmp_path: Path) -> None:
    write(tmp_path, "a/README")
    assert len(index(tmp_path)) == 0
    assert len(index(tmp_path).usable(("png",))) == 0


def test_image_removed_after_indexing_is_bad_when_read(tmp_path: Path) -> None:
    write(tmp_path, "a/1.png", "a/2.png")
    first, second = index(tmp_path)
    (tmp_path / "a/1.png").unlink()
    (tmp_path / "a/2.png").write_bytes(b"")
    for example in (first, second):
        with pytest.raises(BadExampleError) as error:
            example.read("png")
        assert_one_line(error, example.key)
        assert error.value.reason == "empty file"


def test_validation_class_missing_in_training_is_refused(tmp_path: Path) -> None:
    for name in ("train/cat/1.png", "train/dog/1.png", "val/dog/1.png", "val/fox/1.png"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(grey_image(1))
    with pytest.raises(ValueError) as error:
        ImageDataModule(tmp_path, num_workers=0).setup("fit")
    assert_one_line(error, tmp_path / "val", "fox", "not among the 2 classes")


def test_validation_images_have_the_class_numbers_of_training(tmp_path: Path) -> None:
    for name in ("train/ant/1.png", "train/cat/1.png", "train/dog/1.png", "val/dog/1.png"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(grey_image(1))
    data = ImageDataModule(tmp_path, num_workers=0)
    data.setup("fit")
    assert data.class_names == ["ant", "cat", "dog"]
    assert data.datasets["val"].examples.labels.tolist() == [2]  # type: ignore[attr-defined]
