"""Checks that there are not too many codes, and that codes match a GPT."""

from collections.abc import Mapping
from typing import Any

from llamagen.models.gpt_config import GPTConfig


def check_codes(config: GPTConfig, meta: Mapping[str, Any]) -> None:
    """Check that codes match a model.

    Args:
        config: shape of the model.
        meta: description of the dataset of codes.

    Raises:
        ValueError: in one line, if vocabulary, grid or number of classes differ.
    """
    if meta["vocabulary"] != config.vocab_size:
        raise ValueError(
            f"the codes come from a vocabulary of {meta['vocabulary']}, but the model's vocab_size is "
            f"{config.vocab_size}; set vocab_size to {meta['vocabulary']} or extract other codes"
        )
    height, width = meta["grid"]
    if (height, width) != (config.grid_size, config.grid_size):
        raise ValueError(
            f"the tokenizer's grid is {height} × {width} = {height * width} codes per image, but the model's "
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
