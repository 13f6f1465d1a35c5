"""Small extractors, and images for them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from llamagen.metrics import Features

SIZE = 8


class Projection(nn.Module):
    """A fixed random projection of the pixels, far from zero, and dropout."""

    def __init__(self, width: int = 16, shape: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.linear = nn.Linear(3 * SIZE * SIZE, width)
        self.dropout = nn.Dropout(0.5)
        self.shape = shape
        generator = torch.Generator().manual_seed(width)
        with torch.no_grad():
            self.linear.weight.copy_(torch.randn(self.linear.weight.shape, generator=generator) / 255)
            self.linear.bias.fill_(100.0)

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.dropout(self.linear(images.flatten(1)))
        return features.unflatten(1, (-1, *self.shape)) if self.shape else features


class Anything(nn.Module):
    """A module that returns the result of a function."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, images: Tensor) -> Any:
        return self.function(images)


def random_images(count: int, seed: int, least: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(least, 256, (count, 3, SIZE, SIZE), generator=generator, dtype=torch.uint8)


class Everything(Projection):
    """An extractor that provides all features."""

    name = "everything"

    def forward(self, images: Tensor) -> Features:  # type: ignore[override]
        pool = super().forward(images)
        return Features(pool, spatial=images[:, :, ::2, ::2] / 64, logits=pool[:, :7] - pool.mean(1, keepdim=True))


class Corner(nn.Module):
    """An extractor whose features are pixels, and so exactly the same in any batch."""

    name = "corner"

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)
        self.scale = nn.Parameter(torch.tensor(1 / 64, dtype=dtype))

    def forward(self, images: Tensor) -> Features:
        pool = self.dropout(images[:, :, 0, :4].flatten(1).to(self.scale.dtype) * self.scale)
        return Features(pool, logits=pool[:, :7])
