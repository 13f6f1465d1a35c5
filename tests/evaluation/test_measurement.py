"""All metrics in one pass: names of results, metrics that cannot be measured, further metrics."""

import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from evaluation.image_sets import open_images
from evaluation.measurement import METRICS, Measurement, check_metrics, result_names
from evaluation.reference import Reference, make_reference
from llamagen.metrics import FID, KID, SFID, Features, InceptionScore, PrecisionRecall, extractor_checksum
from llamagen.metrics.image_metric import ImageMetric
from tests.evaluation.sets import FakeInception, write_npz
from tests.metrics.brightness import Brightness
from tests.metrics.extractors import SIZE, Corner, Everything, Projection, random_images


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    path = write_npz(tmp_path_factory.mktemp("images") / "real.npz", 30, 0)
    return make_reference(open_images(path), FakeInception(), "real")


def measured(measurement: Measurement, images: Tensor, batch_size: int = 100) -> dict[str, float]:
    for batch in images.split(batch_size):
        measurement.update(batch)
    return {name: value.item() for name, value in measurement.compute().items()}


def test_results_equal_those_of_the_metrics(reference: Reference) -> None:
    results = measured(Measurement(FakeInception(), SIZE, "generation", reference), random_images(40, 1))
    extractor = FakeInception()
    expected = {}
    for metric, prefix in ((FID, "g"), (SFID, "g"), (KID, "g"), (PrecisionRecall, ""), (InceptionScore, "")):
        each = metric(extractor, SIZE)
        if metric is not InceptionScore:
            each.update(random_images(30, 0), real=True)
        each.update(random_images(40, 1))
        value = each.compute()
        if isinstance(value, Tensor):
            expected[f"{prefix}{each.symbol}/real"] = value.item()
        elif metric is PrecisionRecall:
            expected |= {"precision/real": value.precision.item(), "recall/real": value.recall.item()}
        else:
            end = "" if metric is InceptionScore else "/real"
            expected[f"{prefix}{each.symbol}{end}"] = value.mean.item()
            expected[f"{prefix}{each.symbol}_std{end}"] = value.std.item()
    assert results == pytest.approx(expected, rel=1e-5, abs=1e-9)


class Exact(Corner):
    """An extractor with all features and without matrix products, whose rounding may depend on the batch size."""

    def forward(self, images: Tensor) -> Features:
        return super().forward(images)._replace(spatial=images[:, :, ::2, ::2] / 64)


def test_results_do_not_depend_on_the_batch_size(tmp_path: Path) -> None:
    real = open_images(write_npz(tmp_path / "real.npz", 30, 0))
    reference = make_reference(real, Exact(), "real")
    found = [
        measured(Measurement(Exact(), SIZE, "generation", reference), random_images(40, 1), size) for size in (40, 7)
    ]
    assert len(found[0]) == 8
    assert found[0] == pytest.approx(found[1], rel=1e-6, abs=1e-9)


def test_real_images_replace_the_reference() -> None:
    measurement = Measurement(FakeInception(), SIZE, "reconstruction")
    measurement.update(random_images(30, 0), real=True)
    found = measured(measurement, random_images(30, 0))
    assert set(found) == {"rfid/val", "rsfid/val", "rkid/val", "rkid_std/val", "precision/val", "recall/val"}
    assert found["rfid/val"] == pytest.approx(0, abs=1e-6)
    assert found["precision/val"] == found["recall/val"] == 1
    assert measurement.count == 30
    measurement.reset()
    assert measurement.count == 0
    with pytest.raises(ValueError, match="images are too few for fid"):
        measurement.compute()


@pytest.mark.parametrize(
    ("metric", "arguments", "name"),
    [
        (FID, ("generation", "inception", "imagenet256-adm"), "gfid/imagenet256-adm"),
        (FID, ("reconstruction", "inception", "imagenet-val"), "rfid/imagenet-val"),
        (KID, ("reconstruction", "digits", "val"), "rkid_std_digits/val"),
        (PrecisionRecall, ("generation", "digits", "train"), "precision_digits/train"),
        (InceptionScore, ("generation", "inception", "train"), "inception_score"),
        (InceptionScore, ("generation", "digits", "train"), "inception_score_std_digits"),
    ],
)
def test_names_include_purpose_extractor_and_reference(
    metric: type[ImageMetric], arguments: tuple[str, ...], name: str
) -> None:
    assert name in result_names([metric], *arguments)  # type: ignore[arg-type]


