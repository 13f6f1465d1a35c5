"""Generation orders at sampling time, for target-aware models: the sequence in which the codes of an image are sampled.

Shapes: B images, L codes of an image.
"""

import torch
from torch import Tensor

from llamagen.models.gpt import GPT
from llamagen.sampling.config import SamplingConfig


def check_order(gpt: GPT, order: Tensor, count: int) -> Tensor:
    """Check generation orders.

    Args:
        gpt: the model.
        order: integers (B, L), or (L,) for all images; entry t is the raster position of the code that is sampled at
            step t.
        count: B.

    Returns:
        (B, L).

    Raises:
        ValueError: in one line, if the model is not target-aware, or a row is not a permutation of 0 … L − 1.
    """
    length = gpt.config.block_size
    if gpt.target_embeddings is None:
        raise ValueError(
            "order was given, but this model generates in raster order only; use one that was trained in random "
            "orders (model.order: see docs/recipes.md)"
        )
    if tuple(order.shape) not in ((length,), (count, length)):
        raise ValueError(
            f"order must have shape ({length},) or ({count}, {length}), the raster position of each code in the order "
            f"of generation, not {tuple(order.shape)}"
        )
    order = order.expand(count, -1)
    wrong = (order.sort(dim=1).values != torch.arange(length, device=order.device)).any(1)
    if wrong.any():
        row = int(wrong.nonzero()[0, 0])
        raise ValueError(f"order of image {row} is not a permutation of 0 to {length - 1}; name each position once")
    return order


def ordered_settings(config: SamplingConfig) -> SamplingConfig:
    """Settings of sampling in a given order: one code in each pass.

    Raises:
        ValueError: in one line, if a window is set.
    """
    return config.one_code_a_pass("windows follow the raster order; set window to 1 or auto to sample in another order")


def to_raster(codes: Tensor, order: Tensor | None) -> Tensor:
    """Codes (B, L) in the order of generation → the same in raster order. None is raster order."""
    return codes if order is None else torch.empty_like(codes).scatter_(1, order, codes)


def to_order(codes: Tensor, order: Tensor | None) -> Tensor:
    """Codes (B, L) in raster order → the same in the order of generation. None is raster order."""
    return codes if order is None else codes.gather(1, order)
