"""Every option of the tokenizer's training has its intended effect."""

from collections.abc import Callable
from dataclasses import fields
from functools import cache
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_modules import AdamWConfig, VQGANLossConfig, VQGANModule
from llamagen.models.discriminator import PatchGAN, StyleGAN
from tests.lightning_modules.runs import train, vqgan_module
from tests.pipeline import Pipeline
from tests.vgg16 import vgg16_state

SIZE, STEPS = 16, 2  # LPIPS needs 16 pixels; LeCAM has an effect from its second step
LOSS_CHANGES: dict[str, Any] = {
    "reconstruction": "l1",
    "reconstruction_weight": 2.0,
    "perceptual_weight": 1.0,
    "codebook_weight": 2.0,
    "commitment_weight": 0.5,
    "entropy_weight": 0.1,
    "adversarial": "non_saturating",
    "adversarial_weight": 1.0,
    "adversarial_start": 1,
    "adaptive_weight": True,
    "lecam_weight": 0.5,
}
Make = Callable[[Path], Any]
Result = tuple[dict[str, Tensor], set[str]]
OPTION_CHANGES: dict[str, Make] = {
    "discriminator": lambda vgg: StyleGAN(SIZE),
    "optimizer": lambda vgg: AdamWConfig(lr=2e-3),
    "augmentation": lambda vgg: ("color", "translation", "cutout"),
    "lpips_weights": lambda vgg: vgg,
    "revive_codes_every": lambda vgg: 1,
    "channels_last": lambda vgg: False,
    "activation_checkpointing": lambda vgg: True,
}
ELSEWHERE = {
    "net": "tests/models/test_vqgan.py",
    "loss": "here, term by term",
    "init_from": "test_vqgan_weights.py",
    "init_averaged": "test_vqgan_weights.py",
    "freeze": "test_freeze.py",
    "compile": "test_vqgan_speed.py",
}


@pytest.fixture(scope="module")
def vgg16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of VGG16's weights."""
    path = tmp_path_factory.mktemp("vgg16") / "vgg16.pth"
    torch.save(vgg16_state(), path)
    return path


def run(pipeline: Pipeline, folder: Path, options: dict[str, Any], **loss: Any) -> Result:
    """Weights after a few steps, and names of logged values."""
    module = vqgan_module(options=options, **{"adversarial_start": 0, **loss})
    train(module, pipeline, folder, max_steps=STEPS, val_check_interval=STEPS, image_size=SIZE)
    return {name: value.clone() for name, value in module.state_dict().items()}, set(module.trainer.callback_metrics)


@pytest.fixture(scope="module")
def usual(pipeline: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """Result of the unchanged options."""
    return run(pipeline, tmp_path_factory.mktemp("usual"), {})


@pytest.fixture(scope="module")
def of_loss(pipeline: Pipeline, vgg16: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Any], Result]:
    """Result with another value of one option of the loss; each is computed once."""

    @cache
    def result(name: str, value: Any) -> Result:
        options = {"lpips_weights": vgg16} if name == "perceptual_weight" else {}
        return run(pipeline, tmp_path_factory.mktemp("loss"), options, **{name: value})

    return result


