"""Classes and prompts of users → the condition of a model. N: number of conditions."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from llamagen.class_names import ClassNames
from llamagen.text import TextCondition
from llamagen.text.cleaning import UNKNOWN, Cleaning, clean_caption
from llamagen.text.prompts import clean_prompt

ClassOrPrompt = int | str


def is_one(conditions: Any) -> bool:
    """Whether conditions of a user are one class or prompt, and not several."""
    # Arrays and tensors of any shape have __index__.
    return isinstance(conditions, str) or (hasattr(conditions, "__index__") and not getattr(conditions, "ndim", 0))


def as_list(conditions: Any) -> list[Any]:
    """List of classes or prompts.

    Raises:
        ValueError: in one line, if it is another thing.
    """
    try:
        return [conditions] if is_one(conditions) else list(conditions)
    except TypeError:
        raise ValueError(
            f"{conditions!r:.60} is neither a class nor a prompt; give a number, a text, or a list of them"
        ) from None


class Prompts:
    """Prompts → conditions of a text model, cleaned like the captions of its training.

    Args:
        condition: the encoder, which is loaded at first use, and the record of the model's captions. Without a record
            prompts are not cleaned.
    """

    def __init__(self, condition: TextCondition) -> None:
        self.condition, recorded = condition, condition.cleaning
        self.cleaning: Cleaning | None = None if recorded == UNKNOWN else recorded

    def __call__(self, prompts: Sequence[Any], device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Features (N, C, W), padded on the left, and lengths (N,) of prompts.

        Raises:
            ValueError: in one line, if a prompt is not a text, or the encoder is not available.
        """
        for prompt in prompts:
            if not isinstance(prompt, str):
                raise ValueError(f"{prompt!r:.40} is not a prompt; the model is text-conditional, give texts")
        cleaned = [clean_caption(clean_prompt(prompt), self.cleaning) for prompt in prompts]
        different = list(dict.fromkeys(cleaned))  # several images of a prompt need it encoded once
        encoded = self.condition.encode(different, device, separately=True)
        rows = torch.tensor([different.index(each) for each in cleaned], device=device)
        return encoded.features[rows], None if encoded.lengths is None else encoded.lengths[rows]


def to_condition(
    each: list[Any], text_or_names: Prompts | ClassNames | None, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """Condition of a model.

    Args:
        each: classes, by number or name, or prompts.
        text_or_names: the prompts' encoder of a text model, or the names of a class model's classes.
        device: device of the model.

    Returns:
        Labels (N,) int64 and None; or features (N, C, W), padded on the left, and their lengths (N,).

    Raises:
        ValueError: in one line, if a class is unknown or ambiguous, or a prompt is not a text.
    """
    if not each:
        return torch.empty(0, dtype=torch.int64, device=device), None
    if isinstance(text_or_names, ClassNames):
        return torch.tensor([text_or_names.find(one) for one in each], device=device), None
    assert text_or_names is not None
    return text_or_names(each, device)
