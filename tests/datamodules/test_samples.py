"""Requests for pictures: balanced over classes, in one order on any number of ranks."""

from collections import Counter
from types import SimpleNamespace

import pytest

from datamodules.samples import SampleDataModule
from tests.datamodules.shard_files import assert_one_line


def requests(data: SampleDataModule, rank: int = 0, world_size: int = 1) -> list[tuple[int, int]]:
    """(index, class) in the order of a rank."""
    data.trainer = SimpleNamespace(global_rank=rank, world_size=world_size)  # type: ignore[assignment]
    return [
        request
        for batch in data.predict_dataloader()
        for request in zip(batch["index"].tolist(), batch["condition"].tolist(), strict=True)
    ]


@pytest.mark.parametrize(
    ("classes", "expected"), [(3, [0, 1, 2]), (1, [0]), ([7, 2, 9], [7, 2, 9])], ids=["number", "one", "list"]
)
def test_the_classes_come_in_turn_until_each_has_its_share(classes: int | list[int], expected: list[int]) -> None:
    found = requests(SampleDataModule(classes, per_class=4, batch_size=5))
    assert found == list(enumerate(expected * 4))
    assert set(Counter(label for _, label in found).values()) == {4}


@pytest.mark.parametrize("batch_size", [1, 7, 100])
@pytest.mark.parametrize("world_size", [1, 2, 3, 16])
def test_a_picture_has_the_same_class_on_any_number_of_ranks(world_size: int, batch_size: int) -> None:
    data = SampleDataModule(4, per_class=3, batch_size=batch_size)
    shares = [requests(data, rank, world_size) for rank in range(world_size)]
    assert shares == [list(enumerate([0, 1, 2, 3] * 3))[rank::world_size] for rank in range(world_size)]


def test_batches_have_the_batch_size() -> None:
    batches = list(SampleDataModule(4, per_class=3, batch_size=5).predict_dataloader())
    assert [len(batch["index"]) for batch in batches] == [5, 5, 2]


@pytest.mark.parametrize(
    ("options", "phrase"),
    [
        ({"classes": 0}, "classes is 0"),
        ({"classes": -2}, "classes is -2"),
        ({"classes": []}, "classes is []"),
        ({"classes": [3, -1]}, "classes is [3, -1]"),
        ({"classes": [3, 1, 3]}, "classes is [3, 1, 3]"),
        ({"per_class": 0}, "per_class is 0"),
        ({"batch_size": 0}, "batch_size 0"),
    ],
    ids=str,
)
def test_an_impossible_request_is_refused_by_name_and_value(options: dict[str, int | list[int]], phrase: str) -> None:
    with pytest.raises(ValueError) as error:
        SampleDataModule(**options)  # type: ignore[arg-type]
    assert_one_line(error, phrase)
