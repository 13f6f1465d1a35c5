"""The Fréchet distance equals that of scipy's matrix root for any order and batches, and is in no state dict."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor, nn

from llamagen.metrics import FID, SFID, Features, frechet_distance
from tests.metrics.extractors import SIZE, Anything, Everything, Projection, random_images


def measure(real: Tensor, fake: Tensor, batch_size: int = 100, features: nn.Module | None = None) -> Tensor:
    metric = FID(features or Projection(), SIZE)
    for images, is_real in ((real, True), (fake, False)):
        for batch in images.split(batch_size):
            metric.update(batch, is_real)
    distance: Tensor = metric.compute()
    return distance


def by_scipy(features: np.ndarray, other: np.ndarray) -> float:
    """The formula of arXiv 1706.08500 with a matrix root."""
    covariance, other_covariance = np.cov(features, rowvar=False), np.cov(other, rowvar=False)
    root = scipy.linalg.sqrtm(covariance @ other_covariance)
    difference = features.mean(0) - other.mean(0)
    return float(difference @ difference + np.trace(covariance + other_covariance) - 2 * np.trace(root).real)


def random_features(count: int, width: int, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    mixed = generator.normal(size=(count, width)) @ generator.normal(size=(width, width))
    return mixed + generator.normal(size=width)


def gaussian(features: np.ndarray) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(features.mean(0)), torch.from_numpy(np.cov(features, rowvar=False))


def test_diagonal_gaussians_match_the_closed_form() -> None:
    mean, other_mean = torch.tensor([1.0, 2.0, -3.0]).double(), torch.tensor([1.5, 0.0, -3.0]).double()
    scale, other_scale = torch.tensor([1.0, 2.0, 0.0]).double(), torch.tensor([3.0, 2.0, 0.5]).double()
    distance = frechet_distance(mean, scale.square().diag(), other_mean, other_scale.square().diag())
    assert distance.dtype == torch.float64
    assert distance.item() == pytest.approx(0.25 + 4.0 + (4.0 + 0.0 + 0.25), abs=1e-12)


@pytest.mark.parametrize(("count", "other_count"), [(500, 400), (500, 40), (40, 500), (40, 30)])
def test_matches_scipy_also_with_fewer_images_than_features(count: int, other_count: int) -> None:
    features, other = random_features(count, 64, seed=1), random_features(other_count, 64, seed=2)
    distance = frechet_distance(*gaussian(features), *gaussian(other)).item()
    assert distance == pytest.approx(by_scipy(features, other), rel=1e-3)
    assert distance == pytest.approx(frechet_distance(*gaussian(other), *gaussian(features)).item(), rel=1e-7)


@pytest.mark.parametrize("count", [500, 40])
def test_a_gaussian_has_distance_zero_from_itself(count: int) -> None:
    features = random_features(count, 64, seed=1)
    distance = frechet_distance(*gaussian(features), *gaussian(features)).item()
    assert 0 <= distance < 1e-6 * np.trace(np.cov(features, rowvar=False))


def test_a_small_distance_of_few_images_is_not_lost_in_rounding() -> None:
    _, covariance = gaussian(random_features(5, 400, seed=1))
    mean = torch.zeros(400, dtype=torch.float64)
    distance = frechet_distance(mean, covariance, mean, 1.001**2 * covariance).item()
    assert distance == pytest.approx(0.001**2 * covariance.trace().item(), rel=1e-5)


@pytest.mark.parametrize("count", [60, 10])
def test_images_have_distance_zero_from_themselves(count: int) -> None:
    assert 0 <= measure(random_images(count, 1), random_images(count, 1).flip(0)).item() < 1e-6


@pytest.mark.parametrize("count", [60, 10])
def test_images_and_their_features_give_the_same_distance(count: int) -> None:
    real, fake = random_images(count, 1), random_images(50, 2, least=60)
    with torch.no_grad():
        features = [Projection().eval().double()(batch.double()).numpy() for batch in (real, fake)]
    distance = measure(real, fake)
    assert (distance.shape, distance.dtype) == ((), torch.float64)
    assert distance.item() == pytest.approx(by_scipy(*features), rel=1e-4)
    assert distance > 1


@pytest.mark.parametrize("batch_size", [1, 7, 60])
def test_the_batch_size_does_not_change_results(batch_size: int) -> None:
    real, fake = random_images(60, 1), random_images(50, 2, least=60)
    assert measure(real, fake, batch_size).item() == pytest.approx(measure(real, fake).item(), rel=1e-6)


def test_keeps_precision_for_features_far_from_zero() -> None:
    # Mean 1e4, deviation 0.1: in float32 the difference of the two sums of squares is noise.
    features = Anything(lambda batch: 1e4 + 0.1 * batch[:, :, 0, 0].double())
    real, fake = random_images(200, 1), random_images(200, 2, least=100)
    expected = by_scipy(*(0.1 * batch[:, :, 0, 0].double().numpy() for batch in (real, fake)))
    assert measure(real, fake, features=features).item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("shape", [(1, 1), (2, 2)])
def test_flattens_features(shape: tuple[int, ...]) -> None:
    real, fake = random_images(30, 1), random_images(30, 2, least=60)
    assert torch.equal(measure(real, fake, features=Projection(shape=shape)), measure(real, fake))


def test_the_extractor_gets_levels_as_float32() -> None:
    seen: list[Tensor] = []
    metric = FID(Anything(lambda batch: (seen.append(batch), batch.mean((2, 3)))[1]), SIZE)
    batch = random_images(4, 1)
    metric.update(batch, real=True)
    assert {tuple(probe.shape[1:]) for probe in seen} == {(3, SIZE, SIZE)}
    assert {probe.dtype for probe in seen} == {torch.float32}
    assert seen[0].eq(0).all()
    assert torch.equal(seen[-1], batch.float())


def test_states_of_halves_add_up() -> None:
    real, fake = random_images(60, 1), random_images(50, 2, least=60)
    halves = [FID(Projection(), SIZE) for _ in range(2)]
    for rank, half in enumerate(halves):
        half.update(real[rank::2], real=True)
        half.update(fake[rank::2], real=False)
    merged = FID(Projection(), SIZE)
    merged.update(real[:0], real=True)
    for name in merged._defaults:
        setattr(merged, name, getattr(halves[0], name) + getattr(halves[1], name))
    assert merged.compute().item() == pytest.approx(measure(real, fake).item(), rel=1e-6)


def test_reset_forgets_all_images() -> None:
    metric = FID(Projection(), SIZE)
    metric.update(random_images(9, 3), real=True)
    metric.update(random_images(9, 4), real=False)
    metric.reset()
    real, fake = random_images(30, 1), random_images(30, 2, least=60)
    metric.update(real, real=True)
    metric.update(fake, real=False)
    assert torch.equal(metric.compute(), measure(real, fake))


def test_the_extractor_is_frozen_and_in_no_state_dict() -> None:
    owner = nn.Module()
    features = Projection().train()
    owner.metric = FID(features, SIZE)
    owner.metric.persistent(True)
    names = {f"metric.{side}_{name}" for side in ("real", "fake") for name in ("sum", "outer", "count")}
    assert set(owner.state_dict()) == names
    assert list(owner.parameters()) == []
    assert owner.metric.extractor is features
    assert not any(module.training for module in features.modules())
    assert not any(parameter.requires_grad for parameter in features.parameters())
    owner.train()
    assert not features.dropout.training


def test_extracts_without_gradient_and_autocast() -> None:
    seen: list[tuple[bool, torch.dtype]] = []

    def features(batch: Tensor) -> Tensor:
        rows = batch.flatten(1)
        seen.append((torch.is_grad_enabled(), (rows @ rows.T[:, :2]).dtype))
        return rows[:, :4]

    metric = FID(Anything(features), SIZE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        metric.update(random_images(4, 1), real=True)
    assert set(seen) == {(False, torch.float32)}
    assert not metric.real_outer.requires_grad


@pytest.mark.parametrize(
    "cast",
    [
        lambda module: module.half(),
        lambda module: module.float(),
        lambda module: module.bfloat16(),
        lambda module: module.to(torch.bfloat16),  # as Lightning's bf16-true does
        lambda module: module.to("cpu", torch.float16),
        lambda module: module.metric.set_dtype(torch.float32),
    ],
)
def test_casts_do_not_change_the_precision_of_statistics(cast: Callable[[Any], Any]) -> None:
    owner = nn.Module()
    owner.metric = metric = FID(Projection(), SIZE)
    real, fake = random_images(30, 1), random_images(30, 2, least=60)
    metric.update(real, real=True)
    cast(owner)
    metric.update(fake, real=False)
    assert torch.equal(metric.compute(), measure(real, fake))
    metric.reset()
    assert {metric.real_sum.dtype, metric.fake_outer.dtype} == {torch.float64}


def test_statistics_move_to_another_device() -> None:
    metric = FID(Projection(), SIZE).to("meta")
    states = [getattr(metric, name) for name in metric._defaults]
    assert {state.device.type for state in [*states, *metric._defaults.values()]} == {"meta"}
    assert metric.device.type == "meta"
    assert [state.dtype for state in states] == [torch.float64, torch.float64, torch.int64] * 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_extractor_moves_to_the_images_device() -> None:
    metric = FID(Projection(), SIZE).cuda()
    real, fake = random_images(30, 1), random_images(30, 2, least=60)
    metric.update(real.cuda(), real=True)
    metric.update(fake.cuda(), real=False)
    distance = metric.compute()
    assert distance.is_cuda
    assert distance.item() == pytest.approx(measure(real, fake).item(), rel=1e-4)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda metric: pickle.loads(pickle.dumps(metric))])
def test_a_copy_continues_from_the_original_state(way: Callable[[FID], FID]) -> None:
    original = FID(Projection(), SIZE)
    real, fake = random_images(30, 1), random_images(30, 2, least=60)
    original.update(real, real=True)
    copied = way(original)
    copied.update(fake, real=False)
    assert torch.equal(copied.compute(), measure(real, fake))
    assert copied.extractor is not original.extractor
    assert original.fake_count == 0


@pytest.mark.parametrize(
    ("function", "phrase"),
    [
        (lambda images: images.mean((1, 2, 3)), r"\(2,\)"),
        (lambda images: images.mean(), r"\(\)"),
        (lambda images: images.flatten(1)[:1], r"\(1, 192\)"),
        (lambda images: (images.flatten(1),), "tuple"),
    ],
)
def test_rejects_a_module_without_a_row_per_image(function: Callable[[Tensor], Any], phrase: str) -> None:
    with pytest.raises(ValueError, match=f"Anything gives {phrase} as pool of 2 images"):
        FID(Anything(function), SIZE)


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(4, 3, SIZE, SIZE),
        torch.zeros(4, 3, SIZE, SIZE, dtype=torch.int64),
        torch.zeros(3, SIZE, SIZE, dtype=torch.uint8),
        torch.zeros(4, 1, SIZE, SIZE, dtype=torch.uint8),
        torch.zeros(4, SIZE, SIZE, 3, dtype=torch.uint8),
    ],
)
def test_rejects_tensors_that_are_not_uint8_images(images: Tensor) -> None:
    metric = FID(Projection(), SIZE)
    with pytest.raises(ValueError, match=r"must be uint8 of shape \(B, 3, H, W\), not") as error:
        metric.update(images, real=True)
    assert str(images.dtype) in str(error.value)
    assert str(tuple(images.shape)) in str(error.value)


def test_rejects_images_of_another_size() -> None:
    metric = FID(Projection(), SIZE)
    with pytest.raises(ValueError, match="images are 4 × 6 pixels, but fid_Projection is for 8 × 8; set image_size"):
        metric.update(torch.zeros(2, 3, 4, 6, dtype=torch.uint8), real=True)


def test_rejects_features_of_another_width() -> None:
    metric = FID(Projection(), SIZE)
    with pytest.raises(ValueError, match="got 48 features for each image, but 16 for images of image_size 8"):
        metric.update(Features(torch.zeros(2, 48)), real=True)


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")
@pytest.mark.parametrize(("real", "fake", "phrase"), [(0, 5, "0 real"), (1, 5, "1 real"), (5, 1, "1 fake")])
def test_rejects_too_few_images(real: int, fake: int, phrase: str) -> None:
    with pytest.raises(ValueError, match=f"{phrase} images are too few"):
        measure(random_images(real, 1), random_images(fake, 2), features=Anything(lambda batch: batch.mean((2, 3))))


@pytest.mark.parametrize(("count", "width"), [(350, 256), (100, 256), (50, 64)])
def test_a_stored_reference_equals_its_images(count: int, width: int) -> None:
    real, fake = random_features(count, width, seed=1), random_features(count // 2, width, seed=2)
    extractor = Anything(lambda images: torch.zeros(len(images), width, dtype=torch.float64))
    metric = FID(extractor, SIZE, reference=(real.mean(0), np.cov(real, rowvar=False)))
    metric.update(Features(torch.from_numpy(fake)))
    assert metric.compute().item() == pytest.approx(by_scipy(real, fake), rel=1e-3)
    with pytest.raises(ValueError, match="real images were given, but the metric has a reference"):
        metric.update(Features(torch.from_numpy(real)), real=True)


def test_rejects_a_reference_of_another_width() -> None:
    with pytest.raises(ValueError, match=r"a mean of \(3,\) and a covariance of \(3, 3\), but fid_Projection has 16"):
        FID(Projection(), SIZE, reference=(torch.zeros(3), torch.eye(3)))


@pytest.mark.parametrize(
    ("count", "width", "offset"),
    [
        *((300, 512, 30.0), (100, 512, 0.0), (300, 128, 0.0)),
        pytest.param(100, 2048, 0.0, marks=pytest.mark.slow),
        pytest.param(3000, 2048, 0.0, marks=pytest.mark.slow),
    ],
)
def test_features_have_distance_zero_from_themselves_in_any_order(count: int, width: int, offset: float) -> None:
    # Non-negative features of order 1, as Inception's are; fewer images than features or more.
    rows = (torch.from_numpy(random_features(count, width, seed=1)).abs() / width**0.5 + offset).float()
    metric = FID(Anything(lambda images: torch.zeros(len(images), width)), SIZE)
    metric.update(Features(rows), real=True)
    for part in rows.flip(0).split(170):
        metric.update(Features(part))
    assert 0 <= metric.compute().item() < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("count", [3000, 500])
def test_matches_scipy_at_the_width_of_inception(count: int) -> None:
    features, other = random_features(count, 2048, seed=1), random_features(count, 2048, seed=2)
    distance = frechet_distance(*gaussian(features), *gaussian(other)).item()
    assert distance == pytest.approx(by_scipy(features, other), rel=1e-3)


def test_sfid_uses_spatial_features() -> None:
    real, fake = random_images(60, 1), random_images(50, 2, least=60)
    metric = SFID(Everything(), SIZE)
    metric.update(real, real=True)
    metric.update(fake)
    rows = [batch[:, :, ::2, ::2].flatten(1).double().numpy() / 64 for batch in (real, fake)]
    assert metric.compute().item() == pytest.approx(by_scipy(*rows), rel=1e-4)
    with pytest.raises(ValueError, match="SFID needs spatial features, which Projection does not give"):
        SFID(Projection(), SIZE)


def test_names_include_the_extractor_unless_it_is_inception() -> None:
    inception = Projection()
    inception.name = "inception"
    found = [metric.name for metric in (FID(inception, SIZE), FID(Projection(), SIZE), SFID(Everything(), SIZE))]
    assert found == ["fid", "fid_Projection", "sfid_everything"]
