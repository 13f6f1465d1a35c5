"""Compiled sampling while a model is evaluated."""

import time
from typing import Literal

import lightning.pytorch as pl
import torch

from callbacks.protocols import ImageRequests, KeepsSampler, datamodule, optional, require
from llamagen.models.gpt import GPT
from llamagen.sampling import ImageSampler, compute_dtype
from llamagen.sampling.automatic import prepared, should_compile, try_compiled

DEFAULT_BATCH_SIZE = 64


class CompiledSampling(pl.Callback):
    """In validation, test and predict, sample images by compiled steps with a static cache.

    The sampler is built at the start of such a stage, for the weights that are evaluated (the averages, with the
    ``EMA`` callback), and is used by sample grids, FID and predict. At the end of the stage its memory is freed for
    training. Models that are not compiled also keep one sampler, with one cache, for the whole stage.

    Args:
        enabled: ``auto`` compiles models of at least 20 million parameters on CPUs with a C++ compiler and on NVIDIA
            GPUs. ``true`` compiles any model, or raises an error; ``false`` never compiles.
        batch_size: images sampled at a time on each rank; by default the batch size of data that requests images, and
            64 with other data.
        int8: store matrices of compiled steps as int8: faster, with slightly different images. Compiles any model, or
            raises an error.
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

    def _should_compile(self, gpt: GPT) -> bool:
        return should_compile(gpt) if self.enabled == "auto" else self.enabled

    def _batch_size(self, trainer: pl.Trainer) -> int:
        if self.batch_size is not None:
            return self.batch_size
        requests = optional(ImageRequests, datamodule(trainer))
        return DEFAULT_BATCH_SIZE if requests is None else requests.batch_size

    def _build(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        module = require(KeepsSampler, pl_module, self)
        if trainer.sanity_checking or not (module.can_sample or self.enabled is True):
            return
        batch_size, started = self._batch_size(trainer), time.perf_counter()
        with trainer.precision_plugin.forward_context():
            if self._should_compile(module.generator):
                dtype = str(compute_dtype(module.generator)).removeprefix("torch.")
                weights = ", int8 weights" if self.int8 else ""
                self._print(trainer, f"compiling sampling in {dtype}{weights}, {batch_size} images at a time")
                module.sampler = self._compile(module, batch_size)
                if module.sampler is not None:
                    self._print(trainer, f"compiled sampling is ready after {time.perf_counter() - started:.1f} s")
                    return
            module.sampler = module.build_sampler(batch_size, compiled=False, int8=False)

    def _compile(self, module: KeepsSampler, batch_size: int) -> ImageSampler | None:
        """A compiled sampler. With ``auto``, None after a warning if it cannot be compiled."""

        def build() -> ImageSampler:
            return module.build_sampler(batch_size, compiled=True, int8=self.int8)

        return (try_compiled if self.enabled == "auto" else prepared)(build, module.sampling)

    @staticmethod
    def _print(trainer: pl.Trainer, message: str) -> None:
        if trainer.is_global_zero:
            print(message, flush=True)

    @staticmethod
    def _free(pl_module: pl.LightningModule) -> None:
        module = optional(KeepsSampler, pl_module)
        if module is not None and module.sampler is not None:
            module.sampler = None
            if torch.cuda.is_available():
                torch.cuda.empty_cache()  # training cannot reuse the memory pool of CUDA graphs

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check the module.

        Raises:
            ValueError: if it samples no images.
        """
        require(KeepsSampler, pl_module, self)

    # Footgun: the sampler copies weights, so it is built at the start of the epoch, not of the stage. EMA swaps the
    # weights at the start of the stage, and its hook may run before or after that of this callback.

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
        """Free the sampler."""
        self._free(pl_module)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Free the sampler."""
        self._free(pl_module)

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Free the sampler."""
        self._free(pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Free the sampler."""
        self._free(pl_module)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Free the sampler."""
        self._free(pl_module)
