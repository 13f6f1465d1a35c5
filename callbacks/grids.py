"""Grids of images while a model trains. B batch, H × W pixels."""

from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor

from callbacks.figures import batches_seen, publish
from callbacks.protocols import (
    CleansCaptions,
    ReconstructsImages,
    SamplesImages,
    datamodule,
    optional,
    require,
)
from llamagen.grids import captioned_grid, grid_image
from llamagen.models.sharding import is_sharded
from llamagen.models.vqgan import to_uint8
from llamagen.text import clean_caption


class ReconstructionGrid(pl.Callback):
    """Save a grid of images above their reconstructions at each validation, and optionally while training.

    The images are the first ones of the validation data or, before the first validation, of the training batch.

    Args:
        count: number of images.
        every_n_batches: number of training batches after which a grid is saved, too, with the current weights instead
            of their average; 0 saves grids at validations only.
    """

    def __init__(self, count: int = 10, every_n_batches: int = 0) -> None:
        super().__init__()
        if count < 1 or every_n_batches < 0:
            raise ValueError(
                f"count is {count} and every_n_batches {every_n_batches}; they must be at least 1 and at least 0"
            )
        self.count, self.every_n_batches = count, every_n_batches
        self._images: Tensor | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check the module.

        Raises:
            ValueError: if it reconstructs no images.
        """
        require(ReconstructsImages, pl_module, self)

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: dict[str, Any],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Save the grid of the first batch, on rank zero."""
        if batch_idx > 0 or not trainer.is_global_zero:
            return
        self._images = batch["images"][: self.count].clone()
        if not trainer.sanity_checking:
            self._save(trainer, pl_module, self._images)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save the grid every ``every_n_batches`` batches, on rank zero."""
        if self.every_n_batches and trainer.is_global_zero and batches_seen(trainer) % self.every_n_batches == 0:
            self._save(trainer, pl_module, batch["images"][: self.count] if self._images is None else self._images)

    @torch.no_grad()
    def _save(self, trainer: pl.Trainer, pl_module: pl.LightningModule, images: Tensor) -> None:
        training = pl_module.training
        pl_module.eval()
        with trainer.precision_plugin.forward_context():
            reconstructed = require(ReconstructsImages, pl_module, self).reconstruct(images)
        pl_module.train(training)
        rows = [list(to_uint8(x).permute(0, 2, 3, 1).cpu().numpy()) for x in (images, reconstructed)]
        publish(trainer, grid_image(rows), "reconstructions")


class SampleGrid(pl.Callback):
    """Save a grid of sampled images at validations, one row for each class or prompt, always with the same seed.

    Args:
        classes: list of classes, or their number: 10 means 0 to 9.
        per_class: images of each class or prompt.
        every_n_validations: sample at every n-th validation.
        seed: seed of the images.
        prompts: prompts of a text model, instead of classes; cleaned like the captions of the data.
    """

    def __init__(
        self,
        classes: int | list[int] = 8,
        per_class: int = 8,
        every_n_validations: int = 1,
        seed: int = 0,
        prompts: list[str] | None = None,
    ) -> None:
        super().__init__()
        self.prompts = prompts or []
        self.classes = list(range(classes)) if isinstance(classes, int) else list(classes)
        if not self.classes or per_class < 1 or every_n_validations < 1:
            raise ValueError(
                f"classes is {classes}, per_class {per_class} and every_n_validations {every_n_validations}; "
                "there must be at least one class, and the others must be at least 1"
            )
        self.per_class, self.every_n_validations, self.seed = per_class, every_n_validations, seed
        self._validations = 0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check before training, and not at the first validation, that the module can sample these images.

        Raises:
            ValueError: if it cannot.
        """
        require(SamplesImages, pl_module, self).check_requests([] if self.prompts else self.classes, self.prompts)
        self._cleaned_prompts(trainer)  # raises now if a package is missing

    def state_dict(self) -> dict[str, Any]:
        """Number of validations."""
        return {"validations": self._validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue counting."""
        self._validations = state_dict["validations"]

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Sample and save the grid, on rank zero; with a sharded model all ranks sample."""
        if trainer.sanity_checking:
            return
        self._validations += 1
        if self._validations % self.every_n_validations or not (trainer.is_global_zero or is_sharded(pl_module)):
            return
        module = require(SamplesImages, pl_module, self)
        condition, lengths, _ = module.batch_condition(self._requests(trainer, module))
        condition = condition.repeat_interleave(self.per_class, 0)
        lengths = None if lengths is None else lengths.repeat_interleave(self.per_class, 0)
        with trainer.precision_plugin.forward_context():
            indices = torch.arange(len(condition), device=module.device)
            images, _ = module.sample(condition, indices, self.seed, lengths)
        pixels = images.cpu().numpy()
        rows = [list(row) for row in np.split(pixels, len(pixels) // self.per_class)]
        if not trainer.is_global_zero:
            return
        captions = [[prompt] * self.per_class for prompt in self.prompts]
        publish(trainer, captioned_grid(rows, captions) if captions else grid_image(rows), "samples")

    def _requests(self, trainer: pl.Trainer, module: SamplesImages) -> dict[str, Any]:
        if not self.prompts:
            return {"condition": torch.tensor(self.classes, device=module.device)}
        return {"captions": self._cleaned_prompts(trainer)}

    def _cleaned_prompts(self, trainer: pl.Trainer) -> list[str]:
        data = optional(CleansCaptions, datamodule(trainer))
        return [clean_caption(prompt, None if data is None else data.cleaning) for prompt in self.prompts]
