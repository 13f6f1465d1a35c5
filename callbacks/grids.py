"""Images to look at while a model trains."""

from collections.abc import Sequence
from typing import Any, Protocol, cast

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor

from callbacks.figures import batches_seen, publish
from llamagen.grids import captioned_grid, grid_image
from llamagen.models.sharding import is_sharded
from llamagen.models.vqgan import to_uint8
from llamagen.text import clean_caption


class Reconstructs(Protocol):
    """A module that encodes and decodes images."""

    def reconstruct(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] → the same."""


class Samples(Protocol):
    """A module that draws images."""

    device: torch.device

    def check_requests(self, classes: Sequence[int], prompts: Sequence[str] = ()) -> None:
        """A ``ValueError`` if images of these classes or texts cannot be drawn."""

    def batch_condition(self, batch: dict[str, Any]) -> Any:
        """``condition`` (B,) or ``captions`` → ``features`` and ``lengths``, to sample with."""

    def sample(
        self, condition: Tensor, indices: Tensor, seed: int, caption_lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Conditions and sample numbers (B,) → images (B, H, W, 3) uint8 and codes."""


class ReconstructionGrid(pl.Callback):
    """Images above what the tokenizer makes of them: at each validation, and every so many batches if asked for.

    The images are the first ones of the validation set (before the first validation, of the training batch).

    Args:
        count: number of images.
        every_n_batches: draw also after each so many training batches, with the weights of that moment and not their
            average; 0 for validations only.
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
        """Refuse a module that reconstructs no images.

        Raises:
            ValueError: in one line.
        """
        if not hasattr(pl_module, "reconstruct"):
            raise ValueError(
                f"{type(pl_module).__name__} reconstructs no images; leave ReconstructionGrid out of trainer.callbacks"
            )

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: dict[str, Any],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Draw the grid from the first batch, on the first rank."""
        if batch_idx > 0 or not trainer.is_global_zero:
            return
        self._images = batch["images"][: self.count].clone()
        if not trainer.sanity_checking:
            self._draw(trainer, pl_module, self._images)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Draw the grid when it is time, on the first rank."""
        if self.every_n_batches and trainer.is_global_zero and batches_seen(trainer) % self.every_n_batches == 0:
            self._draw(trainer, pl_module, batch["images"][: self.count] if self._images is None else self._images)

    @torch.no_grad()
    def _draw(self, trainer: pl.Trainer, pl_module: pl.LightningModule, images: Tensor) -> None:
        training = pl_module.training
        pl_module.eval()
        with trainer.precision_plugin.forward_context():
            reconstructed = cast(Reconstructs, pl_module).reconstruct(images)
        pl_module.train(training)
        rows = [list(to_uint8(x).permute(0, 2, 3, 1).cpu().numpy()) for x in (images, reconstructed)]
        publish(trainer, grid_image(rows), "reconstructions")


class SampleGrid(pl.Callback):
    """At validations: images that the model draws, a row for each class or prompt, always with the same seed.

    Args:
        classes: which classes, or how many: 10 means 0 to 9.
        per_class: images of each, or of each prompt.
        every_n_validations: draw at every n-th validation.
        seed: of the draws.
        prompts: instead of classes: texts, for a text model; cleaned if the captions of the data are.
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
        """Find out now, not at the first validation, that the module cannot draw these images.

        Raises:
            ValueError: in one line.
        """
        if not hasattr(pl_module, "check_requests"):
            raise ValueError(f"{type(pl_module).__name__} samples no images; leave SampleGrid out of trainer.callbacks")
        cast(Samples, pl_module).check_requests([] if self.prompts else self.classes, self.prompts)

    def state_dict(self) -> dict[str, Any]:
        """How many validations there were."""
        return {"validations": self._validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self._validations = state_dict["validations"]

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw the grid, on the first rank; where no rank has the whole model, all take part."""
        if trainer.sanity_checking:
            return
        self._validations += 1
        if self._validations % self.every_n_validations or not (trainer.is_global_zero or is_sharded(pl_module)):
            return
        module = cast(Samples, pl_module)
        condition, lengths, _ = module.batch_condition(self._asked(trainer, module))
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

    def _asked(self, trainer: pl.Trainer, module: Samples) -> dict[str, Any]:
        if not self.prompts:
            return {"condition": torch.tensor(self.classes, device=module.device)}
        cleaned = getattr(getattr(trainer, "datamodule", None), "clean_captions", False)
        return {"captions": [clean_caption(prompt) for prompt in self.prompts] if cleaned else self.prompts}
