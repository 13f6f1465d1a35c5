"""The report of images that FIDMonitor measured in ``test``."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist

from evaluation.gallery import Gallery
from evaluation.published import published
from evaluation.reference import Reference
from evaluation.report import Report, check_report

FOLDER = "report"


def check_report_folder(trainer: pl.Trainer) -> None:
    """Check that the report can be written into the run's folder.

    Raises:
        ValueError: if its folder holds other files.
    """
    check_report(Path(trainer.default_root_dir) / FOLDER)


def write_test_report(
    trainer: pl.Trainer,
    generator: Any,
    metrics: dict[str, float],
    facts: dict[str, Any],
    gallery: Gallery,
    reference: Reference | None,
) -> None:
    """Write ``report`` into the run's folder. A collective call: all ranks must make it.

    Args:
        trainer: the trainer. The module must have logged its own metrics, which are part of the report.
        generator: the measured model, with its ``config``.
        metrics: measured values by name.
        facts: how they were measured; ``facts["images"]["resolution"]`` is the side of the images in pixels.
        gallery: images of this rank.
        reference: statistics that the images were compared with; None if they were compared with their originals.
    """
    if trainer.world_size > 1:
        galleries: list[Any] = [None] * trainer.world_size
        dist.all_gather_object(galleries, gallery)
        gallery = Gallery().merge(galleries)
    if not trainer.is_global_zero:
        return
    logged = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("test/")}
    folder = Path(trainer.default_root_dir) / FOLDER
    report = Report(
        f"{type(generator).__name__} against {reference.name if reference else 'its images'}",
        metrics | logged,
        facts,
        published(generator.config, facts["images"]["resolution"]),
        gallery.grids(reference),
    )
    report.write(folder)
    print(f"report: {folder / 'report.md'}", flush=True)
