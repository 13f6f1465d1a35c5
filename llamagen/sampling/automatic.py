"""Compiled sampling where it pays, for callbacks and Python."""

from collections.abc import Callable
from typing import Protocol, TypeVar

import torch

from llamagen.models.gpt import GPT
from llamagen.models.sharding import is_sharded
from llamagen.rank_zero import warn_on_rank_zero
from llamagen.sampling.config import SamplingConfig

MIN_PARAMETERS = 20_000_000
"""Number of parameters above which compiled steps save more time than compiling takes."""


class Prepared(Protocol):
    """A sampler, with or without pixels."""

    def prepare(self, config: SamplingConfig) -> None:
        """Allocate memory and compile for calls with these settings."""


AnySampler = TypeVar("AnySampler", bound=Prepared)


def should_compile(gpt: GPT) -> bool:
    """Whether compiled sampling is possible and pays.

    That is: not sharded, without factorised prediction, on a CPU or a GPU (there without adaptive norms), from 20
    million parameters.
    """
    if gpt.config.code_factors is not None:
        return False
    large = sum(parameter.numel() for parameter in gpt.parameters()) >= MIN_PARAMETERS
    devices = ("cpu",) if gpt.config.adaptive_norm else ("cpu", "cuda")
    return large and not is_sharded(gpt) and gpt.output.weight.device.type in devices


def prepared(build: Callable[[], AnySampler], config: SamplingConfig) -> AnySampler:
    """Build a sampler and prepare it for calls with these settings."""
    sampler = build()
    sampler.prepare(config)
    return sampler


def try_compiled(build: Callable[[], AnySampler], config: SamplingConfig) -> AnySampler | None:
    """Build and prepare a compiled sampler, or warn.

    Args:
        build: builds the sampler.
        config: settings of the first calls.

    Returns:
        The sampler; None after a warning with the reason if it cannot be compiled (compiler, driver, memory). Then
        sample without compiling.
    """
    try:
        return prepared(build, config)
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # memory of graphs is not reused by anything else
    warn_on_rank_zero(f"sampling is not compiled: {reason}")
    return None
