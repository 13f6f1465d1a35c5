"""Random numbers of a sample: a pure function of seed, sample index, step and code.

The generator is counter-based, so image i of a run is the same in any batch, on any rank and after a restart. It is
vectorised and runs on the device, also in a compiled step.
"""

import torch
from torch import Tensor

# SplitMix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", 2014) in signed 64-bit integers,
# whose products wrap around.
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_FIRST = 0xBF58476D1CE4E5B9 - 2**64
_SECOND = 0x94D049BB133111EB - 2**64


def _shifted(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shifted(x, 30)) * _FIRST
    x = (x ^ _shifted(x, 27)) * _SECOND
    return x ^ _shifted(x, 31)


def seed_tensor(seed: int, device: torch.device | None = None) -> Tensor:
    """Convert a seed, any integer modulo 2⁶⁴, to a scalar int64 tensor."""
    return torch.tensor((seed + 2**63) % 2**64 - 2**63, device=device)


def code_counters(count: int, device: torch.device | None = None) -> Tensor:
    """Counters of the codes for :func:`gumbel`, (V,) int64, the same for every step."""
    return torch.arange(1, count + 1, device=device) * _GOLDEN


def gumbel(seed: Tensor, index: Tensor, step: Tensor, counters: Tensor) -> Tensor:
    """Standard Gumbel noise for each sample and each entry of the vocabulary, at one step.

    Args:
        seed: (B,) int64, or a scalar for all samples, see :func:`seed_tensor`.
        index: (B,) int64, index of each sample within the run.
        step: scalar int64, index of the code within the sample; or (B,).
        counters: (V,) int64, see :func:`code_counters`.

    Returns:
        (B, V) float32 in [-2.9, 23].
    """
    state = _mix(seed.expand_as(index) + _GOLDEN)
    state = _mix((state ^ index) + _GOLDEN)
    state = _mix((state ^ step) + _GOLDEN)
    bits = _shifted(_mix(state[:, None] + counters), 32)
    # footgun: float32 rounds the largest values to 1, where the noise would be −inf; hence the clamp. The largest noise
    # comes from values near 0, where float32 is precise.
    uniform = ((bits.float() + 0.5) * 2.0**-32).clamp(max=1.0 - 2.0**-24)
    return -torch.log(-torch.log1p(-uniform))
