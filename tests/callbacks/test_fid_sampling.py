"""The images that FIDMonitor samples are divided among ranks, and each belongs to its class or caption."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from callbacks.fid_sampling import ValidationCaptions, share_of_classes

CPU = torch.device("cpu")


@pytest.mark.parametrize(("count", "ranks"), [(12, 1), (12, 3), (11, 3), (2, 3)])
def test_ranks_sample_different_images_of_all_classes_in_turn(count: int, ranks: int) -> None:
    shares = [share_of_classes(count, 4, rank, ranks, CPU) for rank in range(ranks)]
    assert len({len(share.numbers) for share in shares}) == 1
    numbers = [number for share in shares for number in share.numbers.tolist()]
    assert len(set(numbers)) == len(numbers)
    assert sorted(number for number in numbers if number < count) == list(range(count))
    for share in shares:
        batch = share.conditions(share.numbers)
        assert batch.labels is not None
        assert batch.condition.tolist() == batch.labels.tolist() == [number % 4 for number in share.numbers.tolist()]


def test_each_image_has_the_tokens_and_the_text_of_its_caption() -> None:
    lengths = {0: 2, 1: 3, 2: 1, 3: 2, 4: 1}

    def condition(batch: dict[str, Any]) -> Any:
        features = torch.full((len(batch["numbers"]), 3, 2), -1.0)  # padding on the left
        for row, number in enumerate(batch["numbers"].tolist()):
            features[row, 3 - lengths[number] :] = number
        return features, torch.tensor([lengths[number] for number in batch["numbers"].tolist()]), None

    module: Any = SimpleNamespace(batch_condition=condition)
    captions = ValidationCaptions(5)
    for numbers in ([3, 0], [4, 1, 2]):
        captions.keep({"numbers": torch.tensor(numbers), "captions": [f"caption {n}" for n in numbers]}, module)
    share = captions.share(0, 1, CPU)
    assert share.numbers.tolist() == [0, 1, 2, 3, 4]
    batch = share.conditions(torch.tensor([4, 0, 1]))
    assert batch.captions == ["caption 4", "caption 0", "caption 1"]
    assert batch.lengths is not None
    assert batch.lengths.tolist() == [1, 2, 3]
    for number, row, length in zip((4, 0, 1), batch.condition, (1, 2, 3), strict=True):
        assert row[3 - length :].unique().tolist() == [number]
        assert not row[: 3 - length].any()
