"""What both modules share: a step's randomness is its own, and a checkpoint says what it holds."""

import os
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
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
from llamagen.finite import culprit, refusal
from llamagen.models.gpt import GPT
from llamagen.models.vqgan import VQGAN

_WITHOUT_MEMORY: ContextVar[bool] = ContextVar("without memory", default=False)


@contextmanager
def models_without_memory() -> Iterator[None]:
    """Within it, modules build models that can be spread over ranks on the meta device; what surrounds them is usual.

    Such a model gets its memory in ``configure_model``.
    """
    token = _WITHOUT_MEMORY.set(True)
    try:
        yield
    finally:
        _WITHOUT_MEMORY.reset(token)


def model_device() -> AbstractContextManager[Any]:
    """Where a module builds a model that can be spread over ranks: see :func:`models_without_memory`."""
    return torch.device("meta") if _WITHOUT_MEMORY.get() else nullcontext()


class GenerativeModule(pl.LightningModule):
    """Base of :class:`VQGANModule` and :class:`ARGenModule`.

    Random numbers of a training step (dropout, dropped conditions) are a pure function of seed, step and rank, so that
    a resumed run draws what an uninterrupted one would have drawn, whatever validation or a callback drew in between.
    The seed is that of ``seed_everything`` and stays with the checkpoint.

    The x axis of everything that is logged is the number of batches that a rank has seen.

    Args:
        optimizer: settings of AdamW.
    """

    def __init__(self, optimizer: AdamWConfig) -> None:
        super().__init__()
        self.optimizer_config = optimizer
        self._step_seed: int | None = None

    @property
    @abstractmethod
    def generator(self) -> GPT | VQGAN:
        """The network that is kept in the end: what EMA averages and a checkpoint describes."""

    @abstractmethod
    def metric_names(self) -> list[str]:
        """Names of what is logged at each validation, for those that monitor one."""

    @property
    def generator_prefix(self) -> str:
        """Where the generator's weights are in the state dict."""
        return next(f"{name}." for name, module in self.named_children() if module is self.generator)

    def setup(self, stage: str) -> None:
        """Refuse a precision in which training cannot work.

        Raises:
            ValueError: in one line.
        """
        if stage == "fit" and self.trainer.precision == "16-true":
            raise ValueError(
                "trainer.precision is 16-true, in which activations overflow and small updates of the weights are "
                "lost; train in bf16-mixed, 16-mixed or 32-true"
            )

    def configure_model(self) -> None:
        """Refuse a strategy that spreads parameters over ranks, unless a module knows how to.

        Raises:
            ValueError: in one line.
        """
        if self.device_mesh is not None:
            raise ValueError(
                f"{type(self).__name__} is small enough for each GPU; set trainer.strategy to ddp, not to one that "
                "shards its parameters"
            )

    def on_fit_start(self) -> None:
        """Fix the seed of the run, unless a checkpoint brought it."""
        if self._step_seed is None:
            self._step_seed = int(os.environ.get("PL_GLOBAL_SEED", torch.initial_seed() % 2**31))

    def on_train_start(self) -> None:
        """Warn if no step can have as many batches as are asked for: Lightning takes one at the end of each epoch."""
        batches, wanted = self.trainer.num_training_batches, self.trainer.accumulate_grad_batches
        if batches < wanted:
            rank_zero_warn(
                f"accumulate_grad_batches is {wanted}, but an epoch has {batches} batches, after which a step is taken "
                f"in any case: its gradient is {batches}/{wanted} of the mean; set it to at most {batches}"
            )

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed the step."""
        assert self._step_seed is not None
        micro_batch = batch_idx % max(self.trainer.accumulate_grad_batches, 1)
        counters = [self._step_seed, self.global_step, micro_batch, self.global_rank]
        torch.manual_seed(int(np.random.SeedSequence(counters).generate_state(1, np.uint64)[0] >> 1))
        self._log_batches_seen()
        self.log("train/lr", self.lr_schedulers().get_last_lr()[0])  # type: ignore[union-attr]

    def on_train_epoch_end(self) -> None:
        """Place the numbers of an epoch on the x axis, and log what of the data could not be used."""
        self._log_batches_seen()
        self._log_skipped("train")

    def on_validation_epoch_end(self) -> None:
        """Place the numbers of a validation on the x axis, and log what of the data could not be used."""
        self._log_batches_seen()
        self._log_skipped("val")

    def on_test_epoch_end(self) -> None:
        """Place the numbers of a test on the x axis, and log what of the data could not be used."""
        self._log_batches_seen()
        self._log_skipped("val")

    def _log_skipped(self, split: str) -> None:
        datamodule: Any = getattr(self.trainer, "datamodule", None)
        if split not in getattr(datamodule, "tallies", ()):
            return
        examples = [
            sample.message for sample in (*datamodule.tallies[split].skipped, *datamodule.tallies[split].rejected)
        ][:1]
        counts = datamodule.finish_tally(split)  # over all ranks, so each logs the same
        for reason, count in counts.items():
            self.log(f"skipped/{split}/{reason.replace(' ', '_')}", float(count))
        if counts:
            numbers = ", ".join(f"{reason}: {count}" for reason, count in counts.items())
            story = "; e.g. ".join([numbers, *examples])
            rank_zero_warn(f"{sum(counts.values())} examples of {split} were skipped in this epoch ({story})")

    def _log_batches_seen(self) -> None:
        # Loggers take what is logged as "step" for the x axis.
        self.log("step", float(self.trainer.fit_loop.epoch_loop.total_batch_idx + 1))

    @property
    def scaler(self) -> Any:
        """The GradScaler of a run in float16, else None."""
        return getattr(self.trainer.precision_plugin, "scaler", None)

    @property
    def precision_name(self) -> str:
        """The trainer's precision or, without one, the dtype of the weights."""
        return str(self.dtype).removeprefix("torch.") if self._trainer is None else str(self.trainer.precision)

    def check_finite(self, broken: dict[str, Tensor], during: str = "") -> None:
        """Stop all ranks, or none, where a term of the loss is not finite: nobody waits for one that is gone.

        Args:
            broken: scalar bool for each term, True where it is not finite on this rank.
            during: ends the message.

        Raises:
            FloatingPointError: with the names of the terms.
        """
        flags = torch.stack(list(broken.values()))
        if self.trainer.world_size > 1:
            flags = self.trainer.strategy.reduce(flags.float(), reduce_op="sum") > 0
        if flags.any():
            names = [name for name, bad in zip(broken, flags.tolist(), strict=True) if bad]
            raise FloatingPointError(
                f"{', '.join(names)} not finite{during} at step {self.global_step}; go on from the last checkpoint, if "
                "there is one, with a lower learning rate or another seed, or in 32-bit precision"
            )

    def stop_unless_finite(self, broken: dict[str, Tensor], run: Callable[[], Any]) -> None:
        """Look at what was computed of a batch, outside of training.

        While several ranks fit, this is left to the end of a validation, when :meth:`check_finite` stops all of them:
        they may have unequal numbers of batches. Elsewhere a rank that stops ends the others' processes.

        Args:
            broken: scalar bool for each value by its name, True where it is not finite.
            run: computes it again, to find the layer.

        Raises:
            FloatingPointError: with the names of the values, stage, batch, precision and layer or weight.
        """
        attached = self._trainer is not None
        if attached and self.trainer.state.fn == "fit":
            if self.trainer.world_size == 1:
                self.check_finite(broken, " in validation")
            return
        flags = torch.stack(list(broken.values()))
        if self.device_mesh is not None:  # ranks compute each layer together
            flags = self.trainer.strategy.reduce(flags.float(), reduce_op="sum") > 0
        if flags.any():
            names = [name for name, bad in zip(broken, flags.tolist(), strict=True) if bad]
            blame = culprit(self.generator, run if self.device_mesh is None else None)
            raise refusal(
                f"{', '.join(names)} {'is' if len(names) == 1 else 'are'}",
                self.precision_name,
                blame,
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

    def clip(
        self,
        name: str,
        network: nn.Module,
        most: float | None,
        algorithm: str | None,
        wild: float | None = None,
        skip: bool = False,
    ) -> None:
        """Log the norm of a network's gradient, and clip it.

        Args:
            name: of the network.
            network: whose gradients, as far as it has any.
            most: what to clip to; None or 0 for nothing.
            algorithm: ``value`` clips each entry, all else the norm.
            wild: norm above which the run is taken to diverge; None for no limit.
            skip: take a gradient that is not finite or wild away, so that the step changes nothing.

        Raises:
            FloatingPointError: if the gradient is not finite or wild, and such steps are not skipped; a GradScaler
                skips those that are not finite by itself.
        """
        gradients = [p.grad for p in network.parameters() if p.grad is not None]
        if not gradients:
            return
        spread = nn.utils.get_total_norm(gradients)  # its parts, where gradients are sharded
        norm = spread.full_tensor() if isinstance(spread, DTensor) else spread
        self.log(f"train/grad_norm_{name}", norm)
        fault = ""
        if not norm.isfinite():
            fault = "is not finite" if self.scaler is None else ""
        elif wild is not None and norm > wild:
            fault = f"has a norm of {norm:.4g}, more than {wild:g},"
        if skip:
            self.log("train/skipped_steps", float(bool(fault)), on_step=True)
        if fault and skip:
            network.zero_grad(set_to_none=True)
            return
        if fault:
            raise FloatingPointError(
                f"the gradient of the {name} {fault} at step {self.global_step}; its weights are still those of the "
                "step before. Go on from the last checkpoint with a lower learning rate or another seed"
            )
        if most and algorithm == "value":
            nn.utils.clip_grad_value_(network.parameters(), most)
        elif most:
            nn.utils.clip_grads_with_norm_(network.parameters(), most, spread)

    def build_optimizer(self, networks: Iterable[nn.Module]) -> dict[str, Any]:
        """One AdamW over several networks with the module's settings, as ``configure_optimizers`` returns it."""
        total = self.trainer.estimated_stepping_batches if self.optimizer_config.schedule == "cosine" else float("inf")
        return build_adamw(networks, self.optimizer_config, total, fused=self.trainer.precision != "16-mixed")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say what the checkpoint holds; primitives only, so that it loads with ``weights_only``."""
        checkpoint.setdefault(ENTRY, {}).update(describe(self.generator, self.generator_prefix))
        checkpoint[ENTRY]["step_seed"] = self._step_seed

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse the checkpoint of another model before anything is changed.

        Raises:
            ValueError: in one line, with what differs.
        """
        check_fits(checkpoint, self.generator)
        _reopen_epoch(checkpoint)
        _close_epoch(checkpoint)
        self._count_batches_anew(checkpoint)
        self._step_seed = checkpoint[ENTRY]["step_seed"]
        if self.trainer.state.fn != "fit" and "loops" in checkpoint:  # else Lightning restores it
            seen = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["ready"]
            self.trainer.fit_loop.epoch_loop.batch_progress.total.ready = seen

    def _count_batches_anew(self, checkpoint: dict[str, Any]) -> None:
        """Let the rest of an epoch be as long as it is here: on another number of ranks, or with other batches.

        Lightning counts the batches of a rank and ends the epoch at the number that a whole one has.
        """
        datamodule: Any = getattr(self.trainer, "datamodule", None)
        if self.trainer.state.fn != "fit" or "loops" not in checkpoint or not hasattr(datamodule, "batches_done"):
            return
        done, whole = datamodule.batches_done(checkpoint.get(type(datamodule).__qualname__, {})) or (0, 0)
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        if 0 < done < whole and not progress["is_last_batch"]:
            shift = done - progress["current"]["ready"]  # the others may lag by one, which means something to Lightning
            for state in progress["current"]:
                progress["current"][state] += shift


def _reopen_epoch(checkpoint: dict[str, Any]) -> None:
    """Let a run that ``max_steps`` stopped within an epoch go on within it: Lightning counts the epoch as finished."""
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

    Where no validation has run in that epoch (``check_val_every_n_epoch``, ``limit_val_batches: 0``), and ``max_steps``
    is given, Lightning would train one batch of the next epoch, count it to the one before, and leave out the rest.
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
