"""The configuration of a tokenizer is inferred from its weights."""

from typing import Any

import pytest
import torch
from torch import Tensor

from llamagen.checkpoints.weights import infer_vqgan_config
from llamagen.models.vqgan import VQGANConfig
from tests.golden import published_state_dict
from tests.small_models import small_vqgan


@pytest.mark.parametrize(
    ("name", "config"), [("VQ-16", VQGANConfig()), ("VQ-8", VQGANConfig(channel_multipliers=(1, 2, 2, 4)))]
)
def test_infers_the_configuration_of_published_tokenizers(name: str, config: VQGANConfig) -> None:
    _, entries = published_state_dict(name)
    assert infer_vqgan_config({key: torch.empty(shape, device="meta") for key, (_, shape) in entries.items()}) == config


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_res_blocks": 3, "channel_multipliers": [2], "z_channels": 8},
        {"channels": 64, "codebook_size": 5, "codebook_dim": 3},
    ],
)
def test_infers_the_configuration_of_any_tokenizer(options: dict[str, Any]) -> None:
    model = small_vqgan(**options)
    assert infer_vqgan_config(model.state_dict()) == model.config


@pytest.mark.parametrize(
    ("changes", "phrase"),
    [
        ({"encoder.conv_in.weight": None}, "encoder.conv_in.weight must have 4 dimensions"),
        ({"encoder.conv_blocks.0.res.0.conv1.weight": None}, "encoder.conv_blocks.0.res.0.conv1.weight must have 4"),
        ({"encoder.conv_out.weight": torch.zeros(3)}, "encoder.conv_out.weight must have 4 dimensions"),
        ({"quantize.embedding.weight": torch.zeros(3)}, "quantize.embedding.weight must have 2 dimensions"),
        ({"encoder.conv_in.weight": torch.zeros(24, 3, 3, 3)}, "the channels [32, 32, 64] are not multiples of 24"),
        ({"encoder.conv_in.weight": torch.zeros(0, 3, 3, 3)}, "are not multiples of 0"),
    ],
)
def test_rejects_weights_that_are_not_a_tokenizer(changes: dict[str, Tensor | None], phrase: str) -> None:
    changed = {name: value for name, value in {**small_vqgan().state_dict(), **changes}.items() if value is not None}
    with pytest.raises(ValueError, match=r"^vq\.pt: not the weights of a VQGAN") as error:
        infer_vqgan_config(changed, "vq.pt")
    assert phrase in str(error.value)
    assert "give the weights of an image tokenizer" in str(error.value)
