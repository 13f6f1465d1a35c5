"""Implausible images are rejected before features are extracted, on both sides and in all forms."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from evaluation.__main__ import compare, main, reference
from evaluation.content_check import check_content, warn_of_content
from evaluation.image_sets import open_images
from tests.datamodules.shard_files import encode, write_shards
from tests.evaluation.refusals import fails, refusal
from tests.metrics.extractors import SIZE, Everything

EVERYTHING = "--features=tests.evaluation.test_content_check.Unused"


class Unused(Everything):
    """An extractor that accepts only black images, with which metrics probe it."""

    def forward(self, images: Any) -> Any:
        assert not images.any(), "features of images were extracted"
        return super().forward(images)


def noise(count: int = 20) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, SIZE, SIZE, 3), np.uint8)


def write(folder: Path, images: np.ndarray) -> None:
    folder.mkdir(parents=True)
    for number, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{number:03d}.png")


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    np.savez("good.npz", noise())
    np.savez("ones.npz", (noise() / 255).round().astype(np.uint8))
    np.savez_compressed("signed.npz", np.array([0, 1, 255], np.uint8)[noise() % 3])
    np.savez("black.npz", np.zeros_like(noise()))
    write(tmp_path / "black", np.zeros_like(noise(3)))
    write(tmp_path / "classes/a", noise(1).repeat(3, 0))
    write(tmp_path / "classes/b", noise(1).repeat(3, 0))
    dark = encode(Image.fromarray(noise(1)[0] // 255))
    write_shards(tmp_path / "shards", [(str(number), {"png": dark}) for number in range(3)])
    return tmp_path


def test_rejects_implausible_images_before_computing_or_writing(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(root.rglob("*"))
    for name, reason in (
        ("ones.npz", "multiply by 255 and round first"),
        ("signed.npz", "((x + 1) * 127.5)"),
        ("black.npz", "all 20 images are black"),
        ("black", "all 3 images are black"),
        ("classes", "all 6 images are the same image"),
        ("shards", "all 3 images are black"),
    ):
        for message in (
            refusal(capsys, compare, name, "good.npz", Unused(), report=Path("report")),
            refusal(capsys, compare, "good.npz", name, Unused()),
            refusal(capsys, reference, name, Path("new/out.npz"), features=Unused()),
        ):
            assert message.startswith(f"{name} cannot be measured: ")
            assert reason in message
    message = fails(capsys, "compare", "ones.npz", "good.npz", EVERYTHING, "--report=report")
    assert message.startswith("error: ones.npz cannot be measured: ")
    assert sorted(root.rglob("*")) == before


def test_reads_one_batch_of_ordinary_images_and_all_suspicious_ones(root: Path) -> None:
    np.savez("many.npz", noise(200))
    images = open_images("many.npz")
    check_content(images)
    assert images.content.count == 16
    late = np.zeros((200, SIZE, SIZE, 3), np.uint8)
    late[-1] = noise(1)
    np.savez("late.npz", late)
    images = open_images("late.npz")
    check_content(images)
    assert images.content.count == 200


@pytest.mark.parametrize("num_workers", [0, 1])
def test_warns_of_unusual_images(root: Path, capsys: pytest.CaptureFixture[str], num_workers: int) -> None:
    write(root / "binarised", (noise() > 127) * np.uint8(255))
    write(root / "copied", np.concatenate([noise(10), noise(10)]))
    for name, warning in (("binarised", "the only levels are 0, 255"), ("copied", "10 of 20 images are exact copies")):
        images = open_images(name)
        check_content(images)
        list(images.batches(7, num_workers=num_workers))
        with pytest.warns(UserWarning, match=f"{name}: .*{warning}"):
            warn_of_content(images)


def test_the_command_prints_the_warning_once(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez("binarised.npz", (noise() > 127) * np.uint8(255))
    main(["compare", "binarised.npz", "good.npz", "--features=tests.metrics.extractors.Everything"])
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert [line for line in warnings if "the only levels" in line] == [
        line for line in warnings if line.startswith("warning: binarised.npz: the only levels are 0, 255; ")
    ]
    assert len([line for line in warnings if "the only levels" in line]) == 1


def test_rejects_statistics_without_variance(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez("flat.npz", mu=np.zeros(2), sigma=np.zeros((2, 2)))
    message = refusal(capsys, compare, "good.npz", "flat.npz", Unused())
    assert "flat.npz is not a reference: sigma is zero everywhere" in message
