"""What a discriminator is shown instead of images, if there are few of them (DiffAugment, arXiv 2006.10738).

B batch, H × W pixels.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

POLICIES = ("color", "translation", "cutout")
SHIFT = 1 / 8
"""Largest translation, as a share of the side."""


class DiscriminatorAugmentation(nn.Module):
    """Random changes to images through which gradients flow; each image draws its own.

    Real and reconstructed images both go through it, so the discriminator learns nothing of the changes, and the
    generator is not taught them. Values are not clipped.

    Args:
        policy: any of ``color`` (brightness ± 0.5, saturation 0 to 2 times, contrast 0.5 to 1.5 times), ``translation``
            (up to an eighth of the side, in whole pixels, grey behind) and ``cutout`` (a grey square of half the side);
            none changes nothing.

    Raises:
        ValueError: if a name is unknown or repeated.
    """

    def __init__(self, policy: Sequence[str] = ()) -> None:
        super().__init__()
        if unknown := [name for name in policy if name not in POLICIES]:
            raise ValueError(f"augmentation {unknown[0]!r} is unknown; choose from {', '.join(POLICIES)}")
        if len(set(policy)) < len(policy):
            raise ValueError(f"augmentation {list(policy)} names one twice; name each once")
        self.policy = tuple(policy)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) around [-1, 1] → the same, same dtype; computed in float32."""
        if not self.policy:
            return images
        with torch.autocast(images.device.type, enabled=False):
            changed = images.float()
            for name in POLICIES:
                if name in self.policy:
                    changed = getattr(self, f"_{name}")(changed)
        return changed.to(images.dtype)

    @staticmethod
    def _color(images: Tensor) -> Tensor:
        from kornia.color import rgb_to_grayscale  # imported here for its start-up time
        from kornia.enhance import adjust_brightness, adjust_contrast

        brightness, saturation, contrast = torch.rand(3, len(images), dtype=images.dtype, device=images.device)
        # kornia works on [0, 1]; half of our range is 0.5 of brightness there.
        pixels = adjust_brightness((images + 1) / 2, (brightness - 0.5) / 2, clip_output=False)
        # kornia's own blend with the grey image clips, whatever one asks for.
        grey = rgb_to_grayscale(pixels)
        pixels = grey + (pixels - grey) * (2 * saturation).view(-1, 1, 1, 1)
        mean = pixels.mean((1, 2, 3), keepdim=True)
        changed: Tensor = adjust_contrast(pixels - mean, contrast + 0.5, clip_output=False) + mean
        return changed * 2 - 1

    @staticmethod
    def _translation(images: Tensor) -> Tensor:
        from kornia.geometry.transform import translate

        count, _, height, width = images.shape
        furthest = [int(side * SHIFT) for side in (width, height)]
        drawn = [torch.randint(-far, far + 1, (count,), device=images.device) for far in furthest]
        # Nearest neighbours of whole pixels: nothing is interpolated.
        shifts = torch.stack(drawn, dim=1).float()
        return translate(images, shifts, mode="nearest", padding_mode="zeros", align_corners=True)

    @staticmethod
    def _cutout(images: Tensor) -> Tensor:
        from kornia.augmentation import RandomErasing

        # A quarter of the area, as a square; drawn again for each image and call.
        return cast(Tensor, RandomErasing(scale=(0.25, 0.25), ratio=(1.0, 1.0), value=0.0, p=1.0)(images))
