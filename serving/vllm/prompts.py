"""Conditions → prompts of vLLM.

A class-conditional prompt is one token, the label. A text prompt is the embedded caption without padding, both branches
side by side. Kept codes follow as tokens.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from llamagen.models.conditioning import CaptionEmbedder
from llamagen.models.gpt_config import GPTConfig


def label_prompt(config: GPTConfig, label: int, kept: Sequence[int] = ()) -> dict[str, Any]:
    """Prompt of a class-conditional model.

    Args:
        config: the model.
        label: the class.
        kept: the first codes of the image in raster order.

    Raises:
        ValueError: in one line, if there is no such class or code.
    """
    if not 0 <= label < config.num_classes:
        raise ValueError(f"class {label} was requested, but the model has classes 0 to {config.num_classes - 1}")
    return {"prompt_token_ids": [label, *_checked(config, kept)]}


@torch.no_grad()
def caption_prompt(
    config: GPTConfig,
    embedder: CaptionEmbedder,
    features: Tensor,
    length: int | None = None,
    kept: Sequence[int] = (),
    guided: bool = True,
) -> dict[str, Any]:
    """Prompt of a text-conditional model.

    Args:
        config: the model.
        embedder: its ``cls_embedding``, in the dtype of the model.
        features: (C, caption_dim) caption features, padded on the left.
        length: number T of real caption tokens, which come last; None for all.
        kept: the first K codes of the image in raster order.
        guided: whether the model has the unconditional branch.

    Returns:
        The prompt with embeddings (T + K, N D), N branches, D model width. With kept codes also token ids: V, which is
        not a code, for the caption, then the codes, whose embeddings the model looks up.

    Raises:
        ValueError: in one line, if shape, length or a code is invalid.
    """
    if features.shape != (config.caption_length, config.caption_dim):
        expected = (config.caption_length, config.caption_dim)
        raise ValueError(f"caption features must have shape {expected}, not {tuple(features.shape)}")
    length = config.caption_length if length is None else length
    if not 1 <= length <= config.caption_length:
        raise ValueError(f"the caption has {length} tokens, not 1 to {config.caption_length}")
    kept = _checked(config, kept)
    dropped = torch.tensor([False, True] if guided else [False], device=features.device)
    embedded = embedder(features.expand(len(dropped), -1, -1), dropped)[:, -length:]
    prompt = embedded.transpose(0, 1).flatten(1)
    if not kept:
        return {"prompt_embeds": prompt}
    return {
        "prompt_embeds": torch.cat([prompt, prompt.new_zeros(len(kept), prompt.shape[1])]),
        "prompt_token_ids": [config.vocab_size] * length + list(kept),
        "prompt_is_token_ids": [False] * length + [True] * len(kept),
    }


def condition_tokens(config: GPTConfig, tokens: Sequence[int] | None, prompt_length: int) -> int:
    """Number of tokens of a prompt that are its condition; the others are kept codes.

    Args:
        config: the model.
        tokens: token ids of the prompt; None, or anything but the ids of :func:`caption_prompt`, for a caption alone.
        prompt_length: length of the prompt.
    """
    if config.condition == "class":
        return 1
    if tokens is None or not len(tokens) or tokens[0] != config.vocab_size:
        return prompt_length
    return next((place for place, token in enumerate(tokens) if token != config.vocab_size), prompt_length)


def kept_count(config: GPTConfig, tokens: Sequence[int] | None) -> int:
    """Number of kept codes in a prompt, from its token ids; None if it has embeddings only."""
    return 0 if tokens is None else len(tokens) - condition_tokens(config, tokens, len(tokens))


def _checked(config: GPTConfig, kept: Sequence[int]) -> list[int]:
    codes = [int(code) for code in kept]
    if len(codes) >= config.block_size:
        raise ValueError(
            f"kept has {len(codes)} codes, but an image has {config.block_size}; keep fewer, so that one is left to "
            "sample"
        )
    if wrong := [code for code in codes if not 0 <= code < config.vocab_size]:
        raise ValueError(f"kept holds code {wrong[0]}, but the model has codes 0 to {config.vocab_size - 1}")
    return codes


def embedder_of(gpt: Any) -> CaptionEmbedder:
    """The caption embedder of a text model."""
    return cast(CaptionEmbedder, gpt.cls_embedding)