def test_names_of_all_results() -> None:
    assert result_names(METRICS, "generation", "inception", "a") == [
        "gfid/a", "gsfid/a", "precision/a", "recall/a", "gkid/a", "gkid_std/a",
        "inception_score", "inception_score_std",
    ]  # fmt: skip
    assert result_names(METRICS, "reconstruction", "inception") == [
        "rfid/val", "rsfid/val", "precision/val", "recall/val", "rkid/val", "rkid_std/val",
    ]  # fmt: skip


def symbols(found: dict[str, float]) -> set[str]:
    return {name.split("/")[0].split("_Projection")[0] for name in found}


def test_warns_of_metrics_whose_features_the_extractor_lacks(tmp_path: Path) -> None:
    made = make_reference(open_images(write_npz(tmp_path / "a.npz", 30, 0)), Projection(), "a")
    with pytest.warns(UserWarning, match="not measured") as warned:
        measurement = Measurement(Projection(), SIZE, "generation", made)
    assert [str(warning.message) for warning in warned] == [
        "not measured: sfid, because the extractor Projection gives no spatial features; inception_score, because the "
        "extractor Projection gives no logits"
    ]
    assert symbols(measured(measurement, random_images(30, 1))) == {"gfid", "gkid", "gkid_std", "precision", "recall"}


def test_warns_of_metrics_whose_statistics_the_reference_lacks(reference: Reference) -> None:
    bare = replace(reference, features=None, spatial_statistics=None)
    with pytest.warns(UserWarning, match="not measured") as warned:
        measurement = Measurement(FakeInception(), SIZE, "generation", bare)
    assert [str(warning.message) for warning in warned] == [
        "not measured: sfid, because the reference real has no spatial statistics (mu_s and sigma_s); precision_recall "
        "and kid, because the reference real has no features"
    ]
    assert set(measured(measurement, random_images(30, 1))) == {"gfid/real", "inception_score", "inception_score_std"}


def test_no_warning_if_everything_is_measured(reference: Reference) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for kind in ("generation", "reconstruction"):
            measured(Measurement(FakeInception(), SIZE, kind, reference), random_images(30, 1))  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [2, 3])
def test_few_images_give_only_some_results(count: int, reference: Reference) -> None:
    measurement = Measurement(FakeInception(), SIZE, "generation", reference)
    with pytest.warns(UserWarning, match="not measured") as warned:
        found = measured(measurement, random_images(count, 1))
    assert set(found) == {"gfid/real", "gsfid/real", "gkid/real", "gkid_std/real"}
    assert all(np.isfinite(list(found.values())))
    few, *messages = sorted(str(warning.message) for warning in warned)
    assert few.startswith(f"{count} images are fewer than the 16 features of inception")
    assert messages == [
        f"inception_score is not measured: {count} images are too few for 10 splits of the Inception Score; give more, "
        "or set splits to less",
        f"precision_recall is not measured: {count} other images have no 3-th neighbour; give at least 4",
    ]


def test_rejects_a_single_image(reference: Reference) -> None:
    with pytest.raises(ValueError, match="1 fake images are too few for fid; give at least two"):
        measured(Measurement(FakeInception(), SIZE, "generation", reference), random_images(1, 1))


def test_rejects_a_reference_of_another_extractor_size_or_width(reference: Reference) -> None:
    with pytest.raises(ValueError, match="made with the extractor inception, not everything"):
        Measurement(Everything(), SIZE, "generation", reference)
    with pytest.raises(ValueError, match="of images of 8 pixels, not 16"):
        Measurement(FakeInception(), 16, "generation", reference)
    short = replace(reference, statistics=(reference.statistics[0][:4], reference.statistics[1][:4, :4]))
    with pytest.raises(ValueError, match="use the reference of this extractor"):
        Measurement(FakeInception(), SIZE, "generation", short)


