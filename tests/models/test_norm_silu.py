"""The fused GroupNorm and SiLU matches PyTorch within the precision of bfloat16."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llamagen.models import norm_silu as module
from llamagen.models.norm_silu import norm_silu
from tests.golden import normal_input


def layer(channels: int, groups: int = 4) -> nn.GroupNorm:
    norm = nn.GroupNorm(groups, channels, eps=1e-6)
    with torch.no_grad():
        norm.weight.copy_(1 + 0.3 * normal_input("norm/weight", (channels,)))
        norm.bias.copy_(normal_input("norm/bias", (channels,)))
    return norm


def random_images(shape: tuple[int, ...], mean: float) -> Tensor:
    x = (normal_input("norm/x", shape) + mean).bfloat16().to(memory_format=torch.channels_last)
    return x.requires_grad_()


def outcome(norm: nn.GroupNorm, x: Tensor, by_pytorch: bool = False) -> list[Tensor]:
    """Output and gradients of input, weight and bias."""
    norm.zero_grad()
    x = x.detach().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=x.dtype == torch.bfloat16):
        y = F.silu(norm(x)) if by_pytorch else norm_silu(norm, x)
    y.backward(normal_input("norm/gradient", tuple(x.shape)).to(x.dtype))
    assert x.grad is not None
    assert norm.weight.grad is not None
    assert norm.bias.grad is not None
    return [y.detach(), x.grad, norm.weight.grad.clone(), norm.bias.grad.clone()]


def error(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("block", [1, 1 << 21])
@pytest.mark.parametrize("mean", [0.0, 3.0, 30.0])
@pytest.mark.parametrize("shape", [(3, 8, 6, 5), (2, 64, 16, 16)])
def test_is_as_accurate_as_pytorch_in_bfloat16(
    shape: tuple[int, ...], mean: float, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BLOCK", block)
    norm, x = layer(shape[1]), random_images(shape, mean)
    exact = outcome(layer(shape[1]).double(), x.double(), by_pytorch=True)
    native = outcome(norm, x.contiguous(), by_pytorch=True)
    for found, reference, expected in zip(outcome(norm, x), native, exact, strict=True):
        assert error(found, expected) < max(2.5 * error(reference, expected), 6e-3)


def test_keeps_memory_format_and_dtype() -> None:
    y, x_gradient, *_ = outcome(layer(8), random_images((2, 8, 4, 4), 0.0))
    for each in (y, x_gradient):
        assert each.dtype == torch.bfloat16
        assert each.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_uses_pytorchs_kernel_where_it_is_fast(
    dtype: torch.dtype, memory_format: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[int] = []
    original = module._NormSiLU.apply
    monkeypatch.setattr(module._NormSiLU, "apply", lambda *a: used.append(1) or original(*a))
    x: Any = random_images((2, 8, 4, 4), 0.0).to(dtype).contiguous(memory_format=memory_format)
    outcome(layer(8), x)
    assert bool(used) == (dtype == torch.bfloat16 and memory_format == torch.channels_last)


def test_the_backward_pass_can_be_repeated() -> None:
    norm, x = layer(8), random_images((2, 8, 4, 4), 1.0)
    y = norm_silu(norm, x)
    first, second = (torch.autograd.grad(y.float().square().sum(), x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
