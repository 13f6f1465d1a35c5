"""Class folders are numbered by the integers in their names, or in the order of their names."""

from pathlib import Path

import numpy as np
import pytest

from datamodules import ImageDataModule
from datamodules.inspection import inspect
from datamodules.packing import pack
from datamodules.storage.class_order import MAX_SPARSE, class_numbers, number_classes, outlying_label
from datamodules.storage.shards import read_meta
from tests.datamodules.shard_files import assert_one_line, grey_image, write_shards


def write_classes(root: Path, *names: str, count: int = 2) -> Path:
    for name in names:
        (root / name).mkdir(parents=True)
        for number in range(count):
            (root / name / f"{number}.png").write_bytes(grey_image(int(name) if name.isdigit() else number))
    return root


def classes_of(*names: str, order: str = "auto") -> list[str]:
    return number_classes(names, order, "here").classes  # type: ignore[arg-type]


def warnings_of(*names: str) -> str:
    return " | ".join(number_classes(names, "auto", "here").warnings)


def test_integers_are_class_numbers_and_other_names_are_sorted() -> None:
    twelve = [str(number) for number in range(12)]
    assert classes_of(*reversed(twelve)) == twelve
    assert classes_of(*twelve, order="name") == sorted(twelve)
    assert classes_of("00", "02", "01") == ["00", "01", "02"]
    assert classes_of("n02", "n01", "n10") == ["n01", "n02", "n10"]
    for names in (["-1", "0"], ["1.0", "2"], ["+1", "2"], ["1_0", "2"], ["٣", "1"], [" 1", "2"]):
        assert classes_of(*names) == sorted(names), "not integers in ASCII digits"


def test_gaps_are_reported_and_have_names() -> None:
    assert classes_of("1", "4") == ["0", "1", "2", "3", "4"]
    assert classes_of("01", "04") == ["00", "01", "02", "03", "04"]
    assert "no folder for 0, 2, 3: 3 of 5 classes have no images" in warnings_of("1", "4")
    assert "and 989 more" in warnings_of("999")
    assert warnings_of("0", "1", "2") == warnings_of("cat", "dog") == ""


def test_years_and_codes_are_not_class_numbers() -> None:
    for names in (["2019", "2020", "2021"], ["7", "20000000"], ["1", "9" * 200]):
        assert classes_of(*names) == sorted(names)
        assert "too high for class numbers" in warnings_of(*names)
    assert len(classes_of("3", str(MAX_SPARSE - 1))) == MAX_SPARSE
    assert len(classes_of("3", "2020", order="number")) == 2021
    many = [str(number) for number in range(0, 20_000, 5)]
    assert len(classes_of(*many)) == 19_996, "half of ImageNet-21k's classes keep their numbers"


def test_integers_among_other_names_are_warned_about() -> None:
    assert classes_of("0", "10", "2", "other") == ["0", "10", "2", "other"]
    assert "other is not, so folders are numbered in the order of their names: folder 10 is class 1" in warnings_of(
        "0", "10", "2", "other"
    )


def test_invalid_class_folders_are_refused() -> None:
    for names, order, phrases in (
        (["1", "01", "2"], "auto", ["01 and 1", "same class number", "class_order to name"]),
        (["0", "cat"], "number", ["class_order is number", "cat", "not an integer"]),
        (["0", "1000000"], "number", ["1000000", "999999"]),
    ):
        with pytest.raises(ValueError) as error:
            classes_of(*names, order=order)
        assert_one_line(error, "here", *phrases)
    assert classes_of("1", "01", "2", order="name") == ["01", "1", "2"]


def test_validation_folders_get_the_class_numbers_of_training() -> None:
    assert class_numbers(["01", "10"], [str(number) for number in range(12)], "here") == {"01": 1, "10": 10}
    assert class_numbers(["1", "10"], sorted(str(number) for number in range(12)), "here") == {"1": 1, "10": 2}
    for found, phrase in ((["12"], "not among the 12 classes"), (["1", "01"], "1 and 01 in here are the same class")):
        with pytest.raises(ValueError) as error:
            class_numbers(found, [str(number) for number in range(12)], "here")
        assert_one_line(error, "here", phrase)


def test_labels_are_the_folder_numbers_on_every_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [str(number) for number in range(12)]
    root = write_classes(tmp_path / "set", *names, count=3)
    data = ImageDataModule(root, image_size=4, num_workers=0, flip=False)
    data.setup("fit")
    assert data.class_names == names
    for batch in data.train_dataloader():
        assert ((batch["images"][:, 0, 0, 0] + 1) * 127.5).round().long().tolist() == batch["labels"].tolist()
    pack(str(root), tmp_path / "packed", workers=1)
    assert read_meta(tmp_path / "packed", "")["classes"] == names
    assert "12 classes, numbered by the integers in their folders' names" in capsys.readouterr().out
    assert "  12 classes, numbered by the integers in their folders' names" in inspect(
        str(root), num_workers=0, decode=False
    )


def test_class_order_is_an_option(tmp_path: Path) -> None:
    root = write_classes(tmp_path / "set", "2", "10", "9", count=10)
    data = ImageDataModule(root, image_size=4, num_workers=0, class_order="name")
    data.setup("fit")
    assert data.class_names == ["10", "2", "9"]
    pack(str(root), tmp_path / "packed", workers=1, class_order="name")
    assert read_meta(tmp_path / "packed", "")["num_classes"] == 3
    assert "  3 classes, numbered in the order of their folders' names" in inspect(
        str(root), num_workers=0, decode=False, class_order="name"
    )


def test_outlying_class_number_is_warned_about_with_its_example(tmp_path: Path) -> None:
    assert outlying_label(np.array([0, 1, 1, 99_999, -1])) == 99_999
    assert outlying_label(np.array([0, 1, MAX_SPARSE - 1])) is outlying_label(np.array([-1])) is None
    write_shards(
        tmp_path, [(f"k{i}", {"png": grey_image(i), "cls": b"54321" if i == 3 else b"1"}) for i in range(20)], 20
    )
    with pytest.warns(UserWarning, match=r"highest class is 54321 .example k3 .* 54322 classes"):
        ImageDataModule(tmp_path, image_size=4, num_workers=0, val_share=0.01).setup("fit")


def test_class_number_of_two_billion_is_a_bad_example(tmp_path: Path) -> None:
    examples = [(f"k{i}", {"png": grey_image(i), "cls": b"2000000000" if i == 3 else b"1"}) for i in range(40)]
    write_shards(tmp_path / "set", examples, per_shard=40)
    pack(str(tmp_path / "set"), tmp_path / "packed", workers=1)
    assert read_meta(tmp_path / "packed", "")["num_classes"] == 2
    assert "example k3 of" in (tmp_path / "packed/skipped.tsv").read_text()
    with pytest.raises(ValueError) as error:
        pack(str(tmp_path / "set"), tmp_path / "strict", workers=1, max_bad_share=0.0)
    assert_one_line(error, "example k3 of", "not an integer from 0 to 999999")
