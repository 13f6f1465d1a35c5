"""All metrics in one pass: what they are called, and what is left out and why."""

import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from evaluation.image_sets import open_images
from evaluation.measurement import Measurement, name_of
from evaluation.reference import Reference, make_reference
from llamagen.metrics import FID, KID, SFID, Features, InceptionScore, PrecisionRecall, extractor_checksum
from tests.evaluation.sets import FakeInception, write_npz
from tests.metrics.extractors import SIZE, Corner, Everything, Projection, random_images


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    path = write_npz(tmp_path_factory.mktemp("images") / "real.npz", 30, 0)
    return make_reference(open_images(path), FakeInception(), "real")


def measured(measurement: Measurement, images: Tensor, batch_size: int = 100) -> dict[str, float]:
    for some in images.split(batch_size):
        measurement.update(some)
    return {name: value.item() for name, value in measurement.compute().items()}


def test_numbers_are_those_of_the_metrics(reference: Reference) -> None:
    found = measured(Measurement(FakeInception(), SIZE, "generation", reference), random_images(40, 1))
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
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-9)


class Exact(Corner):
    """An extractor that gives everything; a matrix product would round by the size of the batch, on some processors."""

    def forward(self, images: Tensor) -> Features:
        return super().forward(images)._replace(spatial=images[:, :, ::2, ::2] / 64)


def test_batches_change_nothing(tmp_path: Path) -> None:
    real = open_images(write_npz(tmp_path / "real.npz", 30, 0))
    reference = make_reference(real, Exact(), "real")
    found = [
        measured(Measurement(Exact(), SIZE, "generation", reference), random_images(40, 1), size) for size in (40, 7)
    ]
    assert len(found[0]) == 8
    assert found[0] == pytest.approx(found[1], rel=1e-6, abs=1e-9)


def test_the_images_themselves_are_the_reference_where_there_is_none() -> None:
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
    ("arguments", "name"),
    [
        (("fid", "generation", "inception", "imagenet256-adm"), "gfid/imagenet256-adm"),
        (("fid", "reconstruction", "inception", "imagenet-val"), "rfid/imagenet-val"),
        (("kid_std", "reconstruction", "digits", "val"), "rkid_std_digits/val"),
        (("precision", "generation", "digits", "train"), "precision_digits/train"),
        (("inception_score", "generation", "inception", "train"), "inception_score"),
        (("inception_score_std", "generation", "digits", "train"), "inception_score_std_digits"),
    ],
)
def test_a_name_says_what_was_measured_how_and_against_what(arguments: tuple[str, ...], name: str) -> None:
    assert name_of(*arguments) == name  # type: ignore[arg-type]


def symbols(found: dict[str, float]) -> set[str]:
    return {name.split("/")[0].split("_Projection")[0] for name in found}


def test_what_the_extractor_does_not_give_is_left_out_with_one_warning(tmp_path: Path) -> None:
    made = make_reference(open_images(write_npz(tmp_path / "a.npz", 30, 0)), Projection(), "a")
    with pytest.warns(UserWarning, match="left out") as warned:
        measurement = Measurement(Projection(), SIZE, "generation", made)
    assert [str(warning.message) for warning in warned] == [
        "left out: sfid, as the extractor Projection gives no spatial features; inception_score, as the extractor "
        "Projection gives no logits"
    ]
    assert symbols(measured(measurement, random_images(30, 1))) == {"gfid", "gkid", "gkid_std", "precision", "recall"}


def test_what_the_reference_does_not_hold_is_left_out_with_one_warning(reference: Reference) -> None:
    bare = replace(reference, features=None, spatial_statistics=None)
    with pytest.warns(UserWarning, match="left out") as warned:
        measurement = Measurement(FakeInception(), SIZE, "generation", bare)
    assert [str(warning.message) for warning in warned] == [
        "left out: sfid, as the reference real has no spatial statistics (mu_s and sigma_s); precision, recall and "
        "kid, as the reference real has no features"
    ]
    assert set(measured(measurement, random_images(30, 1))) == {"gfid/real", "inception_score", "inception_score_std"}


def test_nothing_is_warned_of_where_all_is_measured(reference: Reference) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for kind in ("generation", "reconstruction"):
            measured(Measurement(FakeInception(), SIZE, kind, reference), random_images(30, 1))  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [2, 3])
