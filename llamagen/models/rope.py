"""Two-dimensional rotary position embedding for codes on a square grid."""

from typing import Literal

import torch
from torch import Tensor


def rope_table(
    grid_size: int,
    head_dim: int,
    base: float,
    condition_length: int,
    condition_rotation: Literal["zero", "identity"],
    device: torch.device | None = None,
) -> Tensor:
    """Cosine and sine of every position: the condition first, then the codes in raster order.

    The first half of a head's pairs is rotated by the row of the code, the second half by its column. Condition
    positions have no place on the grid. The published models give them cosine 0 *and* sine 0, which sets their queries
    and keys to zero (``"zero"``); ``"identity"`` does not rotate them (cosine 1, sine 0).

    Args:
        grid_size: height and width of the code grid; there are ``grid_size ** 2`` codes.
        head_dim: width of an attention head, a multiple of 4.
        base: wavelength base (theta), 10000 in the paper.
        condition_length: number of condition positions before the first code.
        condition_rotation: rotation of the condition positions, see above.
        device: device of the table.

    Returns:
        (P, head_dim / 2, 2) float32; P = ``condition_length + grid_size ** 2``, last axis (cosine, sine).
    """
    pairs_per_axis = head_dim // 4
    exponent = torch.arange(pairs_per_axis, dtype=torch.float32, device=device) * 2 / (head_dim // 2)
    frequency = 1.0 / base**exponent
    angle = torch.arange(grid_size, dtype=torch.float32, device=device)[:, None] * frequency
    rows = angle[:, None, :].expand(grid_size, grid_size, pairs_per_axis)
    columns = angle[None, :, :].expand(grid_size, grid_size, pairs_per_axis)
    angles = torch.cat([rows, columns], dim=-1).flatten(0, 1)
    codes = torch.stack([angles.cos(), angles.sin()], dim=-1)
    condition = codes.new_zeros(condition_length, head_dim // 2, 2)
    if condition_rotation == "identity":
        condition[..., 0] = 1.0
    return torch.cat([condition, codes])


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotate the interleaved pairs ``(x[2i], x[2i + 1])`` of each head by the angles of their position.

    Args:
        x: (B, T, H, head_dim), any float dtype; computed in float32.
        table: (T, head_dim / 2, 2), or (B, T, head_dim / 2, 2) if rows differ: rows of :func:`rope_table`.

    Returns:
        Same shape and dtype as ``x``.
    """
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cosine, sine = table.unsqueeze(-3).unbind(-1)
    return torch.stack([even * cosine - odd * sine, odd * cosine + even * sine], dim=-1).flatten(-2).type_as(x)
