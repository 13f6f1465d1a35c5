"""The tokenizer encodes images of any valid size to a grid of codes and decodes them."""

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from llamagen.models.vqgan import VQGAN, AttentionBlock, Downsample, VQGANConfig, group_norm, to_uint8
from tests.golden import fill, normal_input
from tests.small_models import SMALL_VQGAN, images_for, small_vqgan

CHANGES: dict[str, Any] = {
    "channels": 64,
    "channel_multipliers": (1, 2, 2),
    "num_res_blocks": 2,
    "z_channels": 8,
    "codebook_size": 65,
    "codebook_dim": 6,
    "dropout": 0.5,
    "quantizer": {"class_path": "tests.rounding.Rounding", "init_args": {"levels": 3}},
}


@pytest.mark.parametrize("size", [(32, 32), (16, 48), (64, 16)])
@pytest.mark.parametrize("multipliers", [(1,), (1, 1), (2, 1), (1, 2, 1), (1, 1, 1, 1, 2)])
def test_each_level_after_the_first_halves_the_grid(multipliers: tuple[int, ...], size: tuple[int, int]) -> None:
    vqgan = small_vqgan(channel_multipliers=multipliers)
    factor = vqgan.config.downsampling
    assert factor == 2 ** (len(multipliers) - 1)
    with torch.no_grad():
        reconstruction, encoding = vqgan(images_for(2, *size))
    grid = (size[0] // factor, size[1] // factor)
    assert reconstruction.shape == (2, 3, *size)
    assert encoding.codes.shape == (2, *grid)
    assert encoding.quantized.shape == encoding.latent.shape == (2, 4, *grid)
    assert 0 <= int(encoding.codes.min()) <= int(encoding.codes.max()) < 64


@pytest.mark.parametrize("size", [(16, 16), (8, 20)])
def test_decoding_the_codes_gives_the_reconstruction(size: tuple[int, int]) -> None:
    vqgan, images = small_vqgan(), images_for(2, *size)
    with torch.no_grad():
        reconstruction, encoding = vqgan(images)
        assert torch.equal(vqgan.encode(images).codes, encoding.codes)
        torch.testing.assert_close(vqgan.decode_codes(encoding.codes), reconstruction, atol=1e-5, rtol=0)
        torch.testing.assert_close(vqgan.decode(encoding.quantized), reconstruction, atol=0, rtol=0)
        assert not torch.allclose(vqgan.decode_codes((encoding.codes + 1) % 64), reconstruction, atol=1e-2)


def test_attention_spans_all_positions_of_a_rectangular_map() -> None:
    block, x = fill(AttentionBlock(32)), normal_input("vqgan/map", (1, 32, 2, 3))
    normalized = F.group_norm(x, 32, block.norm.weight, block.norm.bias, eps=1e-6)
    with torch.no_grad():
        q, k, v = (conv(normalized) for conv in (block.q, block.k, block.v))
        expected = torch.empty_like(x)
        for row in range(2):
            for column in range(3):
                scores = (q[0, :, row, column, None, None] * k[0]).sum(0) / 32**0.5
                weights = scores.exp() / scores.exp().sum()
                expected[0, :, row, column] = (weights * v[0]).sum((1, 2))
        torch.testing.assert_close(block(x), x + block.proj_out(expected))


def test_group_norm_keeps_the_published_epsilon_for_small_activations() -> None:
    x = 1e-3 * torch.tensor([-1.0, 1.0]).repeat(32).view(1, 64, 1, 1)  # a group of two channels has the variance 1e-6
    found = group_norm(64)(x)
    torch.testing.assert_close(found, x.sign() / 2**0.5)


def test_downsampling_pads_right_and_bottom_only() -> None:
    step, x = fill(Downsample(1)), normal_input("vqgan/down", (1, 1, 4, 6))
    with torch.no_grad():
        found = step(x)
        padded = torch.zeros(1, 1, 5, 7)
        padded[..., :4, :6] = x
        for row in range(2):
            for column in range(3):
                patch = padded[0, 0, 2 * row : 2 * row + 3, 2 * column : 2 * column + 3]
                expected = (patch * step.get_parameter("conv.weight")).sum() + step.get_parameter("conv.bias")[0]
                torch.testing.assert_close(found[0, 0, row, column], expected)


def test_an_image_does_not_depend_on_the_rest_of_the_batch() -> None:
    vqgan, images = small_vqgan(), images_for(4, 16, 16)
    with torch.no_grad():
        together, alone = vqgan(images), vqgan(images[2:3])
    assert torch.equal(alone.encoding.codes, together.encoding.codes[2:3])
    torch.testing.assert_close(alone.reconstruction, together.reconstruction[2:3], atol=1e-5, rtol=0)


def test_the_reconstruction_gives_gradients_to_the_encoder_but_not_to_the_codebook() -> None:
    vqgan = small_vqgan()
    vqgan(images_for(2, 16, 16)).reconstruction.square().mean().backward()
    without = [name for name, weight in vqgan.named_parameters() if weight.grad is None or not weight.grad.any()]
    # A key bias adds the same value to all scores of a query, which does not change the softmax.
    assert [name for name in without if not name.endswith(".k.bias")] == ["quantize.embedding.weight"]


def test_quantised_latents_are_float32_under_autocast() -> None:
    vqgan = small_vqgan().train()
    with torch.autocast("cpu", torch.bfloat16):
        reconstruction, encoding = vqgan(images_for(2, 16, 16))
    assert reconstruction.dtype == torch.bfloat16
    assert {part.dtype for part in (encoding.quantized, encoding.latent)} == {torch.float32}
    assert vqgan.quantize.lookup(encoding.codes).dtype == torch.float32
    torch.testing.assert_close(encoding.quantized, vqgan.quantize.lookup(encoding.codes))
    reconstruction.float().mean().backward()
    assert vqgan.encoder.conv_in.weight.grad is not None


def test_a_bfloat16_tokenizer_decodes_codes() -> None:
    vqgan = small_vqgan()
    codes = torch.arange(8).view(1, 2, 4)
    with torch.no_grad():
        expected = vqgan.decode_codes(codes)
        found = vqgan.to(torch.bfloat16).decode_codes(codes)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, atol=0.2, rtol=0)


