"""Exponential moving average of the generator's parameters."""

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from callbacks.protocols import EvaluatesStages, HasGenerator, require
from llamagen.checkpoints.contents import read_checkpoint
from llamagen.checkpoints.weights import EMA_STATE, ENTRY, averaged_weights
from llamagen.distributed.full_tensor import copy_full_
from llamagen.models.sharding import is_sharded, reshard


class EMA(pl.Callback):
    """Average the generator's parameters over the optimizer's steps; validate, test and predict with the average.

    The average is part of the optimizer's state of each parameter, next to its moments. So it is saved, restored and
    moved with them, steps that the optimizer skips do not count, and accumulated gradients count once. The
    discriminator, LPIPS and buffers are not averaged.

    Args:
        decay: weight of the old average in each step; 0.9999 in the paper. For a run of n steps, at most about
            ``1 − 10 / n``.
        validate_raw: during training, validate the raw weights as well, under ``val_raw/``; a validation then takes
            twice as long.
    """

    def __init__(self, decay: float = 0.9999, validate_raw: bool = False) -> None:
        super().__init__()
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"decay is {decay}; it must be at least 0 and below 1")
        self.decay, self.validate_raw = decay, validate_raw
        self._parameters: list[nn.Parameter] = []
        self._names: list[str] = []
        self._generator: nn.Module | None = None
        self._optimizer: Optimizer | None = None
        self._initial: list[Tensor] = []
        self._handles: list[Any] = []
        self._swapped = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check the module.

        Raises:
            ValueError: if it has no generator, or ``validate_raw`` is set and it cannot evaluate further stages.
        """
        require(HasGenerator, pl_module, self)
        if self.validate_raw:
            require(EvaluatesStages, pl_module, "EMA.validate_raw", "set validate_raw to false")

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Register the hooks that average after each step of the optimizer."""
        self._generator = require(HasGenerator, pl_module, self).generator
        averaged = {id(parameter) for parameter in self._generator.parameters() if parameter.requires_grad}
        self._optimizer = trainer.optimizers[0]
        names = {id(parameter): name for name, parameter in pl_module.named_parameters()}
        self._names = [names[id(parameter)] for parameter in _ordered_parameters(self._optimizer)]
        self._parameters = [p for p in _ordered_parameters(self._optimizer) if id(p) in averaged]
        self._handles = [
            self._optimizer.register_step_pre_hook(self._before_step),
            self._optimizer.register_step_post_hook(self._after_step),
        ]

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        # The average starts from the weights before the first step. Footgun: they must not enter the optimizer's state
        # yet, because AdamW initialises its moments only while the state is empty.
        if not self._has_average():
            self._initial = [parameter.detach().clone() for parameter in self._parameters]

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if all(parameter.grad is None for parameter in self._parameters):  # a skipped step does not count
            return
        if self._initial:
            for parameter, initial in zip(self._parameters, self._initial, strict=True):
                optimizer.state[parameter][EMA_STATE] = initial
            self._initial = []
        averages = [optimizer.state[parameter][EMA_STATE] for parameter in self._parameters]
        torch._foreach_lerp_(averages, [parameter.detach() for parameter in self._parameters], 1.0 - self.decay)

    def _has_average(self) -> bool:
        assert self._optimizer is not None
        return bool(self._parameters) and EMA_STATE in self._optimizer.state[self._parameters[0]]

    @torch.no_grad()
    def _swap(self) -> None:
        """Swap weights and averages in place, one tensor at a time: graphs and shards point to their storage."""
        if self._optimizer is None or not self._has_average():
            return
        assert self._generator is not None
        reshard(self._generator)
        for parameter in self._parameters:
            average, weights = self._optimizer.state[parameter][EMA_STATE], parameter.detach()
            kept = weights.clone()
            weights.copy_(average)
            average.copy_(kept)
        self._swapped = not self._swapped

    def _swap_back(self) -> None:
        if self._swapped:
            self._swap()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Validate with the average."""
        self._swap()

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Evaluate the batch with the raw weights as well, if ``validate_raw``."""
        if self.validate_raw and self._swapped:
            self._swap()
            with trainer.precision_plugin.forward_context():
                require(EvaluatesStages, pl_module, self).evaluate(batch, "val_raw")
            self._swap()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Swap the weights back for training."""
        self._swap_back()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Swap the weights back."""
        self._swap_back()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Remove the hooks."""
        self._swap_back()
        for handle in self._handles:
            handle.remove()
        self._handles, self._parameters, self._names = [], [], []
        self._optimizer = self._generator = None

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Store the names of the optimizer's parameters, which identify the averages without the model."""
        if self._optimizer is None:
            return
        if self._swapped:
            raise RuntimeError("a checkpoint was requested while the averages are swapped in for the weights")
        checkpoint.setdefault(ENTRY, {})["ema_names"] = list(self._names)

    @torch.no_grad()
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Outside of ``fit``, load the averages as the weights: there is no optimizer to hold both.

        Raises:
            ValueError: if the checkpoint has no averages.
        """
        if trainer.state.fn == "fit":
            return
        if is_sharded(require(HasGenerator, pl_module, self).generator):  # Lightning passes no full checkpoint
            path: Any = trainer.ckpt_path
            checkpoint = read_checkpoint(path, wanted=lambda name: name.endswith(f".{EMA_STATE}"))
        averages = averaged_weights(checkpoint)
        if not averages:
            raise ValueError("the checkpoint has no EMA weights; run without the EMA callback to use its raw weights")
        parameters = dict(pl_module.named_parameters())
        for name, average in averages.items():
            copy_full_(parameters[name], average)


def _ordered_parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    """Parameters in the order of the numbers in the optimizer's state dict."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
