"""Properties of all image metrics: order, batches, copies, states, references and errors."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llamagen.metrics import KID, Features, InceptionScore, PrecisionRecall, extract
from llamagen.metrics.image_metric import RowMetric
from tests.metrics.extractors import SIZE, Anything, Corner, Everything, Projection, random_images

MAKERS: dict[str, Callable[..., Any]] = {
    "inception_score": lambda extractor, **options: InceptionScore(extractor, SIZE, splits=4),
    "kid": lambda extractor, **options: KID(extractor, SIZE, subsets=3, subset_size=20, **options),
    "precision_recall": lambda extractor, **options: PrecisionRecall(extractor, SIZE, k=2, block=16, **options),
}
every_metric = pytest.mark.parametrize("name", MAKERS)
two_sided = pytest.mark.parametrize("name", ["kid", "precision_recall"])


def real_images() -> Tensor:
    return random_images(31, 1)


def fake_images() -> Tensor:
    return random_images(25, 2, least=60)


def make(name: str, extractor: nn.Module | None = None, **options: Any) -> Any:
    return MAKERS[name](extractor or Corner(), **options)


def show(
    metric: RowMetric, images: Tensor, real: bool = False, index: Tensor | None = None, batch_size: int = 100
) -> None:
    """Add images in batches; real ones only to metrics that use them."""
    side = {} if isinstance(metric, InceptionScore) else {"real": real}
    if real and not side:
        return
    for start in range(0, len(images), batch_size):
        some = slice(start, start + batch_size)
        metric.update(images[some], index=None if index is None else index[some], **side)


def result(metric: Any) -> list[float]:
    return [part.item() for part in metric.compute()]


def measured(name: str, extractor: nn.Module | None = None, batch_size: int = 100) -> list[float]:
    metric = make(name, extractor)
    show(metric, real_images(), True, batch_size=batch_size)
    show(metric, fake_images(), batch_size=batch_size)
    return result(metric)


def finished(metric: Any) -> list[float]:
    """The result over all real images and the first ten others."""
    show(metric, fake_images()[10:])
    return result(metric)


def begun(name: str) -> Any:
    metric = make(name)
    show(metric, real_images(), True)
    show(metric, fake_images()[:10])
    return metric


@every_metric
@pytest.mark.parametrize("batch_size", [1, 7, 25])
def test_the_batch_size_does_not_change_results(name: str, batch_size: int) -> None:
    assert measured(name, batch_size=batch_size) == measured(name)


@every_metric
def test_the_index_determines_the_order(name: str) -> None:
    metric, unordered = make(name), make(name)
    for number, (images, real) in enumerate(((real_images(), True), (fake_images(), False))):
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(number))
        show(metric, images[order], real, order, batch_size=6)
        show(unordered, images[order], real)
    assert result(metric) == measured(name)
    assert (result(unordered) == measured(name)) is (name == "precision_recall")


def test_without_an_index_ranks_count_their_images_like_a_distributed_sampler(monkeypatch: pytest.MonkeyPatch) -> None:
    metric = make("inception_score")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    for images in fake_images()[:5].split(3):
        metric.update(images)
    assert torch.cat(metric.fake_index).tolist() == [1, 4, 7, 10, 13]


@every_metric
def test_an_index_may_have_an_offset_and_gaps_and_be_int32(name: str) -> None:
    metric = make(name)
    for images, real in ((real_images(), True), (fake_images(), False)):
        show(metric, images.flip(0), real, 3 * torch.arange(len(images), dtype=torch.int32).flip(0) + 100, 8)
    assert result(metric) == measured(name)
    assert metric.fake_index[0].dtype == torch.int64


@every_metric
@pytest.mark.parametrize("way", [copy.deepcopy, lambda metric: pickle.loads(pickle.dumps(metric))])
def test_a_copy_continues_from_the_original_state(name: str, way: Callable[[Any], Any]) -> None:
    original = begun(name)
    copied = way(original)
    assert finished(copied) == measured(name)
    assert copied.extractor is not original.extractor
    assert sum(map(len, original.fake_rows)) == 10
    assert finished(original) == measured(name)


@every_metric
def test_a_saved_state_continues_in_another_metric_and_does_not_change(name: str) -> None:
    original = begun(name)
    assert original.state_dict() == {}
    original.persistent(True)
    torch.save(original.state_dict(), file := io.BytesIO())
    file.seek(0)
    state = torch.load(file, weights_only=True)
    results = []
    for _ in range(2):
        other = make(name)
        show(other, fake_images()[:15])
        show(other, fake_images()[:15], True)
        result(other)
        other.load_state_dict(state)
        assert sum(map(len, state["fake_rows"])) == 10
        results.append(finished(other))
        other.reset()
    assert results == [measured(name)] * 2
    assert sum(map(len, state["fake_rows"])) == sum(map(len, original.fake_rows)) == 10


@every_metric
def test_loading_a_state_discards_the_cached_result(name: str) -> None:
    original, other = make(name), begun(name)
    show(original, real_images(), True)
    show(original, fake_images())
    original.persistent(True)
    assert result(other) != measured(name)
    other.load_state_dict(original.state_dict())
    assert result(other) == measured(name)


@every_metric
def test_reset_forgets_all_images(name: str) -> None:
    metric = make(name)
    show(metric, random_images(40, 3), True)
    show(metric, random_images(40, 4))
    result(metric)
    metric.reset()
    show(metric, real_images(), True)
    show(metric, fake_images())
    assert result(metric) == measured(name)


@every_metric
def test_an_intermediate_compute_does_not_change_the_result(name: str) -> None:
    metric = begun(name)
    middle = result(metric)
    assert result(metric) == middle != measured(name)
    assert finished(metric) == measured(name)


def test_forward_returns_the_score_of_a_batch_and_keeps_the_order() -> None:
    metric = make("inception_score")
    for batch in fake_images().split(5):
        show(alone := make("inception_score"), batch)
        assert [part.item() for part in metric(batch)] == result(alone)
    assert result(metric) == measured("inception_score")


@every_metric
@pytest.mark.parametrize(
    "cast",
    [
        lambda module: module.half(),
        lambda module: module.to(torch.bfloat16),  # as Lightning's bf16-true does
        lambda module: module.metric.set_dtype(torch.float64),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_casts_do_not_change_the_precision_of_features(
    name: str, cast: Callable[[Any], Any], dtype: torch.dtype
) -> None:
    owner = nn.Module()
    owner.metric = metric = make(name, Corner(dtype))
    show(metric, real_images(), True)
    show(metric, fake_images()[:10])
    cast(owner)
    assert finished(metric) == measured(name, Corner(dtype))
    assert {rows.dtype for rows in metric.fake_rows} == {metric.row_dtype} == {dtype}
    assert {index.dtype for index in metric.fake_index} == {torch.int64}


def test_float64_features_stay_float64() -> None:
    far = Anything(lambda images: 2.0**13 + images[:, :, 0, :4].flatten(1).double() / 2**20)
    assert measured("precision_recall", far) == measured("precision_recall")


@every_metric
def test_the_extractor_is_frozen_in_evaluation_mode_and_in_no_state_dict(name: str) -> None:
    owner = nn.Module()
    extractor = Corner().train()
    owner.metric = make(name, extractor)
    owner.metric.persistent(True)
    sides = ("fake",) if name == "inception_score" else ("fake", "real")
    assert set(owner.state_dict()) == {f"metric.{side}_{part}" for side in sides for part in ("rows", "index")}
    assert list(owner.parameters()) == []
    owner.train()
    assert owner.metric.extractor is extractor
    assert not extractor.dropout.training
    assert not extractor.scale.requires_grad
    show(owner.metric, fake_images())
    assert not owner.metric.fake_rows[0].requires_grad


@every_metric
def test_features_move_to_another_device(name: str) -> None:
    metric = begun(name).to("meta")
    assert {part.device.type for part in [*metric.fake_rows, *metric.fake_index]} == {"meta"}
    assert metric.fake_rows[0].dtype == torch.float32


@two_sided
def test_a_reference_equals_its_real_images(name: str) -> None:
    rows = Corner().eval()(real_images().float()).pool.detach()
    metric = make(name, reference=rows.double())
    show(metric, fake_images())
    assert result(metric) == measured(name)
    assert metric.reference.dtype == metric.row_dtype == torch.float32
    assert metric.state_dict() == {}
    metric.reset()
    show(metric, fake_images())
    assert result(metric) == measured(name)
    assert result(pickle.loads(pickle.dumps(metric))) == measured(name)
    with pytest.raises(ValueError, match="real images were given, but the metric has a reference; leave one of them"):
        metric.update(real_images(), real=True)


@two_sided
@pytest.mark.parametrize("shape", [(20, 11), (20,), (1, 12), (0, 12), (5, 3, 4)])
def test_rejects_a_reference_of_other_features(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="the reference has features of") as error:
        make(name, reference=torch.zeros(shape))
    assert str(shape) in str(error.value)
    assert f"{name}_corner needs at least two rows of 12" in str(error.value)


def test_names_include_the_extractor_unless_it_is_inception() -> None:
    inception = Everything()
    inception.name = "inception"
    assert [make(name, inception).name for name in MAKERS] == list(MAKERS)
    assert [make(name, Everything()).name for name in MAKERS] == [f"{name}_everything" for name in MAKERS]
    assert make("kid", Projection()).name == "kid_Projection"


@every_metric
@pytest.mark.parametrize(
    ("images", "phrase"),
    [
        (torch.zeros(4, 3, SIZE, SIZE), "images must be uint8 of shape"),
        (torch.zeros(4, SIZE, SIZE, 3, dtype=torch.uint8), "images must be uint8 of shape"),
        (torch.zeros(2, 3, 4, 6, dtype=torch.uint8), "images are 4 × 6 pixels, but .*_corner is for 8 × 8; set"),
        (Features(torch.zeros(2, 9), logits=torch.zeros(2, 9)), "got 9 features for each image, but (7|12) for"),
    ],
)
def test_rejects_images_of_another_size_or_type(name: str, images: Any, phrase: str) -> None:
    with pytest.raises(ValueError, match=phrase):
        make(name).update(images)


@pytest.mark.parametrize("index", [torch.arange(3), torch.zeros(4, 1).long(), torch.zeros(4), torch.zeros(4).bool()])
def test_rejects_an_index_without_an_integer_per_image(index: Tensor) -> None:
    with pytest.raises(ValueError, match="for 4 images; give one integer for each") as error:
        show(make("kid"), fake_images()[:4], index=index)
    assert f"index is {index.dtype} of {tuple(index.shape)}" in str(error.value)


@every_metric
@pytest.mark.parametrize("count", [0, 1])
def test_rejects_fewer_than_two_images(name: str, count: int) -> None:
    metric = make(name)
    show(metric, real_images(), True)
    metric.update(fake_images()[:count])
    with pytest.raises(ValueError, match=f"{count} fake images are too few for {name}_corner; give at least two"):
        metric.compute()


@every_metric
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_rejects_features_that_are_not_finite(name: str, value: float) -> None:
    metric = begun(name)
    with pytest.raises(FloatingPointError, match=r"(features|logits) of the extractor \w+ are not finite \(precision"):
        metric.update(Features(torch.full((5, 12), value), logits=torch.full((5, 7), value)))
    with pytest.raises(FloatingPointError, match=r"are not finite in 1 of 5 examples \(first: number 3\)"):
        metric.update(Features(*(torch.zeros(5, n).index_fill(0, torch.tensor(3), value) for n in (12, 3, 7))))


def test_rejects_an_image_size_below_one() -> None:
    with pytest.raises(ValueError, match="image_size is 0; give the side of the images in pixels"):
        KID(Corner(), 0)


@pytest.mark.parametrize("legacy", [False, True])
def test_extracts_without_tf32(legacy: bool) -> None:
    seen: list[list[str]] = []

    def precisions() -> list[str]:
        return [torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision]

    def look(batch: Tensor) -> Tensor:
        seen.append(precisions())
        return batch.flatten(1)

    matmul = torch.backends.cuda.matmul
    before = torch.backends.fp32_precision, torch.get_float32_matmul_precision(), matmul.fp32_precision
    if legacy:
        torch.set_float32_matmul_precision("high")
    else:
        torch.backends.fp32_precision = "tf32"
        matmul.fp32_precision = "tf32"  # after set_float32_matmul_precision the general setting has no effect
    try:
        around = precisions()
        assert around[1] == "tf32"
        extract(Anything(look), random_images(2, 0))
        assert seen == [["ieee", "ieee"]]
        assert precisions() == around
    finally:
        torch.backends.fp32_precision = before[0]
        torch.set_float32_matmul_precision(before[1])
        matmul.fp32_precision = before[2]
