"""The small GPTs of golden.json, and their conditions."""

from typing import Any

import torch
from torch import Tensor

from llamagen.models.gpt import GPT, GPTConfig
from tests.golden import fill, golden, integer_input, normal_input

SMALL_ENTRIES = ("gpt_tiny_c2i", "gpt_wide_c2i", "gpt_tiny_t2i")


def golden_gpt(entry: str, **options: Any) -> GPT:
    """The model of an entry with filled weights, in evaluation mode; ``options`` override its configuration."""
    published = dict(golden(entry)["config"])
    condition_length = published.pop("cls_token_num")
    text = published.pop("model_type") == "t2i"
    options = {"condition_dropout": published.pop("class_dropout_prob"), **options}
    if text:
        published |= {"condition": "text", "caption_length": condition_length}
    gpt = fill(GPT(GPTConfig(**published, **options))).eval()
    assert gpt.config.condition_length == condition_length
    return gpt


def golden_inputs(entry: str, config: GPTConfig) -> tuple[Tensor, Tensor | None]:
    """Condition of an entry, and the numbers of real caption tokens."""
    record = golden(entry)
    if config.condition == "class":
        labels = integer_input(f"{entry}/cond", config.num_classes, (len(record["cond"]),))
        assert labels.tolist() == record["cond"]
        return labels, None
    lengths = torch.tensor(record["caption_lengths"])
    features = normal_input(f"{entry}/cond", (len(lengths), config.caption_length, config.caption_dim))
    padding = torch.arange(config.caption_length) < config.caption_length - lengths[:, None]
    return features.masked_fill(padding[..., None], 0.0), lengths
