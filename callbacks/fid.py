"""Image quality, measured while a model trains and in ``test``. B batch, H × W pixels, N images in total."""

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn
from tqdm import tqdm

from callbacks.fid_report import check_report_folder, write_test_report
from callbacks.fid_sampling import ValidationCaptions, share_of_classes
from callbacks.progress import shows_progress
from callbacks.protocols import (
    GeneratesImages,
    HasGenerator,
    HasImageSize,
    ReconstructsImages,
    datamodule,
    missing_members,
    optional,
    require,
)
from evaluation.gallery import Gallery
from evaluation.measurement import METRICS, OWN_NAME, Measurement, check_metrics, result_names
from evaluation.reference import Reference, read_reference, with_features
from llamagen.checkpoints.contents import weights_checksum
from llamagen.metrics import FID, Features, Inception, extractor_checksum, extractor_name
from llamagen.metrics.image_metric import ImageMetric
from llamagen.metrics.result_names import PURPOSES, Purpose
from llamagen.sampling.pixels import check_image_size, to_pixels


class FIDMonitor(pl.Callback):
    """Measure FID, sFID, KID, precision, recall and Inception Score of the model's images, over all ranks.

    - Class-conditional model: every n-th validation samples ``count`` images, cycling through all classes, with the
      evaluated weights (the averages, with the ``EMA`` callback) and the sampler of ``CompiledSampling``, if used.
      ``test`` measures the images that its data requests; if the data is codes, it samples ``count`` images.
    - Text model: images of the first ``count`` captions of the validation data instead. If there are fewer captions, or
      ``limit_val_batches`` leaves fewer, they are repeated in order. Stored features need no text encoder.
    - Tokenizer: every n-th validation, and ``test``, measure the reconstructions of the validation images.

    Metrics are logged with the name of their reference, such as ``gfid/imagenet256-adm`` or ``rfid/val``.
    ``BestCheckpoint`` can monitor them: validations that do not measure repeat the last value, which is infinity before
    the first measurement. ``test`` writes a folder ``report``. The extractor's weights are in no checkpoint.

    Args:
        reference: file of statistics, see ``python -m evaluation reference``. A tokenizer needs none: its
            reconstructions are then compared with the images themselves.
        features: feature extractor; Inception by default, whose weights are downloaded.
        count: number of sampled images.
        every_n_validations: measure at every n-th validation.
        seed: seed of the sampled images, the same at each validation.
        batch_size: images sampled at a time, without ``CompiledSampling``.
        image_size: side in pixels to which reconstructions are resized before they are measured (bicubic, not
            antialiased), as the paper resizes those of 384 and 512 px to 256; null keeps their size. The size of
            sampled images is set by the model's own ``image_size``.
        extra_metrics: class paths of further metrics, see docs/extending.md.
    """

    def __init__(
        self,
        reference: Path | str | None = None,
        features: nn.Module | None = None,
        count: int = 10_000,
        every_n_validations: int = 1,
        seed: int = 0,
        batch_size: int = 64,
        image_size: int | None = None,
        extra_metrics: list[type[ImageMetric]] | None = None,
    ) -> None:
        super().__init__()
        if count < 2 or every_n_validations < 1 or batch_size < 1:
            raise ValueError(
                f"count is {count}, every_n_validations {every_n_validations} and batch_size {batch_size}; they must "
                "be at least 2, 1 and 1"
            )
        self.count, self.every_n_validations, self.seed, self.batch_size = count, every_n_validations, seed, batch_size
        check_image_size(image_size)
        self.features, self.image_size = features, image_size
        self.metrics = (*METRICS, *(extra_metrics or ()))
        check_metrics(self.metrics)
        self.reference: Reference | None = None if reference is None else read_reference(reference)
        self.measurement: Measurement | None = None
        self._gallery: Gallery | None = None
        self._captions: ValidationCaptions | None = None
        self._validations = 0
        self._last: dict[str, float] = {}
        self._seconds = {"images": 0.0, "features": 0.0, "distances": 0.0}
        self._seen = 0
        self._active, self._by_request, self._started = False, False, 0.0
        self._total, self._weights, self._metrics = 0, "", dict[str, float]()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check everything before training, and not at the first measurement.

        Raises:
            ValueError: if the module neither generates nor reconstructs images, there is no reference, or the
                reference belongs to another extractor or image size.
        """
        if stage == "predict":
            return
        self._check_checkpoints(trainer)
        module = optional(GeneratesImages, pl_module)
        size = self._reconstructed_size(trainer, pl_module) if module is None else self._generated_size(module)
        if stage == "test":
            check_report_folder(trainer)
        if self.features is None:
            self.features = Inception()
        self._kind: Purpose = "reconstruction" if module is None else "generation"
        if self.reference is not None:
            self.reference.check(self.features, size)
            if warning := self.reference.mismatch(self._kind):
                rank_zero_warn(warning)
        self._size = size
        self.measurement = None
        # A reference of images has no features yet; they are extracted at the first measurement, on the device.
        if self.reference is None or self.reference.images is None:
            self.measurement = Measurement(self.features, size, self._kind, self.reference, metrics=self.metrics)

    def _generated_size(self, module: GeneratesImages) -> int:
        """Side of the images that the module will sample."""
        module.check_requests(())
        if self.reference is None:
            raise ValueError(
                "FIDMonitor needs a reference to compare generated images with; make one with python -m evaluation "
                "reference IMAGES OUT.npz, and set reference to it"
            )
        if not module.needs_captions and self.count < module.num_classes:
            rank_zero_warn(
                f"FIDMonitor samples {self.count} images, only of the first {self.count} of {module.num_classes} "
                "classes; set count to a multiple of the number of classes"
            )
        if self.image_size is not None:
            raise ValueError(
                f"image_size of FIDMonitor is {self.image_size}, but it resizes reconstructions, and the model "
                "generates images; set model.init_args.image_size instead"
            )
        return module.output_size

    def _reconstructed_size(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> int:
        """Side of the reconstructions to measure."""
        if optional(ReconstructsImages, pl_module) is None:
            missing = ", ".join(missing_members(GeneratesImages, pl_module))
            raise ValueError(
                f"FIDMonitor needs a module that generates or reconstructs images, but {type(pl_module).__name__} has "
                f"neither reconstruct nor {missing}; remove FIDMonitor from trainer.callbacks"
            )
        return self.image_size or require(HasImageSize, datamodule(trainer), self).image_size

    def _check_checkpoints(self, trainer: pl.Trainer) -> None:
        measured = tuple(
            name.stem(purpose) for metric in self.metrics for name in metric.result_names for purpose in PURPOSES
        )
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if not isinstance(callback, ModelCheckpoint) or callback.save_top_k <= 1 or self.every_n_validations == 1:
                continue
            if (callback.monitor or "").startswith(measured):
                raise ValueError(
                    f"{type(callback).__name__} keeps the best {callback.save_top_k} by {callback.monitor}, which "
                    f"FIDMonitor measures only once in {self.every_n_validations} validations: checkpoints in between "
                    "would be ranked by an earlier measurement; set save_top_k to 1, or every_n_validations to 1"
                )

    def state_dict(self) -> dict[str, Any]:
        """Number of validations, and the last metrics."""
        return {"validations": self._validations, "last": self._last}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue counting."""
        self._validations, self._last = state_dict["validations"], state_dict["last"]

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prepare a measurement, at every n-th validation."""
        if trainer.sanity_checking:
            return
        fit = trainer.state.fn == "fit"
        self._validations += fit
        self._active = not fit or self._validations % self.every_n_validations == 0
        if self._active:
            self._begin(trainer, pl_module)

    def on_test_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prepare a measurement and the images of the report."""
        self._active, self._gallery = True, Gallery()
        self._begin(trainer, pl_module)

    def _begin(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert self.features is not None
        self._seconds, self._seen, self._by_request = dict.fromkeys(self._seconds, 0.0), 0, False
        module = optional(GeneratesImages, pl_module)
        if module is not None and module.needs_captions:
            self._captions = ValidationCaptions(self.count)
        if self.measurement is None:
            if self.reference is not None:
                show = shows_progress(trainer)
                self.reference = with_features(self.reference, self.features, pl_module.device, show)
            self.measurement = Measurement(self.features, self._size, self._kind, self.reference, metrics=self.metrics)
        self.measurement.to(pl_module.device)

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: dict[str, Any],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Measure the reconstructions of a batch, or keep its captions for sampling at the end of the epoch."""
        if self._active and not trainer.sanity_checking:
            self._add_batch(trainer, pl_module, outputs, batch)

    def on_test_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Record the time, for the cost of sampling."""
        self._started = time.perf_counter()

    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: dict[str, Any],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Measure the reconstructions or sampled images of a batch, or keep its captions."""
        self._add_batch(trainer, pl_module, outputs, batch)

    def _add_batch(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: dict[str, Any]
    ) -> None:
        assert self.measurement is not None
        if not isinstance(outputs, dict):
            if self._captions is not None:
                self._captions.keep(batch, require(GeneratesImages, pl_module, self))
        elif "images" in outputs:
            self._by_request = True
            images = outputs["images"].tensor().permute(0, 3, 1, 2)
            self._add_time("images", self._started, images)
            labels = batch.get("condition") if self._captions is None else None
            self._measure(images, outputs["index"], labels, batch.get("captions"))
        elif "reconstruction" in outputs:
            side = self._size
            images, originals = (
                to_pixels(each, side, side).permute(0, 3, 1, 2) for each in (outputs["reconstruction"], batch["images"])
            )
            index = trainer.global_rank + trainer.world_size * torch.arange(self._seen, self._seen + len(images))
            self._seen += len(images)
            if self.reference is None:
                started = time.perf_counter()
                self.measurement.update(originals, index, real=True)
                self._add_time("features", started, originals)
            self._measure(images, index, batch.get("labels"), originals=originals)

    def _measure(
        self,
        images: Tensor,
        index: Tensor,
        labels: Tensor | None,
        captions: Sequence[str] | None = None,
        originals: Tensor | None = None,
    ) -> None:
        assert self.measurement is not None
        started = time.perf_counter()
        features: Features = self.measurement.update(images, index)
        self._add_time("features", started, images)
        if self._gallery is not None:
            self._gallery.add(images, index, features.pool, labels, originals, captions)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Sample images if the model generates them, and log the metrics."""
        if trainer.sanity_checking:
            return
        if self._active:
            self._last = self._finish(trainer, pl_module)
        elif trainer.state.fn == "fit":  # only for checkpoint callbacks
            last = {self._names([FID])[0]: float("inf"), **self._last}
            trainer.callback_metrics.update({name: torch.tensor(value) for name, value in last.items()})
        self._active = False

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Sample images if the model generates them, and log the metrics."""
        self._metrics = self._finish(trainer, pl_module)
        # Computed now, while the averages are swapped in for the weights; with sharded parameters, on all ranks.
        self._weights = weights_checksum(require(HasGenerator, pl_module, self).generator)
        self._active = False

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the report, after the module has logged its own metrics."""
        assert self._gallery is not None
        generator: Any = require(HasGenerator, pl_module, self).generator
        facts = self._facts(trainer, pl_module, generator)
        write_test_report(trainer, generator, self._metrics, facts, self._gallery, self.reference)
        self._gallery = None

    def metric_names(self) -> list[str]:
        """Names of the metrics that may be logged; after ``setup``."""
        return self._names(self.metrics)

    def _names(self, metrics: Sequence[type[ImageMetric]]) -> list[str]:
        assert self.features is not None
        reference = OWN_NAME if self.reference is None else self.reference.name
        return result_names(metrics, self._kind, extractor_name(self.features), reference)

    def _finish(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, float]:
        assert self.measurement is not None
        if self._kind == "generation" and not self.measurement.count:
            self._sample(trainer, require(GeneratesImages, pl_module, self))
        self._captions = None
        started = time.perf_counter()
        fit = trainer.state.fn == "fit"
        total = int(
            trainer.strategy.reduce(torch.tensor(self.measurement.count, device=pl_module.device), reduce_op="sum")
        )
        if self.reference is not None and (warning := self.reference.mismatch(self._kind, total)) and not fit:
            rank_zero_warn(warning)
        with torch.inference_mode(False), torch.no_grad():  # training cannot write to inference tensors
            metrics = {name: value.item() for name, value in self.measurement.compute().items()}
            self.measurement.reset()
        self.measurement.to("cpu")
        self.measurement.extractor.to("cpu")  # frees memory for training
        self._seconds["distances"] = time.perf_counter() - started
        self._total = total
        pl_module.log_dict(metrics)
        pl_module.log("fid_monitor/seconds", sum(self._seconds.values()))
        if trainer.is_global_zero:
            spent = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self._seconds.items() if seconds)
            values = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
            print(f"{values} ({total:,} images; {spent})", flush=True)
        return metrics

    def _sample(self, trainer: pl.Trainer, module: GeneratesImages) -> None:
        """Sample and measure this rank's share of ``count`` images."""
        rank, ranks = trainer.global_rank, trainer.world_size
        if self._captions is None:
            share = share_of_classes(self.count, module.num_classes, rank, ranks, module.device)
        else:
            share = self._captions.share(rank, ranks, module.device)
        temporary = module.sampler is None  # otherwise CompiledSampling has set one
        bar = tqdm(
            total=self.count, desc="sampling for FID", unit="image", leave=False, disable=not shows_progress(trainer)
        )
        with trainer.precision_plugin.forward_context(), bar:
            if temporary:
                module.sampler = module.build_sampler(self.batch_size)
            assert module.sampler is not None
            try:
                for index in share.numbers.split(module.sampler.sampler.batch_size):
                    started, batch = time.perf_counter(), share.conditions(index)
                    numbers = index.to(module.device)
                    images, _ = module.sample(batch.condition, numbers, self.seed, batch.lengths)
                    self._add_time("images", started, images)
                    if rows := int((index < self.count).sum()):  # the others are padding
                        labels = None if batch.labels is None else batch.labels[:rows]
                        captions = None if batch.captions is None else batch.captions[:rows]
                        self._measure(images[:rows].permute(0, 3, 1, 2), numbers[:rows], labels, captions)
                    bar.update(min(ranks * len(index), self.count - bar.n))
            finally:
                if temporary:
                    module.sampler = None

    def _add_time(self, to: str, started: float, after: Tensor) -> None:
        if after.is_cuda:
            torch.cuda.synchronize(after.device)
        self._seconds[to] += time.perf_counter() - started

    def _facts(self, trainer: pl.Trainer, pl_module: pl.LightningModule, generator: Any) -> dict[str, Any]:
        """How the metrics of a report were measured."""
        assert self.features is not None
        facts: dict[str, Any] = {
            "images": {"count": self._total, "resolution": self._size},
            "reference": "the images themselves" if self.reference is None else self.reference.facts(),
            "extractor": {"name": extractor_name(self.features), "checksum": extractor_checksum(self.features)},
            "model": {"class": type(generator).__name__, "weights": self._weights, **asdict(generator.config)},
            "precision": str(trainer.precision),
            "seconds": {name: round(seconds, 1) for name, seconds in self._seconds.items()},
        }
        if self._kind == "generation":
            module = require(GeneratesImages, pl_module, self)
            seed = module.sample_seed if self._by_request else self.seed
            facts["sampling"] = {**module.sampling.image_settings(), "seed": seed}
            if module.needs_captions:
                facts["captions"] = module.caption_metadata
        return facts
