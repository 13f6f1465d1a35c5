"""GroupNorm followed by SiLU, the pair that precedes every convolution of the tokenizer.

B batch, C channels, G groups, D = C / G, H × W positions.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BLOCK = 1 << 21
"""Numbers that the gradient works on at a time: 4 MiB, which caches hold."""


def norm_silu(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """``silu(norm(x))``, (B, C, H, W) → the same.

    On a CPU, PyTorch's gradient of GroupNorm in bfloat16 with ``channels_last`` takes as long as a convolution. There
    this function has one of its own, of passes over memory that PyTorch does fast; it also keeps one tensor less for
    the backward pass.
    """
    ours = x.device.type == "cpu" and x.dtype == torch.bfloat16 and _is_channels_last(x)
    if not ours or torch.compiler.is_compiling():
        return F.silu(norm(x))
    result: Tensor = _NormSiLU.apply(x, norm.weight, norm.bias, norm.num_groups, norm.eps)
    return result


def _is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


class _NormSiLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        batch, channels, height, width = x.shape
        y, mean, rstd = torch.native_group_norm(x, weight, bias, batch, channels, height * width, groups, eps)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        return F.silu(y, inplace=True)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        gradient = gradients[0].contiguous(memory_format=torch.channels_last)
        x_gradient = torch.empty_like(x)
        rows, of_parameters = max(1, BLOCK // x[0].numel()), []
        for start in range(0, len(x), rows):
            parts = [each[start : start + rows] for each in (gradient, x, mean, rstd, x_gradient)]
            of_parameters.append(_gradient_of_block(parts, weight.float(), bias.float()))
        of_weight, of_bias = (torch.cat(each).sum(0) for each in zip(*of_parameters, strict=True))
        return x_gradient, of_weight.to(weight.dtype), of_bias.to(bias.dtype), None, None


def _gradient_of_block(parts: list[Tensor], weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Write the gradient of ``x`` (B, C, H, W) to ``out``; return those of weight and bias by image, (B, C)."""
    gradient, x, mean, rstd, out = parts
    groups, of_group = mean.shape[1], x.shape[1] // mean.shape[1]
    mean, rstd = (each.float().repeat_interleave(of_group, dim=1) for each in (mean, rstd))  # (B, C)
    scale = rstd * weight
    # Without the mean, so that nothing large is rounded; what the rounding of the mean leaves is small.
    centred = x - _over_positions(mean, x)
    rest = mean - mean.to(x.dtype).float()
    # The output of the norm once more, and in its place the gradient that SiLU hands on to it.
    y = torch.addcmul(_over_positions(bias - rest * scale, x), centred, _over_positions(scale, x))
    y_gradient = torch.ops.aten.silu_backward.grad_input(gradient, y, grad_input=y)
    of_bias = _sum_over_positions(y_gradient)  # (B, C), as is what follows
    of_weight = (_sum_over_positions(torch.mul(y_gradient, centred, out=out)) - of_bias * rest) * rstd

    def mean_of_group(values: Tensor) -> Tensor:
        total: Tensor = (values * weight).unflatten(1, (groups, of_group)).sum(2).repeat_interleave(of_group, dim=1)
        return total / (of_group * x.shape[2] * x.shape[3])

    # The derivative of (x − mean) · rstd: what would move mean and variance of the group is taken out.
    along = -rstd.square() * mean_of_group(of_weight)
    constant = -rstd * mean_of_group(of_bias) - rest * along
    torch.addcmul(_over_positions(constant, x), centred, _over_positions(along, x), out=out)
    out.addcmul_(y_gradient, _over_positions(scale, x))
    return of_weight, of_bias


def _over_positions(values: Tensor, like: Tensor) -> Tensor:
    """(B, C) → (B, C, 1, 1) in the dtype of the images."""
    return values.to(like.dtype)[:, :, None, None]


def _sum_over_positions(x: Tensor) -> Tensor:
    """(B, C, H, W) channels_last → (B, C) float32; only the sums over W are rounded to the dtype of ``x``."""
    batch, channels, height, width = x.shape
    rows = x.permute(0, 2, 3, 1).reshape(batch * height, width, channels).sum(1)
    total: Tensor = rows.view(batch, height, channels).sum(1, dtype=torch.float32)
    return total
