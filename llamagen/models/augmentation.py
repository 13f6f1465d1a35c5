"""Differentiable augmentation for the discriminator, for small datasets (DiffAugment, arXiv 2006.10738).

B batch, H × W pixels.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

POLICIES = ("color", "translation", "cutout")
SHIFT = 1 / 8
"""Largest translation, as a fraction of the side."""


class DiscriminatorAugmentation(nn.Module):
    """Random differentiable augmentations, with independent random numbers for each image.

    Real and reconstructed images are both augmented, so the generator does not learn to produce augmented images.
    Values are not clipped.

    Args:
        policy: any of ``color`` (brightness ± 0.5, saturation × 0 to 2, contrast × 0.5 to 1.5), ``translation`` (by
            whole pixels, up to an eighth of the side, with grey borders) and ``cutout`` (a grey square of half the
            side). Empty for no augmentation.

    Raises:
        ValueError: if a name is unknown or repeated.
    """

    def __init__(self, policy: Sequence[str] = ()) -> None:
        super().__init__()
        if unknown := [name for name in policy if name not in POLICIES]:
            raise ValueError(f"augmentation {unknown[0]!r} is unknown; choose from {', '.join(POLICIES)}")
        if len(set(policy)) < len(policy):
            raise ValueError(f"augmentation {list(policy)} repeats a name; give each name once")
        self.policy = tuple(policy)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in about [-1, 1] → same shape and dtype; computed in float32."""
        if not self.policy:
            return images
        with torch.autocast(images.device.type, enabled=False):
            augmented = images.float()
            for name in POLICIES:
                if name in self.policy:
                    augmented = getattr(self, f"_{name}")(augmented)
        return augmented.to(images.dtype)

    @staticmethod
    def _color(images: Tensor) -> Tensor:
        from kornia.color import rgb_to_grayscale  # imported here because the import is slow
        from kornia.enhance import adjust_brightness, adjust_contrast

        brightness, saturation, contrast = torch.rand(3, len(images), dtype=images.dtype, device=images.device)
        # kornia expects [0, 1], where half of our range [-1, 1] is 0.5.
        pixels = adjust_brightness((images + 1) / 2, (brightness - 0.5) / 2, clip_output=False)
        # footgun: kornia's adjust_saturation always clips, so blend with the grey image here.
        grey = rgb_to_grayscale(pixels)
        pixels = grey + (pixels - grey) * (2 * saturation).view(-1, 1, 1, 1)
        mean = pixels.mean((1, 2, 3), keepdim=True)
        contrasted: Tensor = adjust_contrast(pixels - mean, contrast + 0.5, clip_output=False) + mean
        return contrasted * 2 - 1

    @staticmethod
    def _translation(images: Tensor) -> Tensor:
        from kornia.geometry.transform import translate

        count, _, height, width = images.shape
        limits = [int(side * SHIFT) for side in (width, height)]
        # Integer shifts with nearest neighbours: no interpolation.
        pixels = [torch.randint(-limit, limit + 1, (count,), device=images.device) for limit in limits]
        shifts = torch.stack(pixels, dim=1).float()
        return translate(images, shifts, mode="nearest", padding_mode="zeros", align_corners=True)

    @staticmethod
    def _cutout(images: Tensor) -> Tensor:
        from kornia.augmentation import RandomErasing

        # A square of a quarter of the area, at a random place in each image.
        return cast(Tensor, RandomErasing(scale=(0.25, 0.25), ratio=(1.0, 1.0), value=0.0, p=1.0)(images))
