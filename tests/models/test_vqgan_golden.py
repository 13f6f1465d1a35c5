"""Tokenizer and discriminator match the outputs of the published implementations."""

import pytest
import torch

from llamagen.models.discriminator import PatchGAN
from llamagen.models.vqgan import VQGAN, VQGANConfig
from tests.golden import assert_matches, fill, golden, normal_input

MULTIPLIERS = {"VQ-16": (1, 1, 2, 2, 4), "VQ-8": (1, 2, 2, 4)}


@pytest.mark.parametrize("entry", MULTIPLIERS)
def test_the_tokenizer_matches_the_published_codes_images_and_losses(entry: str) -> None:
    record = golden(entry)
    with torch.device("meta"):
        vqgan = VQGAN(VQGANConfig(channel_multipliers=MULTIPLIERS[entry]))
    fill(vqgan.to_empty(device="cpu")).eval()
    vqgan.quantize.set_loss_weights({"entropy": 0.1})
    images = normal_input(record["image"], (record["batch"], 3, record["size"], record["size"])).tanh()
    before_quantisation: list[torch.Tensor] = []
    vqgan.quant_conv.register_forward_hook(lambda _module, _inputs, output: before_quantisation.append(output))
    with torch.no_grad():
        reconstruction, encoding = vqgan(images)
    assert_matches(before_quantisation[0], record["latent"])
    assert encoding.codes.flatten().tolist() == torch.tensor(record["indices"]).flatten().tolist()
    assert_matches(encoding.quantized, record["quantized"])
    assert_matches(reconstruction, record["reconstruction"])

    losses = {
        "vq_loss": encoding.losses["codebook"],
        "commit_loss": 0.25 * encoding.losses["commitment"],
        "entropy_loss_ratio_0.1": 0.1 * encoding.losses["entropy"],
    }
    for name, loss in losses.items():
        assert loss.item() == pytest.approx(record[name], abs=1e-6 if "entropy" not in name else 1e-4), name


def test_patchgan_in_training_mode_matches_the_published_logits() -> None:
    record = golden("PatchGAN")
    images = normal_input("PatchGAN/image", (2, 3, record["size"], record["size"])).tanh()
    with torch.no_grad():
        logits = fill(PatchGAN()).train()(images)
    assert_matches(logits, record["logits_train"])
