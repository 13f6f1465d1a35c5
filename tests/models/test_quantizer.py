"""Quantisers are built from a class path and primitive arguments; mistakes are reported in one line."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_modules import VQGANLossConfig
from lightning_modules.generator_loss import configure_quantizer_losses
from llamagen.models.quantizer import Quantized, Quantizer, build_quantizer, check_quantizer_spec
from llamagen.models.vqgan import VQGAN, VQGANConfig
from tests.golden import normal_input
from tests.rounding import Rounding
from tests.small_models import images_for, small_vqgan

ROUNDING = "tests.rounding.Rounding"


class Unfinished(Quantizer):
    """A quantiser without forward and lookup."""


class Undeclared(Rounding):
    """A quantiser that returns a loss it does not declare."""

    @property
    def loss_names(self) -> tuple[str, ...]:
        return ()


class Reserved(Rounding):
    """A quantiser whose loss has the name of another logged value."""

    @property
    def loss_names(self) -> tuple[str, ...]:
        return ("perceptual",)


def test_a_spec_gets_its_arguments_with_and_without_the_level_init_args() -> None:
    expected = {"class_path": ROUNDING, "init_args": {"levels": 5, "dim": 3}}
    for spec in (
        {"class_path": ROUNDING, "init_args": {"levels": 5, "dim": 3}},
        {"class_path": ROUNDING, "levels": 5, "dim": 3},  # as the command line gives it
        {"class_path": ROUNDING, "init_args": {"levels": 7, "dim": 3}, "levels": 5},  # which overrides a file
    ):
        assert check_quantizer_spec(spec) == expected
    assert check_quantizer_spec({"class_path": ROUNDING, "init_args": None})["init_args"] == {}


@pytest.mark.parametrize(
    ("spec", "phrase"),
    [
        ({}, "quantizer.class_path is None; give a class as package.module.Name"),
        ({"class_path": "Rounding"}, "quantizer.class_path is 'Rounding'"),
        ({"class_path": ".rounding.Rounding"}, "quantizer.class_path is '.rounding.Rounding'"),
        ({"class_path": "a.b; import os"}, "quantizer.class_path is 'a.b; import os'"),
        ({"class_path": 3}, "quantizer.class_path is 3"),
        ({"class_path": ROUNDING, "init_args": [5]}, "quantizer.init_args is [5]; give the arguments of"),
        ({"class_path": ROUNDING, "init_args": {"levels": len}}, "quantizer.init_args.levels is <built-in function"),
        ({"class_path": ROUNDING, "init_args": {"levels": [torch.ones(1)]}}, "quantizer.init_args.levels is [tensor"),
    ],
)
def test_rejects_an_invalid_spec(spec: dict[str, Any], phrase: str) -> None:
    with pytest.raises(ValueError) as error:
        VQGANConfig(quantizer=spec)
    assert phrase in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("path", "arguments", "phrase"),
    [
        ("absent.module.Name", {}, "absent.module.Name, which cannot be imported (No module named 'absent')"),
        ("tests.rounding.Absent", {}, "tests.rounding.Absent, which cannot be imported"),
        ("torch.nn.Linear", {}, "torch.nn.Linear, which is not a quantiser"),
        ("os.path.join", {}, "os.path.join, which is not a quantiser"),
        ("tests.models.test_quantizer.Unfinished", {"size": 3, "dim": 1}, "Unfinished, which is not a quantiser"),
        (ROUNDING, {"steps": 3}, "quantizer.init_args is {'steps': 3}, which tests.rounding.Rounding does not accept"),
        (ROUNDING, {"levels": "five"}, "quantizer.init_args is {'levels': 'five'}"),
        (ROUNDING, {"levels": 3, "dim": 0}, "dim of Rounding is 0; it must be at least 1"),
    ],
)
def test_rejects_a_class_or_arguments_that_do_not_make_a_quantiser(
    path: str, arguments: dict[str, Any], phrase: str
) -> None:
    with pytest.raises(ValueError) as error:
        build_quantizer({"class_path": path, "init_args": arguments})
    assert phrase in str(error.value)
    assert "\n" not in str(error.value)


def test_the_quantiser_determines_codebook_size_and_dim_of_the_configuration() -> None:
    spec = {"class_path": ROUNDING, "init_args": {"levels": 3}}
    vqgan = small_vqgan(quantizer=spec)
    assert (vqgan.config.codebook_size, vqgan.config.codebook_dim) == (9, 2)
    assert vqgan.config.quantizer == spec
    assert hash(vqgan.config) == hash(vqgan.config)
    codes = torch.arange(9).view(1, 3, 3)
    assert vqgan.decode_codes(codes).shape[0] == 1
    with pytest.raises(ValueError, match="do not fit a codebook of 9 entries"):
        vqgan.decode_codes(codes + 1)
    with pytest.raises(ValueError, match=r"shape \(B, 2, h, w\)"):
        vqgan.decode(torch.zeros(1, 4, 2, 2))


def test_rounding_gives_gradients_to_the_encoder() -> None:
    vqgan = VQGAN(small_vqgan(quantizer={"class_path": ROUNDING, "init_args": {"levels": 3}}).config)
    vqgan(images_for(2, 16, 16)).reconstruction.square().mean().backward()
    weight = vqgan.encoder.get_parameter("conv_in.weight")
    assert weight.grad is not None
    assert weight.grad.abs().max() > 0


def test_a_quantiser_without_learned_codes_has_defaults() -> None:
    quantizer: Quantizer = Rounding(levels=3)
    assert quantizer.learned_codes is None
    with pytest.raises(NotImplementedError, match="Rounding has no learned codes"):
        quantizer.move_codes(torch.tensor([1]), torch.zeros(1, 2))
    assert Quantizer.loss_names.fget is not None
    assert Quantizer.loss_names.fget(quantizer) == ()
    assert isinstance(quantizer, nn.Module)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_default_check_finds_latents_that_are_not_finite(value: float) -> None:
    quantizer = Rounding(levels=3)
    latent = normal_input("quantizer/interface", (2, 2, 3, 3))
    assert not any(quantizer.broken_parts(quantizer(latent)).values())
    broken: Tensor = latent.clone()
    broken[1, 0, 0, 0] = value
    flags = quantizer.broken_parts(Quantized(latent, torch.zeros(2, 3, 3, dtype=torch.int64), broken, {}))
    assert {name: flag.item() for name, flag in flags.items()} == {
        "the encoder's latent": True,
        "the quantised latent": False,
    }


def test_rejects_losses_that_are_not_declared() -> None:
    spec = {"class_path": "tests.models.test_quantizer.Undeclared", "init_args": {"levels": 3}}
    with pytest.raises(ValueError, match=r"returned the losses rounding, but loss_names is \(\); they must agree"):
        small_vqgan(quantizer=spec).encode(images_for(1, 16, 16))


def test_rejects_a_loss_with_the_name_of_another_logged_value() -> None:
    with pytest.raises(ValueError, match=r"Reserved\.loss_names has 'perceptual', the name of another logged value"):
        configure_quantizer_losses(Reserved(levels=3), VQGANLossConfig())
