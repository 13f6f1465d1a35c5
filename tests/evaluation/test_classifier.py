"""Training the small classifier writes a file that recognises digits, or none."""

from pathlib import Path

import pytest
import torch

from datamodules.datasets.images import scale
from datamodules.digits import DigitsDataModule, write_digits
from evaluation import classifier as module
from evaluation.classifier import train_classifier
from llamagen.metrics import extract
from llamagen.metrics.classifier import Classifier, read_classifier
from tests.datamodules.shard_files import assert_one_line, grey_image, write_shards

OPTIONS = {"image_size": 8, "width": 8, "batch_size": 32, "lr": 1e-2}


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "digits"
    write_digits(root)
    return root


def train(data: Path, out: Path, name: str = "digits-classifier", epochs: int = 1, **options: float) -> float:
    return train_classifier(str(data), out, name, epochs=epochs, **{**OPTIONS, **options})  # type: ignore[arg-type]


def grey_set(root: Path, classes: tuple[list[str], list[str]]) -> Path:
    """Shards without meta.json, with a class for each image or none."""
    for split, labels in zip(("train", "val"), classes, strict=True):
        samples = [
            (f"{number:03d}", {"png": grey_image(10 * number, 8), **({"cls": label.encode()} if label else {})})
            for number, label in enumerate(labels)
        ]
        write_shards(root / split, samples, per_shard=8)
    return root


def test_recognises_digits_after_an_epoch_and_stores_its_accuracy(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "folder" / "digits.safetensors"
    accuracy = train(digits, out, image_size=16, width=16)
    assert accuracy > 0.8
    assert f"{out}: accuracy {accuracy:.1%} on the validation images" in capsys.readouterr().out
    facts, _ = read_classifier(out)
    assert facts == {
        **{"name": "digits-classifier", "num_classes": 10, "image_size": 16, "width": 16},
        **{"accuracy": accuracy, "epochs": 1, "seed": 0},
    }
    assert list(out.parent.iterdir()) == [out]

    data = DigitsDataModule(digits, image_size=16, batch_size=300)
    data.setup("validate")
    (batch,) = data.val_dataloader()
    levels = ((batch["images"] + 1) * 127.5).round().to(torch.uint8)
    logits = extract(Classifier(out), levels).logits
    assert logits is not None
    assert (logits.argmax(1) == batch["labels"]).double().mean().item() == pytest.approx(accuracy, abs=1 / 300)


def test_trains_for_five_steps(tmp_path: Path) -> None:
    data = grey_set(tmp_path / "data", (["0", "1"] * 10, ["0", "1"]))
    train(data, tmp_path / "a.safetensors", batch_size=4)
    assert (tmp_path / "a.safetensors").is_file()


def test_the_seed_determines_the_weights(tmp_path: Path) -> None:
    data = grey_set(tmp_path / "data", (["0", "1"] * 4, ["0", "1"]))
    files = [tmp_path / f"{name}.safetensors" for name in "abc"]
    for file, seed in zip(files, (3, 3, 4), strict=True):
        train(data, file, batch_size=4, seed=seed)
    weights = [read_classifier(file)[1]["head.weight"] for file in files]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize(
    ("options", "phrase"),
    [
        ({"epochs": 0}, "epochs is 0; it must be at least 1"),
        ({"name": "digits/small"}, "a classifier cannot be named 'digits/small'; give a name without slashes"),
        ({"name": " "}, "a classifier cannot be named ' '; give a name without slashes"),
        ({"width": 4}, "num_classes is 10, image_size 8 and width 4"),
        ({"batch_size": 1600}, "1497 training examples cannot be distributed .* batch_size 1600"),
    ],
)
def test_rejects_options_out_of_range(digits: Path, tmp_path: Path, options: dict[str, float], phrase: str) -> None:
    with pytest.raises(ValueError, match=phrase) as error:
        train(digits, tmp_path / "a.safetensors", **options)  # type: ignore[arg-type]
    assert_one_line(error)
    assert list(tmp_path.iterdir()) == []


def test_rejects_images_without_classes(tmp_path: Path) -> None:
    data = grey_set(tmp_path / "data", ([""] * 8, [""] * 4))
    with pytest.raises(ValueError, match="have no class; give a dataset with a class for each image") as error:
        train(data, tmp_path / "a.safetensors", batch_size=4)
    assert_one_line(error, data)
    assert list(tmp_path.iterdir()) == [data]


def test_counts_classes_that_only_training_images_have(tmp_path: Path) -> None:
    data = grey_set(tmp_path / "data", (["0", "1", "2", "6"] * 2, ["0", "1"] * 2))
    train(data, out := tmp_path / "a.safetensors", batch_size=4)
    assert read_classifier(out)[0]["num_classes"] == 7


def test_keeps_the_old_file_if_writing_fails(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(state: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half")
        raise OSError("no space left")

    out = tmp_path / "a.safetensors"
    out.write_text("before")
    monkeypatch.setattr(module, "save_file", fail)
    with pytest.raises(OSError, match="no space left"):
        train(digits, out, batch_size=512)
    assert out.read_text() == "before"
    assert list(tmp_path.iterdir()) == [out]


def test_trains_on_the_levels_that_extractors_get() -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(module._levels(scale(levels), "cpu"), levels.float())
