"""The small classifier: its features and its file."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from llamagen.metrics import FID, InceptionScore
from llamagen.metrics.classifier import ENTRY, Classifier, SmallClassifier, read_classifier
from llamagen.metrics.features import extract, extractor_name
from tests.datamodules.shard_files import assert_one_line
from tests.metrics.extractors import SIZE, random_images

FACTS = {"name": "digits-classifier", "num_classes": 5, "image_size": SIZE, "width": 8, "accuracy": 0.5}


def small(width: int = 8) -> SmallClassifier:
    """A classifier whose BatchNorm has statistics."""
    torch.manual_seed(1)
    classifier = SmallClassifier(5, SIZE, width)
    classifier(random_images(20, 1).float())
    return classifier.eval()


def write(path: Path, classifier: nn.Module, **facts: Any) -> Path:
    save_file(classifier.state_dict(), path, metadata={ENTRY: json.dumps({**FACTS, **facts})})
    return path


@pytest.mark.parametrize(("size", "width", "classes"), [(8, 8, 2), (12, 16, 10), (32, 32, 3)])
def test_provides_all_features(size: int, width: int, classes: int) -> None:
    features = SmallClassifier(classes, size, width).eval()(torch.zeros(3, 3, size, size))
    shapes = [tuple(part.shape) for part in features if part is not None]
    assert shapes == [(3, 4 * width), (3, (size // 2) ** 2 * 7), (3, classes), (3, classes)]


def test_spatial_features_keep_the_layout() -> None:
    images = torch.full((2, 3, 32, 32), 128.0)
    images[0, :, 8:12, 12:16] = images[1, :, 20:24, 12:16] = 255.0
    places = SmallClassifier(5, 32, 8).eval()(images).spatial.view(2, 16, 16, 7)
    torch.testing.assert_close(places[0, 3:7], places[1, 9:13])
    assert (places[0] - places[1]).abs().max() > 1e-3


@pytest.mark.parametrize("options", [(1, 8, 8), (5, 4, 8), (5, 10, 8), (5, 8, 7)])
def test_rejects_arguments_out_of_range(options: tuple[int, int, int]) -> None:
    classes, size, width = options
    with pytest.raises(ValueError, match=f"num_classes is {classes}, image_size {size} and width {width}; there must"):
        SmallClassifier(*options)


def test_rejects_images_of_another_size(tmp_path: Path) -> None:
    classifier = Classifier(write(tmp_path / "a.safetensors", small()))
    with pytest.raises(ValueError, match="images are 12 × 8 pixels, but the classifier was trained on 8 × 8; train"):
        classifier(torch.zeros(2, 3, 12, 8))
    with pytest.raises(ValueError, match="images are 16 × 16 pixels, but the classifier was trained on 8 × 8"):
        FID(classifier, 16)


def test_loads_what_was_saved(tmp_path: Path) -> None:
    original = small()
    path = write(tmp_path / "a.safetensors", original)
    state = torch.random.get_rng_state()
    classifier = Classifier(path)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert classifier.name == extractor_name(classifier) == "digits-classifier"
    assert read_classifier(path)[0] == FACTS
    batch = random_images(6, 2)
    for found, expected in zip(extract(classifier, batch), extract(original, batch), strict=True):
        assert isinstance(found, Tensor)
        assert torch.equal(found, expected)
    assert not any(parameter.requires_grad for parameter in classifier.parameters())


def test_stays_in_evaluation_mode(tmp_path: Path) -> None:
    classifier = Classifier(write(tmp_path / "a.safetensors", small()))
    batch, before = random_images(6, 2), copy.deepcopy(classifier.state_dict())
    expected = extract(classifier, batch).pool
    nn.ModuleList([classifier]).train()
    assert not any(module.training for module in classifier.modules())
    assert torch.equal(extract(classifier, batch).pool, expected)
    assert all(torch.equal(value, before[name]) for name, value in classifier.state_dict().items())


def test_metric_names_include_the_classifier(tmp_path: Path) -> None:
    classifier = Classifier(str(write(tmp_path / "a.safetensors", small())))
    metric = InceptionScore(classifier, SIZE, splits=2)
    metric.update(random_images(6, 2))
    assert metric.name == "inception_score_digits-classifier"
    assert 1 <= metric.compute().mean.item() <= 5


def test_rejects_a_missing_file_in_one_line(tmp_path: Path) -> None:
    for path in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(ValueError, match="there is no classifier") as error:
            Classifier(path)
        assert_one_line(error, path, "train one with python -m evaluation classifier")


def damaged(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


WRONG = {
    "no safetensors": lambda path: path.write_text("nothing"),
    "empty": lambda path: path.write_bytes(b""),
    "cut off": damaged,
    "other weights": lambda path: save_file({"weight": torch.zeros(3)}, path),
    "other metadata": lambda path: save_file(small().state_dict(), path, metadata={"format": "pt"}),
    "metadata that is no JSON": lambda path: save_file(small().state_dict(), path, metadata={ENTRY: "{"}),
    "metadata that is a list": lambda path: save_file(small().state_dict(), path, metadata={ENTRY: "[]"}),
    "facts that are missing": lambda path: save_file(small().state_dict(), path, metadata={ENTRY: "{}"}),
    "a width that is text": lambda path: write(path, small(), width="8"),
    "another width": lambda path: write(path, small(16)),
    "layers that are missing": lambda path: write(path, nn.Linear(2, 2)),
}


@pytest.mark.parametrize("kind", WRONG)
def test_rejects_a_wrong_or_damaged_file_in_one_line(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / "a.safetensors", small())
    WRONG[kind](path)
    with pytest.raises(ValueError, match="is not a classifier") as error:
        Classifier(path)
    assert_one_line(error, path, "train one with python -m evaluation classifier")