def test_a_few_images_give_what_they_can(count: int, reference: Reference) -> None:
    measurement = Measurement(FakeInception(), SIZE, "generation", reference)
    with pytest.warns(UserWarning, match="left out") as warned:
        found = measured(measurement, random_images(count, 1))
    assert set(found) == {"gfid/real", "gsfid/real", "gkid/real", "gkid_std/real"}
    assert all(np.isfinite(list(found.values())))
    few, *messages = sorted(str(warning.message) for warning in warned)
    assert few.startswith(f"{count} images are fewer than the 16 features of inception")
    assert messages == [
        f"inception_score is left out: {count} images are too few for 10 splits of the Inception Score; give more, "
        "or set splits to less",
        f"precision_recall is left out: {count} other images have no 3-th neighbour; give at least 4",
    ]


def test_one_image_is_too_few(reference: Reference) -> None:
    with pytest.raises(ValueError, match="1 fake images are too few for fid; give at least two"):
        measured(Measurement(FakeInception(), SIZE, "generation", reference), random_images(1, 1))


def test_what_does_not_fit_the_reference_is_refused_at_once(reference: Reference) -> None:
    with pytest.raises(ValueError, match="made with the extractor inception, not everything"):
        Measurement(Everything(), SIZE, "generation", reference)
    with pytest.raises(ValueError, match="of images of 8 pixels, not 16"):
        Measurement(FakeInception(), 16, "generation", reference)
    short = replace(reference, statistics=(reference.statistics[0][:4], reference.statistics[1][:4, :4]))
    with pytest.raises(ValueError, match="use the reference of this extractor"):
        Measurement(FakeInception(), SIZE, "generation", short)


class Normed(nn.Module):
    """Would learn from what it is shown in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, images: Tensor) -> Tensor:
        normed: Tensor = self.norm(images).flatten(1)[:, ::9]
        return normed


@pytest.mark.filterwarnings("ignore:left out")
def test_an_extractor_in_training_mode_stays_what_it_is() -> None:
    extractor = Normed().train()
    before = extractor_checksum(extractor)
    Measurement(extractor, SIZE, "reconstruction").update(random_images(5, 0))
    assert extractor_checksum(extractor) == before
    assert torch.equal(extractor.norm.running_mean, torch.zeros(3))  # type: ignore[arg-type]


def test_a_model_whose_images_are_all_the_same_is_warned_of_once(
    reference: Reference, recwarn: pytest.WarningsRecorder
) -> None:
    measurement = Measurement(FakeInception(), SIZE, "generation", reference)
    for _ in range(2):
        for index in range(3):
            measurement.update(random_images(4, 0)[:1].repeat(4, 1, 1, 1), torch.arange(4 * index, 4 * index + 4))
        measurement.compute()
        measurement.reset()
    told = [str(warning.message) for warning in recwarn if "says little" in str(warning.message)]
    assert told == ["what is measured says little: all 12 images are the same image; sample or copy them again"]
    measurement.update(random_images(4, 0), torch.arange(4))
    measurement.compute()
    assert len([warning for warning in recwarn if "says little" in str(warning.message)]) == 1


class ByClass(nn.Module):
    """An extractor that reads the class off a corner, and is not quite sure."""

    name = "by-class"

    def forward(self, images: Tensor) -> Features:
        logits = (
            4.0 * nn.functional.one_hot(images[:, 0, 0, 0].long(), 8).float() + images[:, :, 1, 1].mean(1, True) / 255
        )
        return Features(images[:, :, 0].flatten(1), logits=logits + torch.eye(8)[images[:, 1, 1, 1].long() % 8])


def test_images_that_are_sorted_by_class_have_the_inception_score_of_a_random_order() -> None:
    batch = random_images(400, 1)
    batch[:, 0, 0, 0] = torch.arange(8).repeat_interleave(50)
    order = torch.randperm(400, generator=torch.Generator().manual_seed(5))
    found = {}
    for name, some in (("sorted", batch), ("random", batch[order])):
        measurement = Measurement(ByClass(), SIZE, "generation")
        measurement.update(batch, real=True)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            found[name] = measured(measurement, some)["inception_score_by-class"]
        sorted_images = [each for each in seen if "seem to be sorted by class" in str(each.message)]
        assert len(sorted_images) == (name == "sorted")
    assert found["sorted"] == pytest.approx(found["random"], rel=0.03)
    alone = InceptionScore(ByClass(), SIZE)
    alone.update(batch)
    assert alone.compute().mean < 0.5 * found["random"]  # what ADM's evaluation gives


def test_fewer_images_than_features_are_warned_of(reference: Reference) -> None:
    measurement = Measurement(FakeInception(), SIZE, "generation", reference)
    with pytest.warns(UserWarning, match="12 images are fewer than the 16 features of inception, which makes FID"):
        measured(measurement, random_images(12, 1))
