"""Whether codes are right: fit to be stored, made of finite numbers, and of the kind that a GPT learns."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from llamagen.finite import not_finite
from llamagen.models.gpt_config import GPTConfig
from llamagen.models.vqgan import Encoding

MAX_CODES = 2**16
"""Codes that a shard can tell apart."""


def check_codebook_size(size: int) -> None:
    """Refuse a codebook whose codes could not be stored, before it is trained.

    Raises:
        ValueError: if it has too many entries.
    """
    if size > MAX_CODES:
        raise ValueError(f"codebook_size is {size}; codes are stored as uint16: at most {MAX_CODES:,}")


def broken_parts(encoding: Encoding) -> dict[str, Tensor]:
    """Of which vectors codes mean nothing: by their name a scalar bool, True where one of them is not finite."""
    return {
        # One that is too large for float32 to be normalised becomes 0.
        "the encoder's latent": ~(encoding.latent.square().sum(1) > 0.5).all(),
        "the codebook's entry": not_finite(encoding.entries).any(),
    }


def check_codes(config: GPTConfig, meta: Mapping[str, Any]) -> None:
    """Refuse codes that the model cannot learn.

    Args:
        config: of the model.
        meta: description of the set.

    Raises:
        ValueError: if vocabulary, grid or number of classes differ.
    """
    if meta["vocabulary"] != config.vocab_size:
        raise ValueError(
            f"the codes come from a vocabulary of {meta['vocabulary']}, but the model's vocab_size is "
            f"{config.vocab_size}; set vocab_size to {meta['vocabulary']} or extract other codes"
        )
    height, width = meta["grid"]
    if (height, width) != (config.grid_size, config.grid_size):
        raise ValueError(
            f"the tokenizer's grid is {height} × {width} = {height * width} codes an image, but the model's "
            f"block_size is {config.block_size}; "
            + (f"set block_size to {height * width}" if height == width else "the model needs a square grid")
            + " or extract other codes"
        )
    if config.condition == "class" and not meta["num_classes"]:
        raise ValueError("the codes have no classes, which the model needs; extract codes of images with classes")
    if config.condition == "class" and meta["num_classes"] > config.num_classes:
        raise ValueError(
            f"the codes have {meta['num_classes']} classes, but the model's num_classes is {config.num_classes}; "
            f"set num_classes to {meta['num_classes']}"
        )
