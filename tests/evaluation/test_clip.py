"""The CLIP model: preparation, features of images and prompts, and errors."""

import json
import pickle
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torchmetrics.multimodal import CLIPScore
from transformers import BertConfig, CLIPImageProcessorPil

from evaluation.clip import Clip, ImageScores, Preparation, short_name
from evaluation.clip_score import clip_score
from tests.evaluation.refusals import fails, refusal
from tests.evaluation.test_clip_score import write_samples
from tests.metrics.extractors import random_images
from tests.tiny_clip import SIDE, save_tiny_clip, tiny_tokenizer

PROMPTS = ["a red cat", "dogs", "", "🙂 猫", "cat", "red"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_clip(tmp_path_factory.mktemp("clips") / "tiny")


def squares(count: int) -> Tensor:
    return torch.nn.functional.interpolate(random_images(count, 0).float(), size=SIDE).to(torch.uint8)


class Adapted(torch.nn.Module):
    """A CLIP that returns tensors, as torchmetrics expects."""

    def __init__(self, clip: Clip) -> None:
        super().__init__()
        self.clip, self.config = clip.model, clip.model.config

    def get_image_features(self, *arguments: Tensor) -> Tensor:
        return self.clip.get_image_features(*arguments).pooler_output

    def get_text_features(self, *arguments: Tensor) -> Tensor:
        return self.clip.get_text_features(*arguments).pooler_output


@torch.no_grad()
def test_scores_equal_those_of_torchmetrics_for_single_images(folder: Path) -> None:
    clip, images = Clip(folder), squares(len(PROMPTS))

    def processor(text: Any = None, images: Any = None, **options: Any) -> Any:
        if text is not None:
            return clip.tokenizer(text, **options)
        return CLIPImageProcessorPil.from_pretrained(folder)(images, return_tensors="pt")

    plain = CLIPScore(lambda: (Adapted(clip), processor))
    expected = []
    for image, prompt in zip(images, PROMPTS, strict=True):
        plain.update(image, prompt)
        expected.append(plain.compute().item())
        plain.reset()
    scores = ImageScores(clip)
    scores.update(images[:4], PROMPTS[:4])
    scores.update(images[4:], PROMPTS[4:])
    assert scores.scores() == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert scores.compute().item() == pytest.approx(np.mean(expected), rel=1e-4)
    assert len({round(score, 2) for score in expected}) > 2
    scores.reset()
    scores.update(images[:1], PROMPTS[:1])
    assert scores.scores() == pytest.approx(expected[:1], rel=1e-4, abs=1e-4)
    assert scores.compute().item() == pytest.approx(expected[0], rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("size", [(32, 32), (256, 256), (20, 20), (48, 61), (131, 40)])
def test_prepares_images_like_transformers_without_torchvision(size: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": SIDE + 4}, crop_size=SIDE, do_rescale=False, do_normalize=False
    )
    expected = processor(torch.from_numpy(pixels).permute(2, 0, 1), return_tensors="pt")["pixel_values"][0]
    assert torch.equal(Preparation(SIDE + 4, SIDE)(pixels).float(), expected.float())


@pytest.mark.parametrize("size", [SIDE, {"shortest_edge": SIDE}, {"height": SIDE, "width": SIDE}])
def test_reads_all_forms_of_a_size(folder: Path, tmp_path: Path, size: Any) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    said = {"size": size, "crop_size": size, "resample": 2, "image_mean": [0.1, 0.2, 0.3], "image_std": [1, 2, 3]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(said))
    clip = Clip(tmp_path)
    assert clip.preparation == Preparation(SIDE, SIDE, 2, (0.1, 0.2, 0.3), (1, 2, 3))
    assert not torch.equal(clip(squares(1).float()), Clip(folder)(squares(1).float()))


def test_encodes_each_prompt_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = Clip(folder)
    seen: list[int] = []
    encode = clip.model.get_text_features
    monkeypatch.setattr(clip.model, "get_text_features", lambda ids, mask: seen.append(len(ids)) or encode(ids, mask))
    first = clip.encode(["cat", "red", "cat"])
    again = clip.encode(["red", "dogs"])
    assert seen == [2, 1]
    assert torch.equal(first[0], first[2])
    assert torch.equal(first[1], again[0])
    assert not torch.equal(first[0], first[1])


def test_is_frozen_and_stays_in_evaluation_mode(folder: Path) -> None:
    clip = Clip(folder).train()
    assert not any(module.training for module in clip.modules())
    assert not any(parameter.requires_grad for parameter in clip.parameters())
    assert {parameter.dtype for parameter in clip.parameters()} == {torch.float32}


def test_the_preparation_can_be_pickled() -> None:
    assert pickle.loads(pickle.dumps(Preparation(4, 3))) == Preparation(4, 3)


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("openai/clip-vit-large-patch14", "clip-vit-large-patch14"),
        ("/a/my clips/big one/", "big_one"),
        ("/a/hub/models--openai--clip-vit-base-patch16/snapshots/57c216476eef", "clip-vit-base-patch16"),
    ],
)
def test_the_name_is_the_last_part_of_the_path(name: str, short: str) -> None:
    assert short_name(name) == short


