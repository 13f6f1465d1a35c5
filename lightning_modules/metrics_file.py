"""``metrics.csv`` of a run, which stays readable after a killed process or a full disk."""

import csv
import io
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.core.saving import save_hparams_to_yaml
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_modules.checkpoint_files import is_local
from llamagen.files import atomic_file
from llamagen.full_disk import DiskFullError, full_disk_reported


class MetricsLogger(CSVLogger):
    """Lightning's ``CSVLogger`` with files that are complete at any time.

    When a metric appears for the first time, Lightning truncates the file and rewrites it with a new column, so a kill
    at that moment loses it. This logger replaces the old file atomically. See :func:`use_metrics_logger`.
    """

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The writer of the files."""
        if self._experiment is None:
            self._fs.makedirs(self.root_dir, exist_ok=True)
            self._experiment = _MetricsWriter(log_dir=self.log_dir)
        return self._experiment

    def finalize(self, status: str) -> None:
        """Write the remaining rows. If the run failed, a full disk is only a warning: it must not hide the error."""
        try:
            super().finalize(status)
        except DiskFullError as error:
            if status == "success":
                raise
            rank_zero_warn(str(error))


class _MetricsWriter(ExperimentWriter):
    """Appends rows; rewrites the file for a new column."""

    def log_hparams(self, params: dict[str, Any]) -> None:
        """Write ``hparams.yaml``."""
        self.hparams.update(params)
        with atomic_file(Path(self.log_dir) / self.NAME_HPARAMS_FILE) as temporary:
            save_hparams_to_yaml(temporary, self.hparams)

    def save(self) -> None:
        """Write the rows logged since the last call.

        Raises:
            DiskFullError: in one line, if the disk is full; the file is unchanged.
        """
        if not self.metrics:
            return
        path = Path(self.metrics_file_path)
        old_keys = list(self.metrics_keys)
        if self._record_new_keys() or not path.is_file():
            rows: list[dict[str, Any]] = []
            if path.is_file():
                with path.open(newline="") as file:
                    rows = list(csv.DictReader(file))
            try:
                with atomic_file(path) as temporary, temporary.open("w", newline="") as file:
                    file.write(self._rows([*rows, *self.metrics], header=True))
            except BaseException:
                self.metrics_keys = old_keys
                raise
        else:
            self._append(path, self._rows(self.metrics, header=False))
        self.metrics = []

    def _rows(self, rows: list[dict[str, Any]], header: bool) -> str:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self.metrics_keys)
        if header:
            writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()

    @staticmethod
    def _append(path: Path, text: str) -> None:
        size = path.stat().st_size
        try:
            with full_disk_reported(path), path.open("a", newline="") as file:
                file.write(text)
        except BaseException:
            with path.open("rb+") as file:  # no half row: a truncated number would be a wrong one
                file.truncate(size)
            raise


def use_metrics_logger(trainer: pl.Trainer) -> None:
    """Replace Lightning's ``CSVLogger`` by :class:`MetricsLogger` in a trainer, for local folders."""
    trainer.loggers = [_replaced(logger) for logger in trainer.loggers]


def _replaced(logger: Any) -> Any:
    if type(logger) is not CSVLogger or not is_local(logger.save_dir):
        return logger
    return MetricsLogger(
        logger.save_dir, logger._name, logger._version, logger._prefix, logger._flush_logs_every_n_steps
    )
