"""Precision and recall equal the formula over all pairs, also for images on borders."""

from collections.abc import Callable
from importlib import import_module

import numpy as np
import pytest
import torch
from torch import Tensor

from llamagen.metrics import Features, PrecisionRecall
from llamagen.metrics import precision_recall as measure
from llamagen.metrics.precision_recall import radii
from tests.metrics.extractors import SIZE, Anything, Projection

WIDTH = 5


def squared_distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    difference: np.ndarray = x[:, None] - y[None]
    return (difference**2).sum(-1)


def radii_by_sorting(rows: np.ndarray, k: int) -> np.ndarray:
    among = squared_distances(rows, rows)
    others = np.stack([np.delete(row, number) for number, row in enumerate(among)])
    return np.sort(others, 1)[:, k - 1]


def by_all_pairs(real: Tensor, fake: Tensor, k: int) -> tuple[float, float]:
    """Formulas 1 and 2 of arXiv 1904.06991."""
    x, y = real.double().numpy(), fake.double().numpy()
    between = squared_distances(y, x)
    precision = (between <= radii_by_sorting(x, k)).any(1).mean()
    recall = (between <= radii_by_sorting(y, k)[:, None]).any(0).mean()
    return float(precision), float(recall)


def normal(count: int, seed: int, scale: float = 1.0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(scale=scale, size=(count, WIDTH)))


def lattice(count: int, seed: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 4, size=(count, WIDTH))).double()


def with_doubles(rows: Tensor) -> Tensor:
    return torch.cat([rows, rows[:9], rows[:5], rows[3:4].repeat(12, 1)])


def apart(rows: Tensor) -> Tensor:
    """Two clusters far from each other, so that no shift brings both near zero."""
    return rows + 1e6 * (torch.arange(len(rows)) % 2)[:, None]


KINDS: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
    "random": lambda: (normal(36, 1), normal(30, 2)),
    "narrow": lambda: (normal(36, 1), normal(30, 2, scale=0.3)),
    "doubles": lambda: (with_doubles(normal(24, 1)), with_doubles(normal(20, 2))),
    "copies": lambda: (real := normal(36, 1), torch.cat([real[::2], normal(18, 2, scale=2.0)])),
    "copies of a few": lambda: (normal(36, 1), normal(36, 1)[:5].repeat(3, 1)),
    "lattice": lambda: (lattice(36, 1), lattice(30, 2)),
    "sparse lattice": lambda: (3 * lattice(36, 1), lattice(30, 2)),
    "offset": lambda: (1e4 + normal(36, 1, scale=0.01), 1e4 + normal(30, 2, scale=0.01)),
    "offset beyond products": lambda: (1e4 + normal(36, 1, scale=1e-6), 1e4 + normal(30, 2, scale=1e-6)),
    "copies with an offset": lambda: (real := 1e4 + normal(36, 1, scale=1e-5), real[10:30]),
    "clusters apart": lambda: (apart(normal(36, 1, scale=1e-4)), apart(normal(30, 2, scale=1e-4))),
    "columns first": lambda: (normal(36, 1).T.contiguous().T, normal(36, 1).T.contiguous().T[:20]),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_formula_over_all_pairs(kind: str, dtype: torch.dtype) -> None:
    real, fake = (rows.to(dtype) for rows in KINDS[kind]())
    for k, block in ((1, 1000), (3, 7), (3, 1000), (5, 16)):
        found = measure(real, fake, k, block)
        assert (found.precision.item(), found.recall.item()) == by_all_pairs(real, fake, k), (k, block)
        assert (found.precision.dtype, found.recall.dtype) == (torch.float64, torch.float64)


@pytest.mark.parametrize("kind", ["narrow", "lattice", "offset beyond products"])
def test_works_with_blocks_of_one(kind: str) -> None:
    real, fake = (rows[:12] for rows in KINDS[kind]())
    found = measure(real, fake, k=3, block=1)
    assert (found.precision.item(), found.recall.item()) == by_all_pairs(real, fake, 3)


def test_most_compared_values_are_strictly_between_0_and_1() -> None:
    shares = [share for make in KINDS.values() for share in by_all_pairs(*make(), 3)]
    assert sum(0 < share < 1 for share in shares) >= 9


