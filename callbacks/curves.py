"""Learning curves as a figure in the run's folder."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning_utilities.core.rank_zero import rank_zero_only

from callbacks.figures import batches_seen, new_figure
from llamagen.files import atomic_file


class LearningCurves(pl.Callback):
    """Plot every logged metric over the batches seen into ``curves.png``, at each validation and at the end.

    Training metrics are recorded every ``log_every_n_steps`` steps of the trainer. The curves are part of the
    checkpoint: a resumed run continues them.
    """

    def __init__(self) -> None:
        super().__init__()
        self._history: dict[str, list[list[float]]] = {}
        self._is_plotted = True

    def state_dict(self) -> dict[str, Any]:
        """The curves: [batches seen, value] pairs by metric."""
        return {"history": self._history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the curves."""
        self._history = state_dict["history"]

    @rank_zero_only
    def _record(self, trainer: pl.Trainer, stage: str) -> None:
        for name, value in trainer.callback_metrics.items():
            if name.startswith(f"{stage}/"):
                self._history.setdefault(name, []).append([float(batches_seen(trainer)), float(value)])
                self._is_plotted = False

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Record the training metrics every ``log_every_n_steps`` steps."""
        every = max(trainer.log_every_n_steps, 1)  # type: ignore[attr-defined]
        stepped = (batch_idx + 1) % max(trainer.accumulate_grad_batches, 1) == 0
        if stepped and trainer.global_step % every == 0:
            self._record(trainer, "train")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Record the validation metrics and plot the curves."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._record(trainer, "val")
            self._record(trainer, "val_raw")
            self._plot(trainer)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Plot what was recorded since the last validation."""
        self._plot(trainer)

    @rank_zero_only
    def _plot(self, trainer: pl.Trainer) -> None:
        if self._is_plotted:
            return
        names = sorted({name.partition("/")[2] for name in self._history})
        columns = min(3, len(names))
        rows = -(-len(names) // columns)
        figure = new_figure(5 * columns, 3.2 * rows)
        for position, name in enumerate(names):
            axes = figure.add_subplot(rows, columns, position + 1)
            axes.set_title(name)
            axes.set_xlabel("batches")
            for stage in ("train", "val", "val_raw"):
                if points := self._history.get(f"{stage}/{name}"):
                    axes.plot(*zip(*points, strict=True), label=stage, marker="." if len(points) < 30 else None)
            axes.legend()
        with atomic_file(Path(trainer.default_root_dir) / "curves.png") as temporary:
            figure.savefig(temporary, format="png", dpi=80)
        self._is_plotted = True