class Normed(nn.Module):
    """An extractor that changes in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, images: Tensor) -> Tensor:
        normed: Tensor = self.norm(images).flatten(1)[:, ::9]
        return normed


@pytest.mark.filterwarnings("ignore:not measured")
def test_the_extractor_is_put_into_evaluation_mode() -> None:
    extractor = Normed().train()
    before = extractor_checksum(extractor)
    Measurement(extractor, SIZE, "reconstruction").update(random_images(5, 0))
    assert extractor_checksum(extractor) == before
    assert torch.equal(extractor.norm.running_mean, torch.zeros(3))  # type: ignore[arg-type]


def test_warns_once_of_a_model_whose_images_are_all_the_same(
    reference: Reference, recwarn: pytest.WarningsRecorder
) -> None:
    measurement = Measurement(FakeInception(), SIZE, "generation", reference)
    for _ in range(2):
        for index in range(3):
            measurement.update(random_images(4, 0)[:1].repeat(4, 1, 1, 1), torch.arange(4 * index, 4 * index + 4))
        measurement.compute()
        measurement.reset()
    messages = [str(warning.message) for warning in recwarn if "not meaningful" in str(warning.message)]
    assert messages == ["the results are not meaningful: all 12 images are the same image; sample or copy them again"]
    measurement.update(random_images(4, 0), torch.arange(4))
    measurement.compute()
    assert len([warning for warning in recwarn if "not meaningful" in str(warning.message)]) == 1


class ByClass(nn.Module):
    """An extractor whose logits follow the class in the images' corner, with some noise."""

    name = "by-class"

    def forward(self, images: Tensor) -> Features:
        logits = (
            4.0 * nn.functional.one_hot(images[:, 0, 0, 0].long(), 8).float() + images[:, :, 1, 1].mean(1, True) / 255
        )
        return Features(images[:, :, 0].flatten(1), logits=logits + torch.eye(8)[images[:, 1, 1, 1].long() % 8])


def test_images_sorted_by_class_get_the_inception_score_of_a_random_order() -> None:
    batch = random_images(400, 1)
    batch[:, 0, 0, 0] = torch.arange(8).repeat_interleave(50)
    order = torch.randperm(400, generator=torch.Generator().manual_seed(5))
    found = {}
    for name, images in (("sorted", batch), ("random", batch[order])):
        measurement = Measurement(ByClass(), SIZE, "generation", metrics=[FID, InceptionScore])
        measurement.update(batch, real=True)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            found[name] = measured(measurement, images)["inception_score_by-class"]
        sorted_images = [each for each in seen if "seem to be sorted by class" in str(each.message)]
        assert len(sorted_images) == (name == "sorted")
    assert found["sorted"] == pytest.approx(found["random"], rel=0.03)
    alone = InceptionScore(ByClass(), SIZE)
    alone.update(batch)
    assert alone.compute().mean < 0.5 * found["random"]  # what ADM's evaluation gives


def test_warns_of_fewer_images_than_features(reference: Reference) -> None:
    measurement = Measurement(FakeInception(), SIZE, "generation", reference)
    with pytest.warns(UserWarning, match="12 images are fewer than the 16 features of inception, which makes FID"):
        measured(measurement, random_images(12, 1))


def test_measures_a_further_metric(reference: Reference) -> None:
    measurement = Measurement(FakeInception(), SIZE, "generation", reference, metrics=[*METRICS, Brightness])
    with pytest.warns(UserWarning, match="brightness of 30 images"):
        results = measured(measurement, random_images(30, 1))
    assert reference.features is not None
    differences = (
        FakeInception().eval()(random_images(30, 1).float()).pool.double().mean(0) - reference.features.double().mean(0)
    ).abs()
    assert results["gbrightness/real"] == pytest.approx(differences.mean().item(), rel=1e-5)
    assert results["brightness_max"] == pytest.approx(differences.max().item(), rel=1e-5)
    assert list(results)[-2:] == ["gbrightness/real", "brightness_max"]
    assert results.keys() == set(result_names([*METRICS, Brightness], "generation", "inception", "real"))


def test_measures_a_single_metric(reference: Reference) -> None:
    with pytest.warns(UserWarning, match="brightness of 1 images"):
        results = measured(
            Measurement(FakeInception(), SIZE, "reconstruction", reference, metrics=[Brightness]), random_images(1, 1)
        )
    assert set(results) == {"rbrightness/real", "brightness_max"}
    bare = replace(reference, features=None)
    with (
        pytest.warns(UserWarning, match="not measured: brightness, because the reference real has no features"),
        pytest.raises(ValueError, match="there is no metric to measure; use another extractor or reference"),
    ):
        Measurement(FakeInception(), SIZE, "generation", bare, metrics=[Brightness])


def test_rejects_metrics_with_the_same_names() -> None:
    class Other(Brightness):
        symbol = "other"

    for metrics in ([FID, KID, FID], [Brightness, Other]):
        with pytest.raises(ValueError, match=r"two metrics are named .* symbols of its own"):
            check_metrics(metrics)


def test_a_metric_without_a_reference_rejects_one() -> None:
    with pytest.raises(ValueError, match="inception_score_everything compares with nothing; leave the reference out"):
        ImageMetric.checked_reference(InceptionScore(Everything(), SIZE), torch.zeros(3))
