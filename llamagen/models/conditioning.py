"""From a condition (class label or caption features) to the first positions of the sequence."""

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llamagen.models.gpt_config import GPTConfig


def sample_dropped(batch_size: int, probability: float, device: torch.device) -> Tensor:
    """Which samples of a training batch lose their condition: (B,) bool."""
    return torch.rand(batch_size, device=device) < probability


class LabelEmbedder(nn.Module):
    """Class label → one position; the last row of the table stands for "no class".

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
            labels: (B,) int64 in [0, num_classes].
            dropped: (B,) bool, True where the sample is without a class.

        Returns:
            (B, 1, D).
        """
        if dropped is not None:
            labels = torch.where(dropped, self.num_classes, labels)
        return cast(Tensor, self.embedding_table(labels)).unsqueeze(1)


class CaptionProjection(nn.Module):
    """Two linear layers with a GELU (tanh form) between them, without biases."""

    def __init__(self, caption_dim: int, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(caption_dim, dim, bias=False)
        self.fc2 = nn.Linear(dim, dim, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        """(B, C, caption_dim) → (B, C, D)."""
        return cast(Tensor, self.fc2(F.gelu(self.fc1(features), approximate="tanh")))


class CaptionEmbedder(nn.Module):
    """Caption features → ``caption_length`` positions; a fixed random feature sequence stands for "no caption".

    ``uncond_embedding`` is never trained and still has to be kept with the weights, so it is a buffer.

    Args:
        caption_dim: width of the features.
        caption_length: number of positions C.
        dim: width of the embedding.
    """

    uncond_embedding: Tensor

    def __init__(self, caption_dim: int, caption_length: int, dim: int) -> None:
        super().__init__()
        self.cap_proj = CaptionProjection(caption_dim, dim)
        self.register_buffer("uncond_embedding", torch.empty(caption_length, caption_dim))

    def reset_parameters(self) -> None:
        """Draw the features of "no caption"."""
        nn.init.normal_(self.uncond_embedding, std=self.uncond_embedding.shape[1] ** -0.5)

    def forward(self, features: Tensor, dropped: Tensor | None = None) -> Tensor:
        """Embed caption features.

        Args:
            features: (B, C, caption_dim), padded on the left.
            dropped: (B,) bool, True where the sample is without a caption.

        Returns:
            (B, C, D).
        """
        features = features.to(self.uncond_embedding.dtype)
        if dropped is not None:
            features = torch.where(dropped[:, None, None], self.uncond_embedding, features)
        return cast(Tensor, self.cap_proj(features))


def build_conditioner(config: GPTConfig) -> LabelEmbedder | CaptionEmbedder:
    """The conditioner that ``config.condition`` asks for."""
    if config.condition == "class":
        return LabelEmbedder(config.num_classes, config.dim)
    return CaptionEmbedder(config.caption_dim, config.caption_length, config.dim)