def differ(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() != other.keys() or any(
        not torch.allclose(one[name].float(), other[name].float(), rtol=1e-3, atol=1e-5) for name in one
    )


def test_every_option_has_a_changed_value() -> None:
    assert set(LOSS_CHANGES) == {field.name for field in fields(VQGANLossConfig)}
    assert set(OPTION_CHANGES) | set(ELSEWHERE) == set(signature(VQGANModule).parameters)


def test_equal_options_give_equal_weights(usual: Result, pipeline: Pipeline, tmp_path: Path) -> None:
    weights, logged = run(pipeline, tmp_path, {})
    assert all(torch.equal(weights[name], value) for name, value in usual[0].items())
    assert logged == usual[1]


@pytest.mark.parametrize("name", LOSS_CHANGES)
def test_every_option_of_the_loss_changes_the_result(
    name: str, usual: Result, of_loss: Callable[[str, Any], Result]
) -> None:
    weights, logged = of_loss(name, LOSS_CHANGES[name])
    assert differ(weights, usual[0])
    added = {
        "perceptual_weight": {"train/perceptual", "val/lpips"},
        "entropy_weight": {"train/entropy", "val/entropy"},
        "adaptive_weight": {"train/adaptive_weight"},
        "lecam_weight": {"train/lecam"},
    }
    assert logged - usual[1] == added.get(name, set())


def test_adversarial_losses_differ(usual: Result, of_loss: Callable[[str, Any], Result]) -> None:
    vanilla, non_saturating = (of_loss("adversarial", name)[0] for name in ("vanilla", "non_saturating"))
    assert differ(vanilla, usual[0])
    assert differ(non_saturating, usual[0])
    assert differ(vanilla, non_saturating)


@pytest.mark.parametrize("name", ["discriminator", "optimizer", "augmentation", "revive_codes_every"])
def test_an_option_changes_the_result(
    name: str, usual: Result, vgg16: Path, pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llamagen.models.discriminator.STYLEGAN_WIDTHS", {4: 8, 8: 8, 16: 8})  # 20 million weights less
    assert differ(run(pipeline, tmp_path, {name: OPTION_CHANGES[name](vgg16)})[0], usual[0])


def test_lpips_weights_only_add_a_metric(usual: Result, vgg16: Path, pipeline: Pipeline, tmp_path: Path) -> None:
    weights, logged = run(pipeline, tmp_path, {"lpips_weights": vgg16})
    assert logged - usual[1] == {"val/lpips"}
    assert not differ(weights, usual[0])


@pytest.mark.parametrize("name", ["color", "translation", "cutout"])
def test_every_augmentation_changes_the_result(name: str, usual: Result, pipeline: Pipeline, tmp_path: Path) -> None:
    assert differ(run(pipeline, tmp_path, {"augmentation": (name,)})[0], usual[0])


def test_only_the_discriminator_gets_augmented_images(usual: Result, pipeline: Pipeline, tmp_path: Path) -> None:
    # Before the start of the discriminator nothing is augmented.
    late = [
        run(pipeline, tmp_path / str(len(policy)), {"augmentation": policy}, adversarial_start=9)[0]
        for policy in ((), ("color", "cutout"))
    ]
    assert all(torch.equal(late[0][name], late[1][name]) for name in late[0])


def test_another_vgg16_changes_the_result(
    of_loss: Callable[[str, Any], Result], pipeline: Pipeline, tmp_path: Path
) -> None:
    other = tmp_path / "other.pth"
    torch.save({name: value.flip(0) for name, value in vgg16_state().items()}, other)
    weights, _ = run(pipeline, tmp_path, {"lpips_weights": other}, perceptual_weight=1.0)
    assert differ(weights, of_loss("perceptual_weight", 1.0)[0])


def test_the_discriminator_has_a_default(pipeline: Pipeline) -> None:
    module = vqgan_module(options={"discriminator": None})
    assert isinstance(module.discriminator, PatchGAN)
    assert sum(parameter.numel() for parameter in module.discriminator.parameters()) == sum(
        parameter.numel() for parameter in PatchGAN(64, 3).parameters()
    )


@pytest.mark.parametrize(
    ("options", "phrase"),
    [
        ({"reconstruction": "l3"}, "reconstruction is 'l3'; choose one of l2, l1"),
        ({"adversarial": "wgan"}, "adversarial is 'wgan'; choose one of hinge, vanilla, non_saturating"),
        ({"lecam_weight": -1.0}, "lecam_weight is -1.0; it must be at least 0"),
        ({"perceptual_weight": float("nan")}, "perceptual_weight is nan; it must be at least 0"),
    ],
)
def test_rejects_an_invalid_loss(options: dict[str, Any], phrase: str) -> None:
    with pytest.raises(ValueError) as error:
        VQGANLossConfig(**options)
    assert str(error.value) == phrase
