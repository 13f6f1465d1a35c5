"""KID equals its unbiased formula over subsets that the seed determines."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torchmetrics.image.kid import poly_mmd

from llamagen.metrics import KID, Features
from llamagen.metrics.inception_score import SplitStatistics
from llamagen.metrics.kernel_distance import squared_discrepancy
from tests.metrics.extractors import SIZE, Anything, Projection, random_images

WIDTH = 6


def measure(real: Tensor, fake: Tensor, reference: bool = False, **options: int) -> SplitStatistics:
    extractor = Anything(lambda images: torch.zeros(len(images), WIDTH, dtype=real.dtype))
    metric = KID(extractor, SIZE, real if reference else None, **options)
    if not reference:
        metric.update(Features(real), real=True)
    metric.update(Features(fake))
    found: SplitStatistics = metric.compute()
    return found


def by_formula(x: np.ndarray, y: np.ndarray) -> float:
    """Formula 4 of arXiv 1801.01401, pair by pair."""

    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return float((np.dot(a, b) / len(a) + 1) ** 3)

    among_x = [kernel(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j]
    among_y = [kernel(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j]
    return float(np.mean(among_x) + np.mean(among_y) - 2 * np.mean([kernel(a, b) for a in x for b in y]))


def features(count: int, seed: int, mean: float = 0.0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(mean, size=(count, WIDTH)))


@pytest.mark.parametrize(("count", "other_count"), [(30, 30), (30, 17), (2, 25), (2, 2)])
def test_matches_the_formula_with_all_images_in_a_subset(count: int, other_count: int) -> None:
    real, fake = features(count, 1), features(other_count, 2, mean=0.5)
    found = measure(real, fake, subsets=3)
    assert (found.mean.dtype, found.std.dtype) == (torch.float64, torch.float64)
    assert found.mean.item() == pytest.approx(by_formula(real.numpy(), fake.numpy()), rel=1e-11)
    assert found.std.item() == pytest.approx(0, abs=1e-12)


def test_matches_torchmetrics_for_sides_of_equal_size() -> None:
    real, fake = features(40, 1), features(40, 2, mean=0.5)
    assert squared_discrepancy(real, fake).item() == pytest.approx(poly_mmd(real, fake).item(), rel=1e-12)


def test_multiplies_in_float64() -> None:
    real, fake = features(30, 1, mean=50).float(), features(30, 2, mean=50).float()
    expected = by_formula(real.double().numpy(), fake.double().numpy())
    assert measure(real, fake, subsets=1).mean.item() == pytest.approx(expected, rel=1e-6)


def test_is_unbiased_for_halves_of_one_dataset() -> None:
    found = [measure(features(25, seed), features(25, seed + 100), subsets=1).mean.item() for seed in range(40)]
    assert abs(np.mean(found)) < 3 * np.std(found) / 40**0.5
    assert min(found) < 0 < max(found)
    assert measure(features(25, 1), features(25, 2, mean=1.0), subsets=1).mean > 5 * np.std(found)


def test_samples_subsets_of_each_side_without_replacement() -> None:
    real, fake = features(9, 1), features(7, 2, mean=0.5)
    found = measure(real, fake, subsets=400, subset_size=2)
    every = [
        by_formula(real[[a, b]].numpy(), fake[[c, d]].numpy())
        for a in range(9)
        for b in range(a)
        for c in range(7)
        for d in range(c)
    ]
    error = np.std(every) / 400**0.5
    assert abs(found.mean.item() - np.mean(every)) < 3 * error
    assert found.std.item() == pytest.approx(np.std(every), rel=0.2)
    single = [measure(real, fake, subsets=1, subset_size=2, seed=seed).mean.item() for seed in range(5)]
    assert all(np.isclose(every, value, rtol=1e-9).any() for value in single)
    assert len(set(single)) > 1


def test_mean_and_deviation_are_over_subsets() -> None:
    real, fake = features(30, 1), features(30, 2, mean=0.5)
    generator = torch.Generator().manual_seed(3)
    distances = []
    for _ in range(4):
        parts = [rows[torch.randperm(30, generator=generator)[:10]] for rows in (real, fake)]
        distances.append(by_formula(*(part.numpy() for part in parts)))
    found = measure(real, fake, subsets=4, subset_size=10, seed=3)
    assert found.mean.item() == pytest.approx(np.mean(distances), rel=1e-11)
    assert found.std.item() == pytest.approx(np.std(distances), rel=1e-11)


def test_only_the_seed_determines_the_subsets() -> None:
    real, fake = features(30, 1), features(30, 2, mean=0.5)
    first = measure(real, fake, subsets=3, subset_size=5)
    state = torch.random.get_rng_state()
    torch.manual_seed(7)
    torch.rand(3)
    again = measure(real, fake, subsets=3, subset_size=5)
    assert torch.equal(torch.stack([*first]), torch.stack([*again]))
    assert measure(real, fake, subsets=3, subset_size=5, seed=1).mean != first.mean
    torch.random.set_rng_state(state)
    measure(real, fake, subsets=3, subset_size=5)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_uses_100_subsets_of_1000_by_default() -> None:
    metric = KID(Projection(), SIZE)
    assert (metric.subsets, metric.subset_size, metric.seed) == (100, 1000, 0)


def test_a_reference_equals_its_images() -> None:
    real, fake = features(30, 1), features(20, 2, mean=0.5)
    known, shown = (measure(real, fake, reference, subsets=3, subset_size=8) for reference in (True, False))
    assert torch.equal(torch.stack([*known]), torch.stack([*shown]))


@pytest.mark.parametrize(("subsets", "subset_size"), [(0, 10), (3, 1)])
def test_rejects_options_that_are_too_small(subsets: int, subset_size: int) -> None:
    with pytest.raises(ValueError, match=f"subsets is {subsets} and subset_size {subset_size}; they must be"):
        KID(Projection(), SIZE, subsets=subsets, subset_size=subset_size)


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")
@pytest.mark.parametrize(("count", "other_count", "phrase"), [(1, 5, "1 real"), (5, 1, "1 fake"), (0, 5, "0 real")])
def test_rejects_fewer_than_two_images(count: int, other_count: int, phrase: str) -> None:
    metric = KID(Projection(), SIZE)
    metric.update(random_images(count, 1), real=True)
    metric.update(random_images(other_count, 2))
    with pytest.raises(ValueError, match=f"{phrase} images are too few for kid_Projection; give at least two"):
        metric.compute()
