"""A small classifier as feature extractor, for images unlike Inception's training images. B images of H × W pixels.

Inception was trained on photographs of about 300 pixels. For digits, or images of 32 pixels, its features are not
meaningful. ``python -m evaluation classifier`` trains a classifier on your own images within minutes.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from llamagen.finite import broken_weight
from llamagen.metrics.features import Features

SPATIAL_CHANNELS = 7
ENTRY = "classifier"


class SmallClassifier(nn.Module):
    """Five 3 × 3 convolutions with BatchNorm and ReLU at H, H/2 and H/4, global average pooling, and a linear layer.

    Args:
        num_classes: K, number of classes.
        image_size: side of the images in pixels, a multiple of 4.
        width: channels of the first layer; there are four times as many features.

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(self, num_classes: int, image_size: int, width: int = 32) -> None:
        super().__init__()
        if num_classes < 2 or image_size < 8 or image_size % 4 or width < 8:
            raise ValueError(
                f"num_classes is {num_classes}, image_size {image_size} and width {width}; there must be at least 2 "
                "classes, a size of at least 8 that is a multiple of 4, and a width of at least 8"
            )
        self.image_size = image_size
        self.fine = nn.Sequential(_layer(3, width), nn.MaxPool2d(2))
        self.middle = nn.Sequential(_layer(width, 2 * width), _layer(2 * width, 2 * width))
        self.coarse = nn.Sequential(
            nn.MaxPool2d(2), _layer(2 * width, 4 * width), nn.Dropout(0.1), _layer(4 * width, 4 * width)
        )
        self.head = nn.Linear(4 * width, num_classes)

    def forward(self, images: Tensor) -> Features:
        """Features of images.

        Args:
            images: (B, 3, H, W) float32, 0 … 255.

        Returns:
            ``pool`` (B, 4 · width); ``spatial`` (B, H/2 · W/2 · 7), the first 7 channels after the middle layers;
            ``logits`` and ``biased_logits`` (B, K), which are equal for this extractor.

        Raises:
            ValueError: if the images have another size than ``image_size``.
        """
        if images.shape[2:] != (self.image_size, self.image_size):
            raise ValueError(
                f"images are {images.shape[2]} × {images.shape[3]} pixels, but the classifier was trained on "
                f"{self.image_size} × {self.image_size}; train one for this size"
            )
        middle = self.middle(self.fine((images - 128) / 128))
        pool = self.coarse(middle).mean((2, 3))
        logits = self.head(pool)
        spatial = middle[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        return Features(pool, spatial, logits, logits)


class Classifier(SmallClassifier):
    """A trained classifier, in evaluation mode and frozen.

    Args:
        weights: file written by ``python -m evaluation classifier``.

    Attributes:
        name: name of the extractor in result names, chosen at training.

    Raises:
        ValueError: if the file is missing or not a classifier.
    """

    def __init__(self, weights: Path | str) -> None:
        facts, state = read_classifier(Path(weights))
        try:
            with torch.device("meta"):  # no random numbers
                super().__init__(**{key: facts[key] for key in ("num_classes", "image_size", "width")})
            self.load_state_dict(state, assign=True)
            self.name = str(facts["name"])
        except (KeyError, TypeError, RuntimeError) as error:
            raise _no_classifier(weights, error) from error
        if (broken := broken_weight(self)) is not None:
            raise ValueError(f"{weights} is damaged: its weight {broken} is not finite; train it again")
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "Classifier":
        """Stay in evaluation mode, even if a parent is set to training."""
        return super().train(False)


def read_classifier(path: Path) -> tuple[Mapping[str, Any], dict[str, Tensor]]:
    """Metadata and weights of a classifier's file.

    Raises:
        ValueError: if the file is missing or not a classifier.
    """
    if not path.is_file():
        raise ValueError(f"there is no classifier {path}; train one with python -m evaluation classifier")
    try:
        with safe_open(path, "pt") as file:
            facts = json.loads((file.metadata() or {})[ENTRY])
            return facts, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, ValueError) as error:
        raise _no_classifier(path, error) from error


def _no_classifier(path: Path | str, error: Exception) -> ValueError:
    kind = type(error).__name__
    return ValueError(f"{path} is not a classifier ({kind}); train one with python -m evaluation classifier")


def _layer(channels: int, width: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
