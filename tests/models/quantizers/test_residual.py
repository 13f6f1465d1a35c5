"""Residual quantisation around each quantiser."""

from typing import Any

import pytest
import torch

from llamagen.models.quantizer import Quantizer
from llamagen.models.quantizers import FSQ, IBQ, LFQ, EMAVectorQuantizer, Residual, SimVQ
from llamagen.models.vector_quantizer import VectorQuantizer

KINDS: dict[type[Quantizer], dict[str, Any]] = {
    FSQ: {"levels": [4, 4, 3]},
    LFQ: {"bits": 4},
    IBQ: {"codebook_size": 16, "codebook_dim": 4},
    SimVQ: {"codebook_size": 16, "codebook_dim": 4},
    VectorQuantizer: {"codebook_size": 16, "codebook_dim": 4},
    EMAVectorQuantizer: {"codebook_size": 16, "codebook_dim": 4},
}


def residual_of(kind: type[Quantizer], depth: int) -> Residual:
    torch.manual_seed(0)
    path = f"{kind.__module__}.{kind.__name__}"
    return Residual(path, KINDS[kind], depth)


@pytest.mark.parametrize("kind", KINDS)
def test_the_quantised_latent_is_the_sum_of_the_levels_of_its_code(kind: type[Quantizer]) -> None:
    quantizer = residual_of(kind, 3)
    first, *others = quantizer.levels
    assert quantizer.size == first.size**3
    encoding = quantizer(torch.randn(2, quantizer.dim, 3, 3))
    torch.testing.assert_close(quantizer.lookup(encoding.codes), encoding.quantized, rtol=1e-5, atol=1e-6)
    digits = [encoding.codes // first.size**place % first.size for place in (2, 1, 0)]
    total, scale = first.lookup(digits[0]), torch.ones(())
    for level, codes in zip(others, digits[1:], strict=True):
        scale = scale * level.residual_scale
        total = total + scale * level.lookup(codes)
    torch.testing.assert_close(total, encoding.quantized, rtol=1e-5, atol=1e-6)
    assert tuple(encoding.losses) == quantizer.loss_names


@pytest.mark.parametrize("kind", [FSQ, LFQ, VectorQuantizer])
def test_another_level_reduces_the_error(kind: type[Quantizer]) -> None:
    quantizer = residual_of(kind, 3)
    encoding = quantizer(torch.randn(8, quantizer.dim, 4, 4))
    first, size = quantizer.levels[0], quantizer.levels[0].size
    total, scale, errors = torch.zeros(()), torch.ones(()), []
    for place, level in zip((2, 1, 0), quantizer.levels, strict=True):
        scale = scale * (1.0 if level is first else level.residual_scale)
        total = total + scale * level.lookup(encoding.codes // size**place % size)
        errors.append((total - encoding.latent).square().mean())
    assert errors[1] < 0.7 * errors[0]
    assert errors[2] < 0.7 * errors[1]


@pytest.mark.parametrize("kind", [FSQ, LFQ, SimVQ, VectorQuantizer])
def test_the_gradient_passes_straight_through_once(kind: type[Quantizer]) -> None:
    quantizer = residual_of(kind, 3)
    latent = torch.randn(2, quantizer.dim, 3, 3, requires_grad=True)
    upstream = torch.randn(2, quantizer.dim, 3, 3)
    encoding = quantizer(latent)
    found = torch.autograd.grad(encoding.quantized, latent, upstream, retain_graph=True)[0]
    torch.testing.assert_close(found, torch.autograd.grad(encoding.latent, latent, upstream)[0])


def test_losses_are_means_over_the_levels_and_reach_all_of_them() -> None:
    quantizer = residual_of(IBQ, 2)
    encoding = quantizer(torch.randn(2, 4, 3, 3))
    (encoding.quantized.sum() + sum(encoding.losses.values())).backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in quantizer.parameters())
    first, second = quantizer.levels
    alone = first(encoding.latent)
    rest = second((encoding.latent - alone.quantized) / 0.5)
    torch.testing.assert_close(encoding.losses["index"], (alone.losses["index"] + rest.losses["index"]) / 2)


@pytest.mark.parametrize("kind", KINDS)
def test_a_latent_whose_code_is_meaningless_is_reported(kind: type[Quantizer]) -> None:
    quantizer = residual_of(kind, 3)
    latent = torch.randn(2, quantizer.dim, 3, 3)
    assert not any(quantizer.broken_parts(quantizer(latent)).values())
    on_sphere = kind in (IBQ, VectorQuantizer, EMAVectorQuantizer)  # a norm that overflows has no direction
    for value in (torch.inf, torch.nan, *[1e30] * on_sphere):
        broken = latent.clone()
        broken[1, :, 2, 0] = value
        assert quantizer.broken_parts(quantizer(broken))["the encoder's latent"], value


@pytest.mark.parametrize(("level", "part"), [(0, "the codebook's entry"), (1, "the quantised latent")])
def test_broken_codes_of_each_level_are_reported(level: int, part: str) -> None:
    quantizer = residual_of(VectorQuantizer, 2)
    with torch.no_grad():
        quantizer.levels[level].get_parameter("embedding.weight").fill_(torch.nan)
    assert quantizer.broken_parts(quantizer(torch.randn(2, 4, 3, 3)))[part]


def test_mistakes_are_errors_of_one_line() -> None:
    for arguments, phrase in (
        (("llamagen.models.quantizers.LFQ", {"bits": 4}, 1), "depth of Residual is 1"),
        (("LFQ", {"bits": 4}, 2), "level of Residual: .*class_path is 'LFQ'"),
        (("llamagen.models.quantizers.LFQ", [4], 2), "level of Residual: .*init_args is"),
    ):
        with pytest.raises(ValueError, match=phrase) as error:
            Residual(*arguments)  # type: ignore[arg-type]
        assert "\n" not in str(error.value)
