"""Requests for images of classes: balanced, and in the same order on any number of ranks."""

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from datamodules.requests.classes import ClassRequestDataModule
from llamagen.class_names import ClassNames, imagenet_classes
from tests.datamodules.shard_files import assert_one_line


def requests(
    data: ClassRequestDataModule, rank: int = 0, world_size: int = 1, ranks_wait: bool = False
) -> list[tuple[int, int]]:
    """(index, class) of each image of a rank, in order."""
    module = SimpleNamespace(device_mesh=object() if ranks_wait else None)
    trainer = SimpleNamespace(global_rank=rank, world_size=world_size, lightning_module=module)
    data.trainer = trainer  # type: ignore[assignment]
    return [
        request
        for batch in data.predict_dataloader()
        for request in zip(batch["index"].tolist(), batch["condition"].tolist(), strict=True)
    ]


def batches(data: ClassRequestDataModule, rank: int, world_size: int) -> int:
    """Number of batches of a rank if ranks wait for each other."""
    requests(data, rank, world_size, ranks_wait=True)
    return len(data.predict_dataloader())


@pytest.mark.parametrize(
    ("classes", "expected"), [(3, [0, 1, 2]), (1, [0]), ([7, 2, 9], [7, 2, 9])], ids=["number", "one", "list"]
)
def test_classes_are_requested_in_rounds(classes: int | list[int], expected: list[int]) -> None:
    found = requests(ClassRequestDataModule(classes, per_class=4, batch_size=5))
    assert found == list(enumerate(expected * 4))
    assert set(Counter(label for _, label in found).values()) == {4}


@pytest.mark.parametrize("batch_size", [1, 7, 100])
@pytest.mark.parametrize("world_size", [1, 2, 3, 16])
def test_image_has_the_same_class_on_any_number_of_ranks(world_size: int, batch_size: int) -> None:
    data = ClassRequestDataModule(4, per_class=3, batch_size=batch_size)
    shares = [requests(data, rank, world_size) for rank in range(world_size)]
    assert shares == [list(enumerate([0, 1, 2, 3] * 3))[rank::world_size] for rank in range(world_size)]


def test_batches_have_the_batch_size() -> None:
    batches = list(ClassRequestDataModule(4, per_class=3, batch_size=5).predict_dataloader())
    assert [len(batch["index"]) for batch in batches] == [5, 5, 2]


def test_labels_of_a_file_are_requested_in_rounds_and_may_repeat(tmp_path: Path) -> None:
    path = tmp_path / "labels.txt"
    path.write_bytes(b"\xef\xbb\xbf7\n\n  2\r\n7\n 0 \n\n")
    data = ClassRequestDataModule(path, per_class=3, batch_size=5)
    assert data.classes == [7, 2, 7, 0]
    assert requests(data) == list(enumerate([7, 2, 7, 0] * 3))
    assert (data.labels.dtype, data.labels.tolist()) == (np.int64, [7, 2, 7, 0] * 3)
    assert ClassRequestDataModule(str(path), per_class=1).classes == data.classes


@pytest.mark.parametrize(
    ("content", "phrases"),
    [
        (b"3\n\n?\n", ("line 3", "'?' is neither a class number nor a name", "one integer from 0")),
        (b"-3\n", ("line 1", "'-3'")),
        (b"1\n2.5\n", ("line 2", "'2.5'")),
        (b"1 2\n", ("line 1", "'1 2'")),
        ("\u0663\n".encode(), ("line 1", "is neither a class number nor a name")),
        (b"9999999999\n", ("line 1", "'9999999999'")),
        (b"\n \n", ("holds no class numbers or names", "write one in each line")),
        (b"", ("holds no class numbers or names",)),
        (b"\xff\xfe3\x00", ("cannot be read (not a text file)",)),
        (None, ("cannot be read (No such file or directory)", "give a number, a list of class numbers and names, or")),
    ],
    ids=str,
)
def test_bad_label_file_is_refused_with_its_line(
    content: bytes | None, phrases: tuple[str, ...], tmp_path: Path
) -> None:
    path = tmp_path / "labels.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        ClassRequestDataModule(path)
    assert_one_line(error, path, *phrases)


def test_folder_is_refused_as_label_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError) as error:
        ClassRequestDataModule(tmp_path)
    assert_one_line(error, tmp_path, "cannot be read (Is a directory)")


@pytest.mark.parametrize("ranks_wait", [False, True])
@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 3), (2, 2), (3, 7), (4, 1)])
def test_finished_images_are_left_out_before_distribution(world_size: int, batch_size: int, ranks_wait: bool) -> None:
    data = ClassRequestDataModule(4, per_class=5, batch_size=batch_size)
    for done in ([0, 1, 2, 5, 19], [7], list(range(20)), list(range(19)), []):
        data.leave_out(done)
        assert data.left == 20 - len(done)
        shares = [requests(data, rank, world_size, ranks_wait) for rank in range(world_size)]
        asked = [request for share in shares for request in share]
        assert len(asked) == len(set(asked))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
        if ranks_wait:
            assert len({batches(data, rank, world_size) for rank in range(world_size)}) == 1
        left = {(index, index % 4) for index in range(20) if index not in done}
        assert left <= set(asked)
        assert len(asked) - len(left) < (world_size if ranks_wait else 1)


