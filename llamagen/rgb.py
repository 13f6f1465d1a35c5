"""Pillow images of any mode → RGB, and the formats that are read from files."""

import warnings

import numpy as np
from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP")
"""The only formats that are decoded. footgun: Pillow reads more formats, and some run programs (EPS runs
Ghostscript).
"""


def to_rgb(image: Image.Image) -> Image.Image:
    """An image in mode RGB. Transparency is ignored. Images with 16 bits keep the upper 8."""
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):  # 16 bits, which Pillow's own conversion would clip at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about transparency, which is ignored
        return image.convert("RGB")
