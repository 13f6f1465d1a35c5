"""Every model has the parameter count and state dict of its published checkpoint."""

from typing import Any

import pytest
import torch
from torch import nn

from llamagen.models.discriminator import PatchGAN
from llamagen.models.gpt import GPT, GPTConfig
from llamagen.models.vqgan import VQGAN, VQGANConfig
from tests.golden import published_state_dict

GPT_SIZES: dict[str, dict[str, Any]] = {
    "GPT-B c2i 256": {"n_layer": 12, "n_head": 12, "dim": 768},
    "GPT-B c2i 384": {"n_layer": 12, "n_head": 12, "dim": 768, "block_size": 576},
    "GPT-L c2i 256": {"n_layer": 24, "n_head": 16, "dim": 1024},
    "GPT-XL c2i 256": {"n_layer": 36, "n_head": 20, "dim": 1280},
    "GPT-XXL c2i 256": {"n_layer": 48, "n_head": 24, "dim": 1536},
    "GPT-XXXL c2i 256": {"n_layer": 48, "n_head": 40, "dim": 2560},
    "GPT-1B c2i 256": {"n_layer": 22, "n_head": 32, "dim": 2048},
    "GPT-3B c2i 256": {"n_layer": 24, "n_head": 32, "dim": 3200},
    "GPT-7B c2i 256": {"n_layer": 32, "n_head": 32, "dim": 4096},
    "GPT-XL t2i 256": {"n_layer": 36, "n_head": 20, "dim": 1280, "condition": "text"},
}
TOKENIZERS: dict[str, tuple[int, ...]] = {"VQ-16": (1, 1, 2, 2, 4), "VQ-8": (1, 2, 2, 4)}


def assert_published_shapes(model: nn.Module, name: str) -> None:
    """Compare the parameter count, and the name, dtype and shape of each entry, with the published ones."""
    parameters, entries = published_state_dict(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    found = {
        key: (str(value.dtype).removeprefix("torch."), tuple(value.shape)) for key, value in model.state_dict().items()
    }
    assert found == entries


@pytest.mark.parametrize("name", GPT_SIZES)
def test_gpt_has_the_published_state_dict(name: str) -> None:
    with torch.device("meta"):
        assert_published_shapes(GPT(GPTConfig(**GPT_SIZES[name])), name)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizer_has_the_published_state_dict(name: str) -> None:
    with torch.device("meta"):
        assert_published_shapes(VQGAN(VQGANConfig(channel_multipliers=TOKENIZERS[name])), name)


def test_patchgan_has_the_published_state_dict() -> None:
    with torch.device("meta"):
        assert_published_shapes(PatchGAN(), "PatchGAN")


def test_defaults_are_vq16_and_the_256_px_class_model() -> None:
    assert VQGANConfig() == VQGANConfig(channel_multipliers=TOKENIZERS["VQ-16"])
    config = GPTConfig(**GPT_SIZES["GPT-B c2i 256"])
    assert (config.block_size, config.vocab_size, config.num_classes, config.condition) == (256, 16384, 1000, "class")
    assert config.rope_condition == "zero"


@pytest.mark.parametrize("name", GPT_SIZES)
def test_ffn_dim_is_rounded_as_published(name: str) -> None:
    _, entries = published_state_dict(name)
    assert GPTConfig(**GPT_SIZES[name]).ffn_dim == entries["layers.0.feed_forward.w1.weight"][1][0]