@pytest.mark.parametrize("kind", KINDS)
def test_radii_reach_the_kth_neighbour_without_the_row_itself(kind: str) -> None:
    rows, _ = KINDS[kind]()
    for k in (1, 3, 5):
        for block in (7, 1000):
            expected = radii_by_sorting(rows.numpy(), k)
            np.testing.assert_allclose(radii(rows, k, block).numpy(), expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("block", [3, 1000])
def test_copies_are_exactly_on_borders_for_any_block_size(block: int) -> None:
    # As wide as Inception's features: two orders of adding them up would differ.
    real = torch.rand(12, 2048, generator=torch.Generator().manual_seed(1))
    assert measure(real, real[3:9], 3, block).precision == 1
    assert measure(real, real[5:6].repeat(4, 1), 3, block).precision == 1


def test_distances_do_not_depend_on_shape_and_layout() -> None:
    exact = import_module("llamagen.metrics.precision_recall")._exact
    x, y = torch.rand(2, 40, 2047, generator=torch.Generator().manual_seed(1)).double()
    distances = exact(x, y)
    assert torch.equal(exact(x.T.contiguous().T, y.T.contiguous().T), distances)
    assert torch.equal(torch.cat([exact(x[row : row + 1], y[row : row + 1]) for row in range(40)]), distances)
    assert torch.equal(exact(x[3], y)[3], distances[3])
    torch.testing.assert_close(distances, (x - y).square().sum(1), rtol=1e-13, atol=0)


def test_a_ball_includes_its_border() -> None:
    real = torch.tensor([[0.0], [3.0]])
    for x, precision in ((6.0, 1.0), (6.0 + 1e-6, 0.0), (-3.0, 1.0), (-3.0 - 1e-6, 0.0)):
        fake = torch.tensor([[x], [x]], dtype=torch.float64)
        assert measure(real.double(), fake, k=1).precision == precision


def test_computes_distances_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    module = import_module("llamagen.metrics.precision_recall")  # its function has the same name
    sizes: list[tuple[int, ...]] = []
    product = module._distances

    def spied(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        distances, slack = product(x, y)
        sizes.append(tuple(distances.shape))
        return distances, slack

    real, fake = normal(36, 1), normal(30, 2)
    monkeypatch.setattr(module, "_distances", spied)
    measure(real, fake, 3, block=16)
    assert max(map(max, sizes)) == 16
    assert sum(rows * columns for rows, columns in sizes) == 36 * 36 + 30 * 30 + 2 * 36 * 30


def test_compares_pairs_on_borders_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    module = import_module("llamagen.metrics.precision_recall")  # its function has the same name
    pairs: list[int] = []
    exact = module._exact

    def spied(x: Tensor, y: Tensor) -> Tensor:
        found = exact(x, y)
        pairs.append(len(found))
        return found

    real = 1e4 + normal(36, 1, scale=1e-6)
    monkeypatch.setattr(module, "_exact", spied)
    measure(real, real[:30], 3, block=8)
    assert max(pairs) == 8


@pytest.mark.parametrize(("count", "other_count", "phrase"), [(3, 9, "3 real"), (9, 3, "3 other"), (1, 9, "1 real")])
def test_rejects_at_most_k_images(count: int, other_count: int, phrase: str) -> None:
    with pytest.raises(ValueError, match=f"{phrase} images have no 3-th neighbour; give at least 4"):
        measure(normal(count, 1), normal(other_count, 2), k=3)
    assert measure(normal(4, 1), normal(4, 1), k=3).precision == 1


@pytest.mark.parametrize(("k", "block"), [(0, 5), (3, 0)])
def test_rejects_options_that_are_too_small(k: int, block: int) -> None:
    with pytest.raises(ValueError, match=f"k is {k} and block {block}; both must be at least 1"):
        PrecisionRecall(Projection(), SIZE, k=k, block=block)


@pytest.mark.parametrize("reference", [False, True])
def test_the_metric_equals_the_function(reference: bool) -> None:
    real, fake = KINDS["narrow"]()
    extractor = Anything(lambda images: torch.zeros(len(images), WIDTH, dtype=torch.float64))
    metric = PrecisionRecall(extractor, SIZE, real if reference else None, k=2, block=16)
    if not reference:
        metric.update(Features(real), real=True)
    metric.update(Features(fake))
    found = metric.compute()
    assert (found.precision.item(), found.recall.item()) == by_all_pairs(real, fake, 2)
    assert found.precision > found.recall
    assert (PrecisionRecall(extractor, SIZE).k, PrecisionRecall(extractor, SIZE).block) == (3, 4096)
