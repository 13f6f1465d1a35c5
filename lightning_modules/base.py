"""Base of the modules that are trained: seeds of steps, logging, gradient clipping, checks, and checkpoints."""

import os
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_modules.optimization import AdamWConfig, build_adamw
from llamagen.checkpoints.contents import check_fits, describe
from llamagen.checkpoints.weights import ENTRY
from llamagen.finite import find_source, not_finite_error
from llamagen.models.gpt import GPT
from llamagen.models.vqgan import VQGAN

_ON_META_DEVICE: ContextVar[bool] = ContextVar("on meta device", default=False)


@contextmanager
def models_on_meta_device() -> Iterator[None]:
    """Within this context, modules build shardable models on the meta device, without memory.

    ``configure_model`` allocates and initialises them. Everything else in a module is built as usual.
    """
    token = _ON_META_DEVICE.set(True)
    try:
        yield
    finally:
        _ON_META_DEVICE.reset(token)


def model_device() -> AbstractContextManager[Any]:
    """Context in which a module builds a shardable model, see :func:`models_on_meta_device`."""
    return torch.device("meta") if _ON_META_DEVICE.get() else nullcontext()


class GenerativeModule(pl.LightningModule):
    """Base of :class:`VQGANModule` and :class:`ARGenModule`.

    The random numbers of a training step (dropout, dropped conditions) depend only on seed, step and rank. So a resumed
    run equals an uninterrupted one, even if validation or a callback used random numbers in between. The seed is that
    of ``seed_everything`` and is saved in the checkpoint.

    The x axis of all logged metrics is the number of batches that a rank has seen.

    Attributes:
        max_grad_norm: norm of the gradient, before clipping, above which the run counts as diverged; None for no limit.
        skip_bad_steps: skip steps with a gradient that is not finite or above ``max_grad_norm``, instead of stopping.

    Args:
        optimizer: settings of AdamW.
    """

    max_grad_norm: float | None = None
    skip_bad_steps: bool = False

    def __init__(self, optimizer: AdamWConfig) -> None:
        super().__init__()
        self.optimizer_config = optimizer
        self._step_seed: int | None = None

    @property
    @abstractmethod
    def generator(self) -> GPT | VQGAN:
        """The network that is used after training. EMA averages it, and checkpoints describe it."""

    @property
    @abstractmethod
    def networks(self) -> dict[str, nn.Module]:
        """All trained networks by name, as in ``train/grad_norm_NAME``."""

    @abstractmethod
    def metric_names(self) -> list[str]:
        """Names of the metrics logged at each validation, which callbacks may monitor."""

    @property
    def generator_prefix(self) -> str:
        """Prefix of the generator's weights in the state dict."""
        return next(f"{name}." for name, module in self.named_children() if module is self.generator)

    def setup(self, stage: str) -> None:
        """Check the precision of training.

        Raises:
            ValueError: in one line, if it is ``16-true``.
        """
        if stage == "fit" and self.trainer.precision == "16-true":
            raise ValueError(
                "trainer.precision is 16-true, in which activations overflow and small updates of the weights are "
                "lost; train in bf16-mixed, 16-mixed or 32-true"
            )

    def configure_model(self) -> None:
        """Check that parameters are not sharded; modules that support it override this.

        Raises:
            ValueError: in one line, if they are.
        """
        if self.device_mesh is not None:
            raise ValueError(
                f"{type(self).__name__} is small enough for each GPU; set trainer.strategy to ddp, not to one that "
                "shards parameters"
            )

    def on_fit_start(self) -> None:
        """Set the seed of the run, unless it came from a checkpoint."""
        if self._step_seed is None:
            self._step_seed = int(os.environ.get("PL_GLOBAL_SEED", torch.initial_seed() % 2**31))

    def on_train_start(self) -> None:
        """Warn if an epoch has fewer batches than ``accumulate_grad_batches``."""
        batches, wanted = self.trainer.num_training_batches, self.trainer.accumulate_grad_batches
        if batches < wanted:
            rank_zero_warn(
                f"accumulate_grad_batches is {wanted}, but an epoch has {batches} batches, and Lightning takes a step "
                f"at its end anyway: the gradient is {batches}/{wanted} of the mean; set it to at most {batches}"
            )

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed the random numbers of the step, and log the learning rate."""
        assert self._step_seed is not None
        micro_batch = batch_idx % max(self.trainer.accumulate_grad_batches, 1)
        counters = [self._step_seed, self.global_step, micro_batch, self.global_rank]
        torch.manual_seed(int(np.random.SeedSequence(counters).generate_state(1, np.uint64)[0] >> 1))
        self._log_batches_seen()
        self.log("train/lr", self.lr_schedulers().get_last_lr()[0])  # type: ignore[union-attr]

    def on_train_epoch_end(self) -> None:
        """Log the x axis and the skipped examples of the epoch."""
        self._log_batches_seen()
        self._log_skipped("train")

    def on_validation_epoch_end(self) -> None:
        """Log the x axis and the skipped examples of the validation."""
        self._log_batches_seen()
        self._log_skipped("val")

    def on_test_epoch_end(self) -> None:
        """Log the x axis and the skipped examples of the test, which reads the split ``val``."""
        self._log_batches_seen()
        self._log_skipped("val")

    def _log_skipped(self, split: str) -> None:
        datamodule: Any = getattr(self.trainer, "datamodule", None)
        if split not in getattr(datamodule, "tallies", ()):
            return
        examples = [
            example.message for example in (*datamodule.tallies[split].skipped, *datamodule.tallies[split].rejected)
        ][:1]
        counts = datamodule.finish_tally(split)  # over all ranks, so each logs the same
        for reason, count in counts.items():
            self.log(f"skipped/{split}/{reason.replace(' ', '_')}", float(count))
        if counts:
            reasons = ", ".join(f"{reason}: {count}" for reason, count in counts.items())
            details = "; e.g. ".join([reasons, *examples])
            rank_zero_warn(f"{sum(counts.values())} examples of {split} were skipped in this epoch ({details})")

    def _log_batches_seen(self) -> None:
        # Lightning uses a logged value named "step" as the x axis of its loggers.
        self.log("step", float(self.trainer.fit_loop.epoch_loop.total_batch_idx + 1))

    @property
    def scaler(self) -> Any:
        """The GradScaler of a run in 16-mixed, else None."""
        return getattr(self.trainer.precision_plugin, "scaler", None)

    @property
    def precision_name(self) -> str:
        """The trainer's precision or, without one, the dtype of the weights."""
        return str(self.dtype).removeprefix("torch.") if self._trainer is None else str(self.trainer.precision)

    def check_finite(self, broken: dict[str, Tensor], during: str = "") -> None:
        """Stop all ranks together if a loss term is not finite on any of them, so that none waits for another.

        Args:
            broken: scalar bool by name of the term, True if it is not finite on this rank.
            during: phase, for the message.

        Raises:
            FloatingPointError: on all ranks, with the names of the terms, if one is not finite.
        """
        flags = torch.stack(list(broken.values()))
        if self.trainer.world_size > 1:
            flags = self.trainer.strategy.reduce(flags.float(), reduce_op="sum") > 0
        if flags.any():
            names = [name for name, bad in zip(broken, flags.tolist(), strict=True) if bad]
            raise FloatingPointError(
                f"{', '.join(names)} not finite{during} at step {self.global_step}; resume from the last checkpoint, "
                "if there is one, with a lower learning rate, another seed, or in 32-true"
            )

    def stop_unless_finite(self, broken: dict[str, Tensor], run: Callable[[], Any]) -> None:
        """Check the results of an evaluation batch.

        During ``fit`` on several ranks this does nothing: ranks may have different numbers of validation batches, so
        :meth:`check_finite` stops all of them at the end of the validation. In other stages an error on one rank ends
        the processes of all ranks.

        Args:
            broken: scalar bool by name of the value, True if it is not finite.
            run: computes the values again, to find the layer.

        Raises:
            FloatingPointError: with names, stage, batch, precision and layer or weight, if a value is not finite.
        """
        attached = self._trainer is not None
        if attached and self.trainer.state.fn == "fit":
            if self.trainer.world_size == 1:
                self.check_finite(broken, " in validation")
            return
        flags = torch.stack(list(broken.values()))
        if self.device_mesh is not None:  # sharded: all ranks run each layer together, so all must stop
            flags = self.trainer.strategy.reduce(flags.float(), reduce_op="sum") > 0
        if flags.any():
            names = [name for name, bad in zip(broken, flags.tolist(), strict=True) if bad]
            source = find_source(self.generator, run if self.device_mesh is None else None)
            raise not_finite_error(
                f"{', '.join(names)} {'is' if len(names) == 1 else 'are'}",
                self.precision_name,
                source,
                where=self._stage_and_batch() if attached else "",
            )

    def _stage_and_batch(self) -> str:
        stage = self.trainer.state.fn
        if stage is None:
            return ""
        loop = {"validate": self.trainer.validate_loop, "test": self.trainer.test_loop}.get(
            stage.value, self.trainer.predict_loop
        )
        return f" in {stage.value}, batch {loop.batch_progress.current.ready - 1}"

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Log the gradient norm of each network, and clip each network separately.

        A large gradient of the discriminator then does not scale down that of the tokenizer, nor the reverse.

        Args:
            optimizer: unused.
            gradient_clip_val: maximum; None or 0 for no clipping.
            gradient_clip_algorithm: ``value`` clips each entry, otherwise the norm is clipped.

        Raises:
            FloatingPointError: unless ``skip_bad_steps`` is set, if a gradient is not finite or above
                ``max_grad_norm``. With a GradScaler, which skips steps that are not finite, only the latter.
        """
        for name, network in self.networks.items():
            self._clip(name, network, gradient_clip_val, gradient_clip_algorithm)

    def _clip(self, name: str, network: nn.Module, maximum: float | None, algorithm: str | None) -> None:
        gradients = [p.grad for p in network.parameters() if p.grad is not None]
        if not gradients:
            return
        local_norm = nn.utils.get_total_norm(gradients)  # a partial DTensor if gradients are sharded
        norm = local_norm.full_tensor() if isinstance(local_norm, DTensor) else local_norm
        self.log(f"train/grad_norm_{name}", norm)
        fault = ""
        if not norm.isfinite():
            fault = "is not finite" if self.scaler is None else ""
        elif self.max_grad_norm is not None and norm > self.max_grad_norm:
            fault = f"has a norm of {norm:.4g}, above max_grad_norm {self.max_grad_norm:g},"
        if self.skip_bad_steps:
            self.log("train/skipped_steps", float(bool(fault)), on_step=True)
        if fault and self.skip_bad_steps:  # without gradients AdamW changes neither weights nor moments
            network.zero_grad(set_to_none=True)
            return
        if fault:
            raise FloatingPointError(
                f"the gradient of the {name} {fault} at step {self.global_step}; its weights are still those of the "
                "step before. Resume from the last checkpoint with a lower learning rate or another seed"
            )
        if maximum and algorithm == "value":
            nn.utils.clip_grad_value_(network.parameters(), maximum)
        elif maximum:
            nn.utils.clip_grads_with_norm_(network.parameters(), maximum, local_norm)

    def configure_optimizers(self) -> Any:
        """One AdamW over all trained networks, with its schedule."""
        total = self.trainer.estimated_stepping_batches if self.optimizer_config.schedule == "cosine" else float("inf")
        return build_adamw(
            self.networks.values(), self.optimizer_config, total, fused=self.trainer.precision != "16-mixed"
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Describe the model in the checkpoint, in primitives only, so that it loads with ``weights_only``."""
        checkpoint.setdefault(ENTRY, {}).update(describe(self.generator, self.generator_prefix))
        checkpoint[ENTRY]["step_seed"] = self._step_seed

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint is of this model, before anything is changed; correct Lightning's counters.

        Raises:
            ValueError: in one line with the difference, if it is not.
        """
        check_fits(checkpoint, self.generator)
        _reopen_epoch(checkpoint)
        _close_epoch(checkpoint)
        self._recount_batches(checkpoint)
        self._step_seed = checkpoint[ENTRY]["step_seed"]
        if self.trainer.state.fn != "fit" and "loops" in checkpoint:  # else Lightning restores it
            seen = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["ready"]
            self.trainer.fit_loop.epoch_loop.batch_progress.total.ready = seen

    def _recount_batches(self, checkpoint: dict[str, Any]) -> None:
        """Convert the number of batches done in the epoch to the current number of ranks and batch size.

        Lightning counts the batches of a rank, and ends the epoch when the count reaches their total number. If the
        checkpoint was saved with another number of ranks or batch size, the epoch would end too early or too late.
        """
        datamodule: Any = getattr(self.trainer, "datamodule", None)
        if self.trainer.state.fn != "fit" or "loops" not in checkpoint or not hasattr(datamodule, "batches_done"):
            return
        done, total = datamodule.batches_done(checkpoint.get(type(datamodule).__qualname__, {})) or (0, 0)
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        if 0 < done < total and not progress["is_last_batch"]:
            # Added to all counters: Lightning relies on the differences between them.
            shift = done - progress["current"]["ready"]
            for state in progress["current"]:
                progress["current"][state] += shift


def _reopen_epoch(checkpoint: dict[str, Any]) -> None:
    """Let a run that ``max_steps`` stopped within an epoch resume in it: Lightning counts that epoch as finished."""
    if "loops" not in checkpoint:  # weights only
        return
    loop = checkpoint["loops"]["fit_loop"]
    batch = loop["epoch_loop.batch_progress"]
    if batch["current"]["ready"] > 0 and not batch["is_last_batch"]:
        for span in ("total", "current"):
            epochs = loop["epoch_progress"][span]
            epochs["processed"] = epochs["completed"] = epochs["ready"] - 1


def _close_epoch(checkpoint: dict[str, Any]) -> None:
    """Let a run that was saved at the end of an epoch resume with the first batch of the next one.

    If no validation ran in that epoch (``check_val_every_n_epoch``, ``limit_val_batches: 0``) and ``max_steps`` is set,
    Lightning would train one batch of the next epoch, count it as part of the previous one, and skip the rest.
    """
    if "loops" not in checkpoint:  # weights only
        return
    loop = checkpoint["loops"]["fit_loop"]
    batch, epochs = loop["epoch_loop.batch_progress"], loop["epoch_progress"]
    batch_is_done = batch["is_last_batch"] and batch["total"]["completed"] == batch["total"]["ready"]
    if not batch_is_done or epochs["total"]["processed"] < epochs["total"]["ready"]:
        return
    for span in ("total", "current"):
        epochs[span]["completed"] = epochs[span]["ready"]
    batch["current"] = dict.fromkeys(batch["current"], 0)
    batch["is_last_batch"] = False
