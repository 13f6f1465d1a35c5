"""Random numbers that belong to a sample: a pure function of seed, sample index and step.

Counter-based, so picture i of a run is the same picture in any batch, on any rank and after any interruption.
"""

import torch
from torch import Tensor

# The finaliser of SplitMix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", 2014), as signed
# 64-bit numbers; integer products wrap around.
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_FIRST = 0xBF58476D1CE4E5B9 - 2**64
_SECOND = 0x94D049BB133111EB - 2**64


def _shifted(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shifted(x, 30)) * _FIRST
    x = (x ^ _shifted(x, 27)) * _SECOND
    return x ^ _shifted(x, 31)


def uniform(seed: int, index: Tensor, step: int) -> Tensor:
    """One uniform number for each sample of a step.

    Args:
        seed: of the run; any integer, taken modulo 2⁶⁴.
        index: (B,) int64, the number of each sample within the run.
        step: number of the code within the sample.

    Returns:
        (B,) float64 in [0, 1 − 2⁻⁵²].
    """
    signed = (seed + 2**63) % 2**64 - 2**63
    state = _mix(torch.full_like(index, signed) + _GOLDEN)
    state = _mix((state ^ index) + _GOLDEN)
    state = _mix((state ^ step) + _GOLDEN)
    return _shifted(state, 12).double() * 2.0**-52
