"""Detects images that are all the same, copies of each other, or cast from floats without scaling.

B images of H × W pixels, (B, 3, H, W) uint8, N images in total.
"""

from array import array
from collections.abc import Sequence

import numpy as np
from torch import Tensor

FEW_LEVELS = 4
"""Warn if all images together have at most this many levels: masks and binarised images have two."""
DARK = 32
"""Warn if no level reaches this: images are nearly black, like digits with levels 0 to 16 that were not scaled."""
MAX_COPIES = 0.01
"""Share of images that may be exact copies of others."""
CHANNELS = ("red", "green", "blue")


class ImageContent:
    """Collects facts about images. This is cheap, because usually the first few images settle most questions.

    Attributes:
        count: images seen.
    """

    def __init__(self) -> None:
        self.count = 0
        self._levels = np.zeros((3, 256), bool)
        self._first: Tensor | None = None
        self._all_equal = self._all_flat = True
        self._digests = array("Q")

    def add(self, images: Tensor, digests: Sequence[int] = ()) -> None:
        """Add images.

        Args:
            images: (B, 3, H, W) uint8, on any device. This synchronises with a GPU.
            digests: B checksums of 256 bits each; without them copies are not counted.
        """
        self.count += len(images)
        self._digests.extend(digest >> 192 for digest in digests)
        if not len(images):
            return
        if self._first is None:
            self._first = images[0].clone()
        if self._all_equal:
            self._all_equal = bool((images == self._first).all())
        if self._all_flat:
            self._all_flat = bool((images == images[:, :, :1, :1]).all())
        for image in images:  # one at a time: bincount converts pixels to eight bytes each
            if self._levels_known():
                break
            for seen, plane in zip(self._levels, image.cpu().numpy(), strict=True):
                seen |= np.bincount(plane.reshape(-1), minlength=256) > 0

    def _levels_known(self) -> bool:
        """Whether further levels cannot change any message."""
        return bool((self._levels.sum(1) > FEW_LEVELS).all() and self._levels[:, DARK:].any())

    @property
    def is_settled(self) -> bool:
        """Whether :meth:`fault` will be None regardless of further images."""
        return not self._all_equal and bool(self._levels[:, 2:255].any())

    def fault(self) -> str | None:
        """Why the images must be wrong, with a remedy; None if they are plausible."""
        levels = np.flatnonzero(self._levels.any(0)).tolist()
        if self.count > 1 and self._all_equal:
            if len(levels) > 1:
                return f"all {self.count:,} images are the same image; sample or copy them again"
            colour = {0: "black", 255: "white"}.get(levels[0], "grey")
            hint = (
                "; floats in [0, 1] that are cast to bytes become black: multiply by 255 first"
                if not any(levels)
                else ""
            )
            return (
                f"all {self.count:,} images are {colour} (level {levels[0]} everywhere){hint or '; sample them again'}"
            )
        if levels and levels[-1] == 1:
            return (
                "the only levels are 0 and 1, as if floats in [0, 1] were cast to bytes; multiply by 255 and round "
                "first"
            )
        if levels == [0, 1, 255]:
            return (
                "the only levels are 0, 1 and 255, as if floats in [-1, 1] were cast to bytes; convert them by "
                "((x + 1) * 127.5).round().clip(0, 255).astype(np.uint8)"
            )
        return None

    def doubts(self) -> list[str]:
        """Warnings about content that is unusual but may be intended."""
        if not self.count or self.fault():
            return []
        doubts = []
        levels = np.flatnonzero(self._levels.any(0)).tolist()
        if len(levels) <= FEW_LEVELS:
            doubts.append(
                f"the only levels are {', '.join(map(str, levels))}; that is right for masks and binarised "
                "images, but not for photographs, nor for floats that were cast to bytes"
            )
        if levels[-1] < DARK:
            doubts.append(f"no level is above {levels[-1]} of 255, so the images are nearly black; scale them to 0…255")
        if self._all_flat and self.count > 1:
            doubts.append("each image is of a single colour")
        else:
            flat = [name for name, seen in zip(CHANNELS, self._levels, strict=True) if seen.sum() == 1]
            if flat:
                doubts.append(f"the {' and '.join(flat)} channel is the same everywhere, in all images")
        copies = len(self._digests) - len(np.unique(np.frombuffer(self._digests, np.uint64))) if self._digests else 0
        if copies > MAX_COPIES * self.count:
            doubts.append(f"{copies:,} of {self.count:,} images are exact copies of others")
        return doubts
