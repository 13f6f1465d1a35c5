"""Sampling: logits to codes, and the decode loop, compiled or not. Runs without Lightning."""

from llamagen.sampling.automatic import should_compile, try_compiled
from llamagen.sampling.config import IMAGE_SETTINGS, SamplingConfig
from llamagen.sampling.generate import generate
from llamagen.sampling.image_sampler import ImageSampler
from llamagen.sampling.logits import filter_logits, guide, sample_codes
from llamagen.sampling.noise import code_counters, gumbel, seed_tensor
from llamagen.sampling.pixels import Images, PixelDecoder
from llamagen.sampling.sampler import Sampler, compute_dtype

__all__ = [
    "IMAGE_SETTINGS",
    "ImageSampler",
    "Images",
    "PixelDecoder",
    "Sampler",
    "SamplingConfig",
    "code_counters",
    "compute_dtype",
    "filter_logits",
    "generate",
    "guide",
    "gumbel",
    "sample_codes",
    "seed_tensor",
    "should_compile",
    "try_compiled",
]
