"""Models and losses on a GPU, in float32 and under autocast, agree with the CPU in float32."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from llamagen.losses import linear_cross_entropy, linear_token_nll
from llamagen.models.gpt import GPT
from tests.golden import integer_input, normal_input
from tests.small_models import (
    GPT_VARIANTS,
    HEAD_VARIANTS,
    caption_lengths_for,
    codes_for,
    condition_for,
    images_for,
    small_gpt,
    small_vqgan,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}
"""Largest size of the difference over the size of the exact values."""
VARIANTS = {**GPT_VARIANTS, **HEAD_VARIANTS}


def difference(found: Tensor, exact: Tensor) -> float:
    return float((found.detach().double().cpu() - exact.detach().double()).norm() / exact.detach().double().norm())


def forward(gpt: GPT, device: str, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """Logits of a batch, and the gradients of all weights."""
    gpt = gpt.to(device)
    lengths = caption_lengths_for(gpt, 6)
    lengths = None if lengths is None else lengths.to(device)
    codes, condition = codes_for(gpt, 6, 16).to(device), condition_for(gpt, 6).to(device)
    with torch.autocast(device, dtype, enabled=dtype is not torch.float32):
        logits = gpt(codes[:, :-1], condition, caption_lengths=lengths)
    F.cross_entropy(logits.float().flatten(0, 1), codes.flatten()).backward()
    return logits, [parameter.grad for parameter in gpt.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_gradients_of_a_gpt(variant: str, dtype: torch.dtype) -> None:
    exact, exact_gradients = forward(small_gpt(**VARIANTS[variant]), "cpu", torch.float32)
    found, gradients = forward(small_gpt(**VARIANTS[variant]), "cuda", dtype)
    assert difference(found, exact) < TOLERANCE[dtype]
    assert len(gradients) == len(exact_gradients)
    total, exact_total = (torch.cat([g.flatten().cpu() for g in each]) for each in (gradients, exact_gradients))
    assert difference(total, exact_total) < 2 * TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_codes_and_pixels_of_a_tokenizer(dtype: torch.dtype) -> None:
    images = images_for(4, 32, 32)
    cpu, gpu = small_vqgan(), small_vqgan().to("cuda", memory_format=torch.channels_last)
    with torch.no_grad():
        codes = cpu.encode(images).codes
        exact = cpu.decode_codes(codes)
        with torch.autocast("cuda", dtype, enabled=dtype is not torch.float32):
            found_codes = gpu.encode(images.cuda()).codes
            found = gpu.decode_codes(codes.cuda())
    # PyTorch's convolutions in float32 use TF32.
    assert difference(found, exact) < (5e-3 if dtype is torch.float32 else 5e-2)
    assert (found_codes.cpu() == codes).float().mean() > (0.97 if dtype is torch.float32 else 0.8)


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "z_loss": 1e-3}, {"max_logits": 200}], ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_the_linear_cross_entropy(dtype: torch.dtype, options: dict[str, Any]) -> None:
    hidden, weight = normal_input("gpu/hidden", (70, 32)), normal_input("gpu/weight", (50, 32)) / 4
    targets, results = integer_input("gpu/targets", 50, (70,)), []
    for device, wide in (("cpu", torch.float64), ("cuda", torch.float32)):
        leaves = [each.to(device, wide).requires_grad_() for each in (hidden, weight)]
        with torch.autocast(device, dtype, enabled=device == "cuda" and dtype is not torch.float32):
            loss, nats = linear_cross_entropy(*leaves, targets.to(device), **options)
        loss.backward()
        results.append([loss, nats, *(leaf.grad for leaf in leaves if leaf.grad is not None)])
    for exact, found in zip(*results, strict=True):
        assert difference(found, exact.cpu()) < TOLERANCE[dtype]


def test_nats_and_ranks_of_codes() -> None:
    hidden, weight = normal_input("gpu/hidden", (70, 32)), normal_input("gpu/weight", (50, 32)) / 4
    targets = integer_input("gpu/targets", 50, (70,))
    exact = linear_token_nll(hidden, weight, targets)
    found = linear_token_nll(hidden.cuda(), weight.cuda(), targets.cuda())
    torch.testing.assert_close(found.nats.cpu(), exact.nats)
    assert torch.equal(found.rank.cpu(), exact.rank)
