"""GroupNorm followed by SiLU, the pair that precedes every convolution of the tokenizer.

B batch, C channels, G groups, D = C / G, H × W positions.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BLOCK = 1 << 21
"""Elements per block in the backward pass: 4 MiB, which fits into the cache."""


def norm_silu(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """Compute ``silu(norm(x))``, (B, C, H, W) → same shape and dtype.

    On a CPU, PyTorch's backward pass of GroupNorm in bfloat16 with ``channels_last`` takes as long as a convolution.
    For that case this function has its own backward pass, built from fast elementwise operations. It also keeps one
    tensor fewer for the backward pass.
    """
    use_own = x.device.type == "cpu" and x.dtype == torch.bfloat16 and _is_channels_last(x)
    if not use_own or torch.compiler.is_compiling():
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
        rows, parameter_gradients = max(1, BLOCK // x[0].numel()), []
        for start in range(0, len(x), rows):
            parts = [each[start : start + rows] for each in (gradient, x, mean, rstd, x_gradient)]
            parameter_gradients.append(_block_gradient(parts, weight.float(), bias.float()))
        weight_gradient, bias_gradient = (torch.cat(each).sum(0) for each in zip(*parameter_gradients, strict=True))
        return x_gradient, weight_gradient.to(weight.dtype), bias_gradient.to(bias.dtype), None, None


def _block_gradient(parts: list[Tensor], weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Write the gradient of ``x`` (B, C, H, W) to ``out``; return those of weight and bias per image, (B, C)."""
    gradient, x, mean, rstd, out = parts
    groups, group_size = mean.shape[1], x.shape[1] // mean.shape[1]
    mean, rstd = (each.float().repeat_interleave(group_size, dim=1) for each in (mean, rstd))  # (B, C)
    scale = rstd * weight
    # footgun: in bfloat16 large values lose precision, so subtract the mean first. ``rest`` is its rounding error, in
    # float32.
    centred = x - _over_positions(mean, x)
    rest = mean - mean.to(x.dtype).float()
    # Recompute the output of the norm, then overwrite it with the gradient of SiLU's input.
    y = torch.addcmul(_over_positions(bias - rest * scale, x), centred, _over_positions(scale, x))
    y_gradient = torch.ops.aten.silu_backward.grad_input(gradient, y, grad_input=y)
    bias_gradient = _sum_over_positions(y_gradient)  # (B, C), like all that follow
    weight_gradient = (_sum_over_positions(torch.mul(y_gradient, centred, out=out)) - bias_gradient * rest) * rstd

    def group_mean(values: Tensor) -> Tensor:
        total: Tensor = (values * weight).unflatten(1, (groups, group_size)).sum(2).repeat_interleave(group_size, dim=1)
        return total / (group_size * x.shape[2] * x.shape[3])

    # Derivative of (x − mean) · rstd: remove the components that would change mean and variance of the group.
    along = -rstd.square() * group_mean(weight_gradient)
    constant = -rstd * group_mean(bias_gradient) - rest * along
    torch.addcmul(_over_positions(constant, x), centred, _over_positions(along, x), out=out)
    out.addcmul_(y_gradient, _over_positions(scale, x))
    return weight_gradient, bias_gradient


def _over_positions(values: Tensor, like: Tensor) -> Tensor:
    """(B, C) → (B, C, 1, 1) in the dtype of ``like``."""
    return values.to(like.dtype)[:, :, None, None]


def _sum_over_positions(x: Tensor) -> Tensor:
    """(B, C, H, W) channels_last → (B, C) float32; only the sums over W are rounded to the dtype of ``x``."""
    batch, channels, height, width = x.shape
    rows = x.permute(0, 2, 3, 1).reshape(batch * height, width, channels).sum(1)
    total: Tensor = rows.view(batch, height, channels).sum(1, dtype=torch.float32)
    return total
