"""Padding of caption features: right to left, and packed. B captions, C positions, W width, T tokens in total."""

import torch
from torch import Tensor


def pad_left(features: Tensor, lengths: Tensor) -> Tensor:
    """Convert right padding to left padding with zeros.

    With left padding, the last caption position, which predicts the first code, always holds a token.

    Args:
        features: (B, C, W), padded on the right with any values.
        lengths: (B,) int64 in [0, C], number of tokens of each caption.

    Returns:
        (B, C, W), same dtype and device.

    Raises:
        ValueError: if shapes or lengths do not fit.
    """
    positions = features.shape[1] if features.dim() == 3 else 0
    _check(lengths, features.shape[0], positions, features.shape)
    source = torch.arange(positions, device=features.device) - (positions - lengths.to(features.device)).unsqueeze(1)
    moved = features.gather(1, source.clamp(min=0).unsqueeze(2).expand_as(features))
    return moved.masked_fill((source < 0).unsqueeze(2), 0)


def pack(features: Tensor, lengths: Tensor) -> Tensor:
    """Concatenate the features of all tokens, without padding, for storage.

    Args:
        features: (B, C, W), padded on the right.
        lengths: (B,) int64 in [0, C], number of tokens of each caption.

    Returns:
        (T, W), where T is the sum of the lengths.

    Raises:
        ValueError: if shapes or lengths do not fit.
    """
    positions = features.shape[1] if features.dim() == 3 else 0
    _check(lengths, features.shape[0], positions, features.shape)
    return features[_is_token(lengths.to(features.device), positions)]


def unpack_left(tokens: Tensor, lengths: Tensor, caption_length: int) -> Tensor:
    """Convert packed features (see :func:`pack`) to left padding, as :func:`pad_left` returns it.

    Lengths are checked on CPUs only: on a GPU the check would wait for the device.

    Args:
        tokens: (T, W), caption by caption.
        lengths: (B,) int64 in [0, caption_length], number of tokens of each caption; their sum is T.
        caption_length: number of positions C.

    Returns:
        (B, C, W), padded on the left with zeros, of the same dtype and device.

    Raises:
        ValueError: if shapes or lengths do not fit.
    """
    if tokens.dim() != 2 or lengths.dim() != 1:
        raise ValueError(f"tokens must be (T, W) and lengths (B,), not {tuple(tokens.shape)}, {tuple(lengths.shape)}")
    if lengths.device.type == "cpu":
        _check(lengths, len(lengths), caption_length, tokens.shape)
        if int(lengths.sum()) != len(tokens):
            raise ValueError(f"lengths of sum {int(lengths.sum())} do not fit tokens of shape {tuple(tokens.shape)}")
    if not len(tokens):
        return tokens.new_zeros(len(lengths), caption_length, tokens.shape[1])
    place = torch.arange(caption_length, device=lengths.device) - (caption_length - lengths).unsqueeze(1)
    source = ((lengths.cumsum(0) - lengths).unsqueeze(1) + place).clamp(0, len(tokens) - 1)
    return tokens[source].masked_fill((place < 0).unsqueeze(2), 0)


def _is_token(lengths: Tensor, positions: int) -> Tensor:
    """(B, C) bool, True for tokens of captions padded on the right."""
    return torch.arange(positions, device=lengths.device) < lengths.unsqueeze(1)


def _check(lengths: Tensor, captions: int, positions: int, shape: torch.Size) -> None:
    if lengths.shape != (captions,) or bool(((lengths < 0) | (lengths > positions)).any()):
        raise ValueError(
            f"features of shape {tuple(shape)} need {captions} lengths in [0, {positions}], not "
            f"{lengths.tolist() if lengths.numel() <= 8 else tuple(lengths.shape)}"
        )