@pytest.mark.parametrize(
    ("options", "phrase"),
    [
        ({"classes": 0}, "classes is 0"),
        ({"classes": -2}, "classes is -2"),
        ({"classes": []}, "classes is []"),
        ({"classes": [3, -1]}, "classes is [3, -1]"),
        ({"classes": ["otter", "-1"]}, "classes is ['otter', '-1']"),
        ({"classes": ["otter", "otter"]}, "classes is ['otter', 'otter']"),
        ({"classes": [3, 1, 3]}, "classes is [3, 1, 3]"),
        ({"classes": [10**20]}, "classes is [100000000000000000000]"),
        ({"per_class": 0}, "per_class is 0"),
        ({"batch_size": 0}, "batch_size 0"),
    ],
    ids=str,
)
def test_invalid_request_is_refused_with_name_and_value(options: dict[str, int | list[int]], phrase: str) -> None:
    with pytest.raises(ValueError) as error:
        ClassRequestDataModule(**options)  # type: ignore[arg-type]
    assert_one_line(error, phrase)


def test_fewer_images_than_ranks_are_not_measured() -> None:
    data = ClassRequestDataModule(2, per_class=1)
    requests(data, world_size=3)
    with pytest.raises(ValueError, match="2 images cannot be measured on 3 ranks") as error:
        data.test_dataloader()
    assert_one_line(error)


def resolved(classes: Any, names: ClassNames | None = None, per_class: int = 1) -> ClassRequestDataModule:
    """Requests after ``setup`` with a model whose classes have these names; ImageNet's by default."""
    data = ClassRequestDataModule(classes, per_class)
    module = SimpleNamespace(class_names=names or imagenet_classes())
    data.trainer = SimpleNamespace(lightning_module=module, global_rank=0, world_size=1)  # type: ignore[assignment]
    data.setup("predict")
    return data


def test_classes_are_requested_by_names_and_numbers_of_the_model() -> None:
    data = resolved(["golden retriever", 3, "388", "St. Bernard"], per_class=2)
    assert data.classes == [207, 3, 388, 247]
    assert requests(data) == list(enumerate([207, 3, 388, 247] * 2))
    assert (data.labels.dtype, data.left) == (np.int64, 8)
    assert resolved(["cats", "dogs"], ClassNames(["dogs", "cats"])).classes == [1, 0]
    assert resolved("Arctic fox").classes == [279]
    assert resolved("n02099601").classes == [207]


def test_digits_in_quotes_are_a_name_if_a_class_has_it() -> None:
    names = ClassNames(["1", "10", "2"])  # folders in their order
    assert resolved(["10", 2], names).classes == [1, 2]
    assert resolved(["0"], names).classes == [0]
    assert ClassRequestDataModule(["10", 2]).classes == [10, 2]  # of a model whose classes have no names


def test_names_of_a_file_are_requested_and_may_repeat(tmp_path: Path) -> None:
    path = tmp_path / "labels"  # without a suffix
    path.write_text("otter\n7\nOtter\n360\n")
    assert resolved(path).classes == [360, 7, 360, 360]
    path.write_text("otter\n\ncrane\n")
    with pytest.raises(ValueError) as error:
        resolved(path)
    assert_one_line(error, f"{path}, line 3: 'crane' fits 2 classes")


@pytest.mark.parametrize(
    ("classes", "phrases"),
    [
        (["goldn retriever"], ("classes: there is no class 'goldn retriever'", "207 (golden retriever)")),
        (["crane"], ("classes: 'crane' fits 2 classes", "give more words or a number")),
        (["otter", 360], ("classes has 'otter' and 360, which are all class 360; give each class once",)),
        ("nothing", ("classes: there is no class 'nothing'",)),
    ],
    ids=str,
)
def test_unknown_ambiguous_and_repeated_names_are_refused_in_one_line(classes: Any, phrases: tuple[str, ...]) -> None:
    with pytest.raises(ValueError) as error:
        resolved(classes)
    assert_one_line(error, *phrases)


def test_names_are_refused_if_the_classes_have_none() -> None:
    data = ClassRequestDataModule([3, "otter"])
    data.trainer = SimpleNamespace(lightning_module=SimpleNamespace(class_names=None))  # type: ignore[assignment]
    with pytest.raises(ValueError) as error:
        data.setup("predict")
    assert_one_line(error, "classes has 'otter', but this model's classes have no names; give numbers")
