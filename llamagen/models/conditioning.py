"""Embedding of the condition: a class label or caption features become the first tokens of the sequence."""

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llamagen.models.gpt_config import GPTConfig


def sample_dropped(batch_size: int, probability: float, device: torch.device) -> Tensor:
    """Choose the training examples that lose their condition: (B,) bool."""
    return torch.rand(batch_size, device=device) < probability


class LabelEmbedder(nn.Module):
    """Class label → one token. The last row of the table is the unconditional embedding.

    Args:
        num_classes: number of labels.
        dim: width of the embedding.
    """

    def __init__(self, num_classes: int, dim: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.embedding_table = nn.Embedding(num_classes + 1, dim)

    def forward(self, labels: Tensor, dropped: Tensor | None = None) -> Tensor:
        """Embed labels.

        Args:
            labels: (B,) int64 in [0, num_classes]; num_classes means "no class".
            dropped: (B,) bool, True for examples without a class.

        Returns:
            (B, 1, D).
        """
        if dropped is not None:
            labels = torch.where(dropped, self.num_classes, labels)
        return cast(Tensor, self.embedding_table(labels)).unsqueeze(1)


class CaptionProjection(nn.Module):
    """Two linear layers without biases and a tanh-approximated GELU between them."""

    def __init__(self, caption_dim: int, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(caption_dim, dim, bias=False)
        self.fc2 = nn.Linear(dim, dim, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        """(B, C, caption_dim) → (B, C, D)."""
        return cast(Tensor, self.fc2(F.gelu(self.fc1(features), approximate="tanh")))


class CaptionEmbedder(nn.Module):
    """Caption features → ``caption_length`` tokens. A fixed random feature sequence stands for "no caption".

    ``uncond_embedding`` is a buffer, because it is never trained but belongs to the weights.

    Args:
        caption_dim: width of the features.
        caption_length: number of tokens C.
        dim: width of the embedding.
    """

    uncond_embedding: Tensor

    def __init__(self, caption_dim: int, caption_length: int, dim: int) -> None:
        super().__init__()
        self.cap_proj = CaptionProjection(caption_dim, dim)
        self.register_buffer("uncond_embedding", torch.empty(caption_length, caption_dim))

    def reset_parameters(self) -> None:
        """Initialise the features of "no caption" at random."""
        nn.init.normal_(self.uncond_embedding, std=self.uncond_embedding.shape[1] ** -0.5)

    def forward(self, features: Tensor, dropped: Tensor | None = None) -> Tensor:
        """Embed caption features.

        Args:
            features: (B, C, caption_dim), padded on the left.
            dropped: (B,) bool, True for examples without a caption.

        Returns:
            (B, C, D).
        """
        features = features.to(self.uncond_embedding.dtype)
        if dropped is not None:
            features = torch.where(dropped[:, None, None], self.uncond_embedding, features)
        return cast(Tensor, self.cap_proj(features))


def build_conditioner(config: GPTConfig) -> LabelEmbedder | CaptionEmbedder:
    """Build the embedder for ``config.condition``."""
    if config.condition == "class":
        return LabelEmbedder(config.num_classes, config.dim)
    return CaptionEmbedder(config.caption_dim, config.caption_length, config.dim)
