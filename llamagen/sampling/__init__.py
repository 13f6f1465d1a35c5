"""Sampling: logits to codes, and the decode loop. Runs without Lightning."""

from llamagen.sampling.config import SamplingConfig
from llamagen.sampling.draw import draw, filter_logits
from llamagen.sampling.generate import generate
from llamagen.sampling.noise import uniform

__all__ = ["SamplingConfig", "draw", "filter_logits", "generate", "uniform"]
