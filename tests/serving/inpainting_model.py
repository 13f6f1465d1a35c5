"""A small model that can inpaint, for tests of the engine, the page and the server."""

from typing import Any

import numpy as np
from PIL import Image

from llamagen import LlamaGen
from llamagen.class_names import ClassNames
from llamagen.pretrained.loading import Parts
from llamagen.sampling import SamplingConfig
from tests.small_models import small_gpt, small_vqgan


def inpainting_model(**options: Any) -> LlamaGen:
    """A target-aware model of 7 classes, 4 × 4 codes and 16 px."""
    gpt = small_gpt(**{"target_aware": True, "vocab_size": 64, **options})
    names = ClassNames([f"class {number}" for number in range(7)])
    return LlamaGen(Parts("small", small_vqgan(), gpt, SamplingConfig(), "float32", names, None), 4, compile=False)


def mask_of(*codes: int) -> np.ndarray:
    """Mask (4, 4) bool of codes by number."""
    mask = np.zeros(16, np.bool_)
    mask[list(codes)] = True
    return mask.reshape(4, 4)


def noise(seed: int) -> Image.Image:
    """An image of 16 px."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (16, 16, 3), np.uint8))