def test_last_weight_is_the_weight_of_the_output_convolution() -> None:
    decoder = small_vqgan().decoder
    assert decoder.last_weight is decoder.get_parameter("conv_out.weight")


@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 1, 16, 16), (1, 3, 18, 16), (1, 3, 16, 18), (1, 4, 16, 16)])
def test_rejects_images_of_another_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError) as error:
        small_vqgan().encode(torch.zeros(shape))
    assert str(shape) in str(error.value)
    assert "multiples of 4" in str(error.value)


@pytest.mark.parametrize("shape", [(4,), (2, 4), (1, 4, 2, 2)])
def test_rejects_codes_of_another_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError) as error:
        small_vqgan().decode_codes(torch.zeros(shape, dtype=torch.int64))
    assert str(shape) in str(error.value)


def compute(config: VQGANConfig, training: bool) -> tuple[dict[str, torch.Size], Tensor]:
    """Shapes of the state dict, and a reconstruction under a fixed seed."""
    vqgan = fill(VQGAN(config)).train(training)
    torch.manual_seed(0)
    with torch.no_grad():
        reconstruction = vqgan(images_for(2, 16, 16)).reconstruction
    return {name: value.shape for name, value in vqgan.state_dict().items()}, reconstruction


def test_every_option_has_a_changed_value() -> None:
    assert list(CHANGES) == [field.name for field in fields(VQGANConfig)]


@pytest.mark.parametrize("option", CHANGES)
def test_every_option_changes_parameters_or_outputs(option: str) -> None:
    shapes, reconstruction = compute(SMALL_VQGAN, training=True)
    changed_shapes, changed = compute(replace(SMALL_VQGAN, **{option: CHANGES[option]}), training=True)
    assert changed_shapes != shapes or not torch.equal(changed, reconstruction)


def test_dropout_is_off_in_evaluation() -> None:
    _, reconstruction = compute(SMALL_VQGAN, training=False)
    _, dropped = compute(replace(SMALL_VQGAN, dropout=0.5), training=False)
    assert torch.equal(reconstruction, dropped)


@pytest.mark.parametrize(
    ("options", "phrase"),
    [
        ({"channels": 0}, "channels is 0"),
        ({"channels": 48}, "channels is 48"),
        ({"num_res_blocks": 0}, "num_res_blocks is 0"),
        ({"z_channels": -1}, "z_channels is -1"),
        ({"codebook_size": 0}, "codebook_size is 0"),
        ({"codebook_dim": 0}, "codebook_dim is 0"),
        ({"channel_multipliers": ()}, "channel_multipliers is ()"),
        ({"channel_multipliers": [1, 0]}, "channel_multipliers is (1, 0)"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"dropout": -0.5}, "dropout is -0.5"),
    ],
    ids=str,
)
def test_rejects_invalid_options_with_name_and_value(options: dict[str, Any], phrase: str) -> None:
    with pytest.raises(ValueError) as error:
        VQGANConfig(**options)
    assert phrase in str(error.value)


def test_channel_multipliers_may_be_a_list() -> None:
    config = VQGANConfig(channel_multipliers=[1, 2, 2, 4])  # type: ignore[arg-type]
    assert config == VQGANConfig(channel_multipliers=(1, 2, 2, 4))
    assert config.widths == (128, 256, 256, 512)
    assert hash(config) == hash(VQGANConfig(channel_multipliers=(1, 2, 2, 4)))


def test_to_uint8_truncates_as_published_and_clamps() -> None:
    values = torch.tensor([-1.0, -3.0, 0.0, 1.0, 3.0, 0.01, -0.01])
    assert to_uint8(values).tolist() == [0, 0, 128, 255, 255, 129, 126]
    noise = normal_input("to_uint8", (1000,))
    expected = [int(min(max(127.5 * value + 128, 0), 255)) for value in noise.tolist()]
    assert (to_uint8(noise).int() - torch.tensor(expected)).abs().max() <= 1
    assert to_uint8(noise.bfloat16()).dtype == torch.uint8


def test_a_bfloat16_tokenizer_reconstructs() -> None:
    vqgan = small_vqgan().to(torch.bfloat16)
    assert vqgan(images_for(2, 16, 16).bfloat16()).reconstruction.dtype == torch.bfloat16


@pytest.mark.parametrize("code", [-1, 64])
def test_rejects_codes_outside_the_codebook(code: int) -> None:
    with pytest.raises(ValueError, match="do not fit a codebook of 64 entries"):
        small_vqgan().decode_codes(torch.full((1, 2, 2), code))
