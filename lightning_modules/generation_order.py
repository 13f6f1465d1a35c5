"""Random generation orders in training, annealed to raster order: RAR (arXiv 2411.00776, section 3.2).

B examples of this rank, L codes of an image.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, log
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from llamagen.option_checks import check_integer
from llamagen.sampling.noise import code_counters, gumbel, seed_tensor

_VALIDATION_SEED, _VALIDATION_STEP = 0x0DE2, -1


@dataclass(frozen=True)
class GenerationOrder:
    """When examples are trained in random orders. An int counts optimizer steps, a float is a share of the run.

    Each example is permuted with a probability, which is 1 until ``random_until``, then falls linearly, and is 0 from
    ``raster_from`` on.

    Args:
        random_until: steps, or share of the run in [0, 1].
        raster_from: steps, or share of the run in [0, 1]; not before ``random_until``. 1.0 with ``random_until: 1.0``
            trains in random orders to the end.
    """

    random_until: int | float = 0.5
    raster_from: int | float = 0.75

    def __post_init__(self) -> None:
        """Check the ranges of both values, and their order if they have the same unit."""
        for name in ("random_until", "raster_from"):
            value = getattr(self, name)
            if isinstance(value, float):
                if not 0.0 <= value <= 1.0:
                    raise ValueError(
                        f"order.{name} is {value}; a share of the run is between 0.0 and 1.0, and a number of steps an "
                        "integer"
                    )
            else:
                check_integer(f"order.{name}", value, 0)
        if isinstance(self.random_until, float) == isinstance(self.raster_from, float):
            self._check(self.random_until, self.raster_from)

    def _check(self, random_until: float, raster_from: float, unit: str = "") -> None:
        if raster_from < random_until:
            raise ValueError(
                f"order.raster_from is {self.raster_from}, before order.random_until, {self.random_until}{unit}; "
                "give a later one"
            )

    def bounds(self, total_steps: float) -> tuple[float, float]:
        """Both values in optimizer steps.

        Args:
            total_steps: steps of the run; may be infinite if both values are steps.

        Raises:
            ValueError: if a share has no end to refer to, or ``raster_from`` is before ``random_until``.
        """
        if total_steps == inf and any(isinstance(each, float) for each in (self.random_until, self.raster_from)):
            raise ValueError(
                f"order has shares of the run ({self.random_until}, {self.raster_from}), but the run has no end; set "
                "trainer.max_epochs or trainer.max_steps, or give steps"
            )
        start, end = (
            each * total_steps if isinstance(each, float) else float(each)
            for each in (self.random_until, self.raster_from)
        )
        self._check(start, end, f" (steps {end:g} and {start:g} of {total_steps:g})")
        return start, end

    def probability(self, step: int, total_steps: float) -> float:
        """Probability with which an example is permuted at an optimizer step, counted from 0."""
        start, end = self.bounds(total_steps)
        if step < start:
            return 1.0
        return 0.0 if step >= end else 1.0 - (step - start) / (end - start)


def training_orders(batch: dict[str, Any], seed: int, step: int, probability: float) -> Tensor:
    """Orders of a training batch, see :func:`generation_orders`: (B, L) int64 for ``batch["codes"]`` (B, L)."""
    codes: Tensor = batch["codes"]
    numbers = example_numbers(batch, len(codes), codes.device)
    return generation_orders(numbers, seed, step, probability, codes.shape[1])


def validation_orders(batch: dict[str, Any]) -> Tensor:
    """Random orders of a batch of validation or test, (B, L) int64. They depend only on the example."""
    return training_orders(batch, _VALIDATION_SEED, _VALIDATION_STEP, 1.0)


def example_numbers(batch: dict[str, Any], count: int, device: torch.device) -> Tensor:
    """Numbers that identify the examples of a batch on any number of ranks: (B,) int64, checksums of their keys.

    Args:
        batch: the batch; without ``keys`` the examples are numbered.
        count: B.
        device: device of the result.
    """
    keys = batch.get("keys")
    if not isinstance(keys, Sequence):
        return torch.arange(count, device=device)
    return torch.tensor([crc32(str(key).encode()) for key in keys], dtype=torch.int64, device=device)


def generation_orders(numbers: Tensor, seed: int, step: int, probability: float, length: int) -> Tensor:
    """Orders in which examples are generated: a pure function of seed, step and example.

    Args:
        numbers: (B,) int64, see :func:`example_numbers`.
        seed: seed of the run.
        step: optimizer step.
        probability: probability of a random order; others are in raster order.
        length: L.

    Returns:
        (B, L) int64; entry t of a row is the raster position of the code that is generated at step t.
    """
    device = numbers.device
    raster = torch.arange(length, device=device).expand(len(numbers), -1)
    if probability <= 0.0:
        return raster
    at = torch.tensor(step, device=device)
    noise = gumbel(seed_tensor(seed, device), numbers, at, code_counters(length + 1, device))
    random = noise[:, :length].argsort(dim=1, stable=True)
    if probability >= 1.0:
        return random
    permuted = noise[:, length] < -log(-log(probability))  # P(noise < x) = exp(−exp(−x))
    return torch.where(permuted[:, None], random, raster)