def test_names_the_extra_without_transformers(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_samples(tmp_path, ["a red cat"], each=1)
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert 'pip install -c constraints.txt -e ".[text]"' in refusal(capsys, clip_score, tmp_path, str(folder))


def test_rejects_a_missing_or_other_model(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = write_samples(tmp_path / "samples", ["a red cat"], each=1)

    def message_of(clip: Any) -> str:
        return refusal(capsys, clip_score, samples, str(clip))

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "hf download someone/no-such-clip" in message_of("someone/no-such-clip")
    assert f"{tmp_path / 'nothing'} does not exist" in message_of(tmp_path / "nothing")
    (tmp_path / "other").mkdir()
    assert "cannot be used" in message_of(tmp_path / "other")
    BertConfig().save_pretrained(tmp_path / "other")
    assert "it is a bert, not a CLIP" in message_of(tmp_path / "other")


def test_rejects_a_damaged_clip(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples, damaged = write_samples(tmp_path / "samples", ["a red cat"], each=1), tmp_path / "damaged"

    def message_of() -> str:
        return refusal(capsys, clip_score, samples, str(damaged))

    shutil.copytree(folder, damaged)
    weights = load_file(damaged / "model.safetensors")
    poisoned = {key: torch.full_like(value, float("nan")) for key, value in weights.items()}
    save_file(poisoned, damaged / "model.safetensors", {"format": "pt"})
    assert "is not finite; download it again" in message_of()
    del weights["visual_projection.weight"]
    save_file(weights, damaged / "model.safetensors", {"format": "pt"})
    assert "lacks 1 weights, such as visual_projection.weight" in message_of()
    (damaged / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-1000])
    assert "cannot be used" in fails(capsys, "clip", samples, f"--clip={damaged}")


def test_rejects_files_that_do_not_fit_the_model(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    samples, other = write_samples(tmp_path / "samples", ["a red cat"], each=1), tmp_path / "other"

    def message_of() -> str:
        return refusal(capsys, clip_score, samples, str(other))

    shutil.copytree(folder, other)
    for changed in ({"crop_size": SIDE + 8}, {"size": {"height": 40, "width": 50}}, {"size": 8}, {"do_resize": False}):
        said = json.loads((folder / "preprocessor_config.json").read_text())
        (other / "preprocessor_config.json").write_text(json.dumps(said | changed))
        assert f"does not resize the shorter side and cut out {SIDE} × {SIDE} pixels" in message_of()
    shutil.copy(folder / "preprocessor_config.json", other)
    tiny_tokenizer(extra=("red cat",)).save_pretrained(other)
    assert "its tokenizer does not end texts with token" in message_of()
    shutil.rmtree(other)
    save_tiny_clip(other, old_end=True)
    tiny_tokenizer(extra=("red cat",)).save_pretrained(other)
    assert "its tokenizer has a token" in message_of()
