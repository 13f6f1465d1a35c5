"""Images → codes → images, with a tokenizer.

Shapes: N images of S × S pixels, h × w codes of an image.
"""

from collections.abc import Sequence
from threading import Lock
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from llamagen.models.inputs import CodeInput, grids_of_codes
from llamagen.models.vqgan import VQGAN
from llamagen.pretrained.images import ImageLike, is_single, prepare_images, to_pillow
from llamagen.sampling import Images, PixelDecoder


class ImageCodec:
    """Encodes images as codes, and decodes them.

    Args:
        tokenizer: the image tokenizer.
    """

    def __init__(self, tokenizer: VQGAN) -> None:
        self.tokenizer = tokenizer
        self._pixels: PixelDecoder | None = None
        self._lock = Lock()  # two threads may need a decoder or a sampler for the first time

    @property
    def device(self) -> torch.device:
        """Device of the models."""
        return self.tokenizer.post_quant_conv.weight.device

    @property
    def resolution(self) -> int | None:
        """Side S of the generated images in pixels; None for a tokenizer alone, which takes images of any size."""
        return None

    @torch.no_grad()
    def encode(self, images: ImageLike | Sequence[ImageLike]) -> Tensor:
        """Encode images as codes.

        Args:
            images: Pillow images, files, arrays (H, W, 3) uint8, or tensors (N, 3, H, W) of uint8 or of floats in
                [-1, 1]; one or a list. All but tensors are cropped to their centre and resized to S × S; by a tokenizer
                alone only cropped, to multiples of its downsampling factor.

        Returns:
            (N, h, w) int64, on the model's device.

        Raises:
            ValueError: in one line, if an image cannot be read or has a wrong type or size.
        """
        batch = prepare_images(images, self.resolution, self.tokenizer.config.downsampling)
        # One at a time, so that the codes of an image do not depend on the others.
        return torch.cat([self.tokenizer.encode(batch[row : row + 1]).codes for row in range(len(batch))])

    def decode(self, codes: CodeInput) -> list[Image.Image]:
        """Decode codes, integers (N, h, w) or (h, w), to images.

        Raises:
            ValueError: in one line, if their type, shape or values are wrong.
        """
        return to_pillow(self.pixels(codes).numpy())

    def pixels(self, codes: CodeInput) -> Images:
        """Like :meth:`decode`, but do not wait for a GPU: it can sample the next batch meanwhile."""
        grids = grids_of_codes(codes, self.tokenizer.config.codebook_size, self.device)
        return self._pixel_decoder()(grids)

    def reconstruct(self, images: ImageLike | Sequence[ImageLike]) -> Any:
        """Encode and decode images, see :meth:`encode`.

        Returns:
            The reconstruction of one image, or a list of those of several.
        """
        reconstructions = self.decode(self.encode(images))
        return reconstructions[0] if is_single(images) else reconstructions

    def _pixel_decoder(self) -> PixelDecoder:
        with self._lock:
            if self._pixels is None:
                self._pixels = PixelDecoder(self.tokenizer, self.device, torch.float32)
            return self._pixels
