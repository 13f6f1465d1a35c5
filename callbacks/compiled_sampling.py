"""Compiled sampling while a model is evaluated."""

import time
from typing import Any, Literal, Protocol, cast

import lightning.pytorch as pl
import torch
from lightning_utilities.core.rank_zero import rank_zero_warn

from llamagen.models.sharding import is_sharded
from llamagen.sampling import ImageSampler, SamplingConfig, compute_dtype

WORTHWHILE = 20_000_000
"""Parameters from which on steps that are compiled save more than compiling takes."""


class KeepsASampler(Protocol):
    """A module that draws images with a sampler that it is given."""

    gpt: Any
    can_sample: bool
    sampler: ImageSampler | None
    sampling: SamplingConfig

    def build_sampler(self, batch_size: int, compiled: bool, int8: bool) -> ImageSampler:
        """A new sampler."""


class CompiledSampling(pl.Callback):
    """While the model is validated, tested or predicts, draw its images by compiled steps with a static cache.

    When such a stage begins, the sampler is built for the weights that are evaluated (with the ``EMA`` callback the
    averages), and serves all who draw: sample grids, FID, predict. When it ends, its memory is freed: training takes as
    much as without. Where nothing is compiled the sampler still serves all calls with the same memory.

    Args:
        enabled: ``auto`` compiles for models of 20 million parameters and more, if it can be done here: on CPUs with a
            C++ compiler, on NVIDIA GPUs. ``true`` does so for any model, or fails; ``false`` never does.
        batch_size: images that are drawn together on each rank; by default those of a batch, where the data ask
            for images, and 64 elsewhere.
        int8: let compiled steps read the matrices as int8: less to read, and slightly other images. Compiles any
            model, or fails.
    """

    def __init__(
        self,
        enabled: Literal["auto"] | bool = "auto",
        batch_size: int | None = None,
        int8: bool = False,
    ) -> None:
        super().__init__()
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1, or null")
        if int8 and enabled is False:
            raise ValueError("int8 is true, but compiled sampling is not enabled; set enabled to auto or true")
        self.enabled = True if int8 else enabled
        self.batch_size, self.int8 = batch_size, int8

    def _wanted(self, module: KeepsASampler) -> bool:
        if self.enabled != "auto":
            return bool(self.enabled)
        large = sum(parameter.numel() for parameter in module.gpt.parameters()) >= WORTHWHILE
        return large and not is_sharded(module.gpt) and module.gpt.output.weight.device.type in ("cpu", "cuda")

    def _build(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        module = cast(KeepsASampler, pl_module)
        if trainer.sanity_checking or not (module.can_sample or self.enabled is True):
            return
        data = getattr(trainer, "datamodule", None)
        asked = trainer.predicting or (trainer.testing and hasattr(data, "labels"))  # by data that ask for images
        predicted = getattr(data, "batch_size", None) if asked else None
        batch_size, started = self.batch_size or predicted or 64, time.perf_counter()
        with trainer.precision_plugin.forward_context():
            if self._wanted(module):
                how = f"{str(compute_dtype(module.gpt)).removeprefix('torch.')}{', int8 weights' if self.int8 else ''}"
                self._say(trainer, f"compiling the sampling in {how}, {batch_size} images at a time")
                try:
                    module.sampler = module.build_sampler(batch_size, compiled=True, int8=self.int8)
                    module.sampler.prepare(module.sampling)
                    self._say(trainer, f"compiled sampling is ready after {time.perf_counter() - started:.1f} s")
                    return
                except Exception as error:  # of compilers, drivers, memory: sampling goes without
                    self._free(pl_module)
                    if self.enabled != "auto":
                        raise
                    rank_zero_warn(f"sampling is not compiled: {type(error).__name__}: {error}")
            module.sampler = module.build_sampler(batch_size, compiled=False, int8=False)

    @staticmethod
    def _say(trainer: pl.Trainer, message: str) -> None:
        if trainer.is_global_zero:
            print(message, flush=True)

    @staticmethod
    def _free(pl_module: pl.LightningModule) -> None:
        module = cast(KeepsASampler, pl_module)
        if getattr(module, "sampler", None) is not None:
            module.sampler = None
            if torch.cuda.is_available():
                torch.cuda.empty_cache()  # what graphs had is of no use to training

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse a module that draws no images.

        Raises:
            ValueError: in one line.
        """
        if not hasattr(pl_module, "build_sampler"):
            raise ValueError(f"{type(pl_module).__name__} draws no images; leave out CompiledSampling")

    # At the start of the epoch, when all callbacks have seen the start of the stage: EMA has exchanged the weights.

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Build the sampler."""
        self._build(trainer, pl_module)

    def on_test_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Build the sampler."""
        self._build(trainer, pl_module)

    def on_predict_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Build the sampler."""
        self._build(trainer, pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Free it."""
        self._free(pl_module)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Free it."""
        self._free(pl_module)

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Free it."""
        self._free(pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Free it."""
        self._free(pl_module)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Free it."""
        self._free(pl_module)
