"""The Inception Score equals its formula over consecutive splits of the images."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torchmetrics import MetricCollection

from llamagen.metrics import FID, KID, Features, InceptionScore
from llamagen.metrics.inception_score import SplitStatistics
from tests.metrics.extractors import SIZE, Anything, Everything, Projection, random_images

CLASSES = 5


def of_logits(logits: Tensor, splits: int = 10, index: Tensor | None = None) -> SplitStatistics:
    def extractor(images: Tensor) -> Features:
        return Features(images.mean((2, 3)), logits=torch.zeros(len(images), logits.shape[1], dtype=logits.dtype))

    metric = InceptionScore(Anything(extractor), SIZE, splits)
    metric.update(Features(logits, logits=logits), index=index)
    found: SplitStatistics = metric.compute()
    return found


def by_formula(logits: np.ndarray, splits: int) -> tuple[float, float]:
    """exp of the mean KL(p(y|x) ‖ p(y)) in each split (arXiv 1606.03498); mean and population deviation over them."""
    powers = np.exp(logits - logits.max(1, keepdims=True))
    probabilities = powers / powers.sum(1, keepdims=True)
    scores = []
    for number in range(splits):
        part = probabilities[number * len(logits) // splits : (number + 1) * len(logits) // splits]
        divergences = [(row * np.log(row / part.mean(0))).sum() for row in part]
        scores.append(np.exp(np.mean(divergences)))
    mean = sum(scores) / splits
    return mean, (sum((score - mean) ** 2 for score in scores) / splits) ** 0.5


def random_logits(count: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, CLASSES)) * 2


@pytest.mark.parametrize(("count", "splits"), [(200, 10), (97, 10), (23, 7), (11, 10), (50, 1), (10, 10)])
def test_matches_the_formula(count: int, splits: int) -> None:
    logits = random_logits(count)
    found = of_logits(torch.from_numpy(logits), splits)
    mean, std = by_formula(logits, splits)
    assert (found.mean.dtype, found.std.dtype) == (torch.float64, torch.float64)
    assert found.mean.item() == pytest.approx(mean, rel=1e-12)
    assert found.std.item() == pytest.approx(std, rel=1e-10, abs=1e-12)


def test_computes_in_float64() -> None:
    logits = torch.from_numpy(random_logits(60)).float()
    assert of_logits(logits, 4).mean.item() == pytest.approx(by_formula(logits.double().numpy(), 4)[0], rel=1e-12)


def test_uses_ten_splits_by_default() -> None:
    assert InceptionScore(Everything(), SIZE).splits == 10
    logits = torch.from_numpy(random_logits(60))
    metric = InceptionScore(Everything(), SIZE)
    wide = torch.cat([logits, torch.full((60, 2), -50.0)], 1)
    metric.update(Features(wide, logits=wide))
    assert metric.compute().mean.item() == pytest.approx(by_formula(wide.numpy(), 10)[0], rel=1e-6)


def test_uses_the_logits_of_images() -> None:
    batch = random_images(40, 1)
    metric = InceptionScore(Everything(), SIZE, splits=3)
    for part in batch.split(9):
        metric.update(part)
    logits = Everything().eval()(batch.float()).logits.detach().double().numpy()
    assert metric.compute().mean.item() == pytest.approx(by_formula(logits, 3)[0], rel=1e-5)


@pytest.mark.parametrize("level", [0.0, -3e38, 3e38])
def test_equal_logits_score_one(level: float) -> None:
    found = of_logits(torch.full((40, CLASSES), level))
    assert (found.mean.item(), found.std.item()) == (pytest.approx(1, abs=1e-14), pytest.approx(0, abs=1e-14))


@pytest.mark.parametrize("sure", [1e3, 1e30])
def test_certain_and_balanced_predictions_score_the_number_of_classes(sure: float) -> None:
    found = of_logits(sure * torch.eye(CLASSES).repeat(20, 1))
    assert (found.mean.item(), found.std.item()) == (pytest.approx(CLASSES), pytest.approx(0, abs=1e-12))


def test_the_order_of_classes_changes_the_score() -> None:
    sure = 1e3 * torch.eye(CLASSES).repeat_interleave(10, 0)
    assert of_logits(sure, CLASSES).mean.item() == pytest.approx(1)
    in_turn = torch.arange(CLASSES * 10).view(10, CLASSES).T.flatten()  # numbers of those that are shown one by one
    assert of_logits(sure, 10, in_turn).mean.item() == pytest.approx(CLASSES)


def test_logits_with_a_large_offset_keep_precision() -> None:
    logits = random_logits(60).round(3)
    assert of_logits(torch.from_numpy(logits + 2.0**20), 4).mean.item() == pytest.approx(
        by_formula(logits, 4)[0], rel=1e-8
    )


@pytest.mark.parametrize(("count", "splits"), [(9, 10), (2, 3)])
def test_rejects_fewer_images_than_splits(count: int, splits: int) -> None:
    with pytest.raises(ValueError, match=f"{count} images are too few for {splits} splits of the Inception Score"):
        of_logits(torch.zeros(count, CLASSES), splits)


@pytest.mark.parametrize("splits", [0, -1])
def test_rejects_splits_below_one(splits: int) -> None:
    with pytest.raises(ValueError, match=f"splits is {splits}; it must be at least 1"):
        InceptionScore(Everything(), SIZE, splits)


def test_rejects_an_extractor_without_logits() -> None:
    with pytest.raises(ValueError, match="InceptionScore needs logits, which Projection does not give; use"):
        InceptionScore(Projection(), SIZE)
    metric = InceptionScore(Everything(), SIZE)
    with pytest.raises(ValueError, match="InceptionScore needs logits, which everything does not give"):
        metric.update(Features(torch.zeros(2, 7)))


def test_ignores_real_images() -> None:
    extractor, real, fake = Everything(), random_images(30, 1, least=100), random_images(30, 2)
    alone, collection = (
        InceptionScore(extractor, SIZE),
        MetricCollection([FID(extractor, SIZE), KID(extractor, SIZE), InceptionScore(extractor, SIZE)]),
    )
    alone.update(fake)
    collection.update(real, real=True)
    collection.update(fake)
    found, expected = collection.compute()["InceptionScore"], alone.compute()
    assert (found.mean.item(), found.std.item()) == (expected.mean.item(), expected.std.item())
