"""Metrics raise errors if features, references or results are not finite."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from evaluation.classifier import train_classifier
from evaluation.measurement import Measurement
from llamagen.metrics import FID, KID, Features, PrecisionRecall
from llamagen.metrics.classifier import ENTRY, Classifier, SmallClassifier
from llamagen.metrics.frechet import frechet_distance
from llamagen.metrics.inception_score import SplitStatistics
from tests.datamodules.shard_files import grey_image, write_shards
from tests.metrics.extractors import SIZE, Everything, Projection, random_images

NAN = float("nan")


def test_notices_a_broken_extractor_at_construction_and_in_each_batch() -> None:
    extractor = Projection()
    metric, measurement = FID(extractor, SIZE), Measurement(Everything(), SIZE, "generation")
    with torch.no_grad():
        extractor.linear.weight[0, 0] = NAN
        measurement.extractor.linear.bias[2] = NAN  # type: ignore[union-attr,operator,index]
    message = (
        r"^the pool features of the extractor Projection are not finite \(precision float32\): weight linear\.weight"
    )
    for make in (lambda: metric.update(random_images(3, 0)), lambda: KID(extractor, SIZE)):
        with pytest.raises(FloatingPointError, match=message):
            make()
    with pytest.raises(FloatingPointError, match=r"weight linear\.bias is not finite"):
        measurement.update(random_images(3, 0))


def test_names_an_image_that_overflows() -> None:
    class Squares(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.flatten(1)[:, :4].mul(1e30).square()

    images = torch.zeros(4, 3, SIZE, SIZE, dtype=torch.uint8)
    images[2, 0, 0, 0] = 200
    with pytest.raises(FloatingPointError, match=r"in 1 of 4 examples \(first: number 2\)"):
        FID(Squares(), SIZE).update(images)


def test_rejects_references_that_are_not_finite() -> None:
    mean, covariance = torch.zeros(16), torch.eye(16)
    rows: Any = torch.zeros(3, 16).index_fill(0, torch.tensor(1), NAN)
    for bad in ((mean * NAN, covariance), (mean, covariance / 0)):
        with pytest.raises(ValueError, match="of the reference are not finite; get or make it again"):
            FID(Projection(), SIZE, bad)
    for metric in (KID, PrecisionRecall):
        with pytest.raises(ValueError, match="the reference has features that are not finite"):
            metric(Projection(), SIZE, rows)
    with pytest.raises(FloatingPointError, match=r"the covariance of features is not finite \(precision float64\)"):
        frechet_distance(mean, covariance / 0, mean, covariance)


def test_raises_for_a_result_that_is_not_finite() -> None:
    measurement = Measurement(Projection(), SIZE, "generation", name="real")
    for real in (True, False):
        measurement.add(Features(torch.full((3, 16), 3e38) * torch.rand(3, 1)), real=real)
    broken = SplitStatistics(torch.tensor(NAN), torch.tensor(0.0))
    measurement.metrics["kid"].compute = lambda: broken  # type: ignore[method-assign]
    with pytest.raises(FloatingPointError, match=r"^gkid_Projection/real is nan \(precision float64\)"):
        measurement.compute()


def test_does_not_load_a_classifier_with_a_broken_weight(tmp_path: Path) -> None:
    file, small = tmp_path / "a.safetensors", SmallClassifier(3, 8, 8)
    facts = '{"name": "a", "num_classes": 3, "image_size": 8, "width": 8}'
    save_file(small.state_dict(), file, {ENTRY: facts})
    Classifier(file)
    save_file({**load_file(file), "head.bias": torch.full((3,), NAN)}, file, {ENTRY: facts})
    with pytest.raises(ValueError, match=r"is damaged: its weight head\.bias is not finite; train it again"):
        Classifier(file)


def test_a_diverging_classifier_leaves_no_file(tmp_path: Path) -> None:
    for split in ("train", "val"):
        samples = [(str(i), {"png": grey_image(i * 9, 8), "cls": str(i % 2).encode()}) for i in range(8)]
        write_shards(tmp_path / "data" / split, samples, per_shard=8)
    out = tmp_path / "a.safetensors"
    options: dict[str, Any] = {"image_size": 8, "width": 8, "batch_size": 4, "epochs": 4, "lr": 1e30}
    with pytest.raises(FloatingPointError, match=r"^the loss is not finite at step \d of 8 .* smaller lr than 1e\+30"):
        train_classifier(str(tmp_path / "data"), out, "small", **options)
    assert not out.exists()
