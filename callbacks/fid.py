"""How good images are, measured while a model trains, and in ``test``. B batch, H × W pixels, N images in all."""

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn
from tqdm import tqdm

from callbacks.fid_sampling import Draws, ValidationCaptions, share_of_classes
from evaluation.gallery import Gallery
from evaluation.measurement import OWN_NAME, SYMBOLS, Measurement, name_of
from evaluation.published import published
from evaluation.reference import Purpose, Reference, completed, read_reference
from evaluation.report import check_report, write_report
from llamagen.checkpoints.contents import weights_checksum
from llamagen.metrics import Features, Inception, extractor_checksum, extractor_name
from llamagen.sampling.pixels import check_image_size, to_pixels

FOLDER = "report"
MEASURED = ("gfid", "gsfid", "gkid", "rfid", "rsfid", "rkid", "precision", "recall", "inception_score")
"""How the names of what is measured begin."""


class FIDMonitor(pl.Callback):
    """Measure FID, sFID, KID, precision, recall and Inception Score of the model's images, over all ranks.

    - With a model that draws: every n-th validation draws ``count`` images of all classes in turn, with the weights
      that are evaluated (with the ``EMA`` callback their averages), by the sampler of ``CompiledSampling``, if that is
      there. ``test`` measures the images that its data ask for, or, where these are codes, draws ``count``.
    - A model of text draws an image of each of the first ``count`` captions of the validation set instead; where there
      are fewer captions, or ``limit_val_batches`` leaves fewer, they come in turn. Stored features need no encoder.
    - With a tokenizer: every n-th validation, and ``test``, measure the reconstructions of the validation images.

    Numbers are logged with the name of their reference, as ``gfid/imagenet256-adm`` or ``rfid/val``, which
    ``ModelCheckpoint`` can monitor: at validations without a measurement the last one still counts, and before the
    first infinity. ``test`` leaves a folder ``report``. The extractor's weights are in no checkpoint.

    Args:
        reference: file of statistics, see ``python -m evaluation reference``. A tokenizer needs none: its
            reconstructions are then compared with the images themselves.
        features: extractor; Inception by default, whose weights are a download.
        count: images to draw.
        every_n_validations: measure at every n-th validation.
        seed: of the images; the same images come at each validation, as far as the model lets them.
        batch_size: images that are drawn together where ``CompiledSampling`` does not say it.
        image_size: side in pixels to which reconstructions are resized before they are measured (bicubic, not
            antialiased), as the paper does with those of 384 and 512 px, to 256; null leaves them. Drawn images have
            the size that the model's own ``image_size`` says.
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
        self.reference: Reference | None = None if reference is None else read_reference(reference)
        self.measurement: Measurement | None = None
        self._gallery: Gallery | None = None
        self._captions: ValidationCaptions | None = None
        self._validations = 0
        self._last: dict[str, float] = {}
        self._seconds = {"images": 0.0, "features": 0.0, "distances": 0.0}
        self._seen = 0
        self._active, self._asked, self._started = False, False, 0.0
        self._total, self._weights, self._numbers = 0, "", dict[str, float]()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Find out now, not at the first measurement, that something does not fit.

        Raises:
            ValueError: if the module cannot draw, there is no reference, or the reference is of another extractor or
                size.
        """
        if stage == "predict":
            return
        self._check_checkpoints(trainer)
        draws = hasattr(pl_module, "build_sampler")
        if draws:
            module = cast(Draws, pl_module)
            module.check_requests(())
            if self.reference is None:
                raise ValueError(
                    "FIDMonitor needs a reference to compare drawn images with; make one by python -m evaluation "
                    "reference IMAGES OUT.npz, and give it as reference"
                )
            if not module.needs_captions and self.count < module.num_classes:
                rank_zero_warn(
                    f"FIDMonitor draws {self.count} images, of the first {self.count} of {module.num_classes} "
                    "classes alone; set count to at least the number of classes, best to a multiple of it"
                )
            if self.image_size is not None:
                raise ValueError(
                    f"image_size is {self.image_size}, but the model draws images; set its own, "
                    "model.init_args.image_size"
                )
            size = module.output_size
        else:
            size = getattr(getattr(trainer, "datamodule", None), "image_size", 0)
            size = size and (self.image_size or size)
            if not hasattr(pl_module, "reconstruct") or not size:
                raise ValueError(
                    f"FIDMonitor neither knows how {type(pl_module).__name__} draws images nor the image_size of its "
                    "data; leave it out"
                )
        if stage == "test":
            check_report(Path(trainer.default_root_dir) / FOLDER)
        if self.features is None:
            self.features = Inception()
        self._kind: Purpose = "generation" if draws else "reconstruction"
        if self.reference is not None:
            self.reference.check(self.features, size)
            if warning := self.reference.mix_up(self._kind):
                rank_zero_warn(warning)
        self._size = size
        self.measurement = None
        if self.reference is None or self.reference.images is None:  # else its features are taken first
            self.measurement = Measurement(self.features, size, self._kind, self.reference)

    def _check_checkpoints(self, trainer: pl.Trainer) -> None:
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if not isinstance(callback, ModelCheckpoint) or callback.save_top_k <= 1 or self.every_n_validations == 1:
                continue
            if (callback.monitor or "").startswith(MEASURED):
                raise ValueError(
                    f"ModelCheckpoint keeps the best {callback.save_top_k} by {callback.monitor}, which FIDMonitor "
                    f"measures at every {self.every_n_validations}. validation: weights in between would be kept by "
                    "the number of others; set save_top_k to 1, or every_n_validations to 1"
                )

    def state_dict(self) -> dict[str, Any]:
        """How many validations there were, and the last numbers."""
        return {"validations": self._validations, "last": self._last}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self._validations, self._last = state_dict["validations"], state_dict["last"]

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find out whether it is time to measure."""
        if trainer.sanity_checking:
            return
        fit = trainer.state.fn == "fit"
        self._validations += fit
        self._active = not fit or self._validations % self.every_n_validations == 0
        if self._active:
            self._begin(trainer, pl_module)

    def on_test_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin to measure."""
        self._active, self._gallery = True, Gallery()
        self._begin(trainer, pl_module)

    def _begin(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert self.features is not None
        self._seconds, self._seen, self._asked = dict.fromkeys(self._seconds, 0.0), 0, False
        if getattr(pl_module, "needs_captions", False):
            self._captions = ValidationCaptions(self.count)
        if self.measurement is None:
            if self.reference is not None:
                show = trainer.is_global_zero and trainer.progress_bar_callback is not None
                self.reference = completed(self.reference, self.features, pl_module.device, show)
            self.measurement = Measurement(self.features, self._size, self._kind, self.reference)
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
        """Take the reconstructions of a batch into account, or keep its captions, which are drawn in the end."""
        if self._active and not trainer.sanity_checking:
            self._take(trainer, pl_module, outputs, batch)

    def on_test_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Note the time, for the cost of drawing."""
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
        """Take the reconstructions or drawn images of a batch into account, or keep its captions."""
        self._take(trainer, pl_module, outputs, batch)

    def _take(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: dict[str, Any]) -> None:
        if not isinstance(outputs, dict):
            if self._captions is not None:
                self._captions.keep(batch, cast(Draws, pl_module))
        elif "images" in outputs:
            self._asked = True
            images = outputs["images"].tensor().permute(0, 3, 1, 2)
            self._spent("images", self._started, images)
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
                cast(Measurement, self.measurement).update(originals, index, real=True)
                self._spent("features", started, originals)
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
        self._spent("features", started, images)
        if self._gallery is not None:
            self._gallery.show(images, index, features.pool, labels, originals, captions)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw what is to be drawn, and log what comes out."""
        if trainer.sanity_checking:
            return
        if self._active:
            self._last = self._finish(trainer, pl_module)
        elif trainer.state.fn == "fit":  # for ModelCheckpoint alone
            last = {self._name_of("fid"): float("inf"), **self._last}
            trainer.callback_metrics.update({name: torch.tensor(value) for name, value in last.items()})
        self._active = False

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw what is to be drawn, and log what comes out."""
        self._numbers = self._finish(trainer, pl_module)
        # Now, while the averages are in the place of the weights; of all ranks, where they share the parameters.
        self._weights = weights_checksum(cast(Any, pl_module).generator)
        self._active = False

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the report, when the module has logged its own numbers, too."""
        self._report(trainer, pl_module, self._numbers)
        self._gallery = None

    def metric_names(self) -> list[str]:
        """Names under which metrics may be logged, when the callback is set up."""
        return [self._name_of(symbol) for symbol in SYMBOLS]

    def _name_of(self, symbol: str) -> str:
        assert self.features is not None
        name = OWN_NAME if self.reference is None else self.reference.name
        return name_of(symbol, self._kind, extractor_name(self.features), name)

    def _finish(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, float]:
        assert self.measurement is not None
        if self._kind == "generation" and not self.measurement.count:
            self._draw(trainer, pl_module)
        self._captions = None
        started = time.perf_counter()
        fit = trainer.state.fn == "fit"
        total = int(
            trainer.strategy.reduce(torch.tensor(self.measurement.count, device=pl_module.device), reduce_op="sum")
        )
        if self.reference is not None and (warning := self.reference.mix_up(self._kind, total)) and not fit:
            rank_zero_warn(warning)
        with torch.inference_mode(False), torch.no_grad():  # training may follow, which cannot write to such tensors
            numbers = {name: value.item() for name, value in self.measurement.compute().items()}
            self.measurement.reset()
        self.measurement.to("cpu")
        self.measurement.extractor.to("cpu")  # training needs the memory
        self._seconds["distances"] = time.perf_counter() - started
        self._total = total
        pl_module.log_dict(numbers)
        pl_module.log("fid_monitor/seconds", sum(self._seconds.values()))
        if trainer.is_global_zero:
            spent = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self._seconds.items() if seconds)
            found = ", ".join(f"{name} {value:.4g}" for name, value in numbers.items())
            print(f"{found} ({total:,} images; {spent})", flush=True)
        return numbers

    def _draw(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw ``count`` images, shared out over ranks."""
        module, rank, ranks = cast(Draws, pl_module), trainer.global_rank, trainer.world_size
        if self._captions is None:
            share = share_of_classes(self.count, module.num_classes, rank, ranks, module.device)
        else:
            share = self._captions.share(rank, ranks, module.device)
        own = module.sampler is None
        with trainer.precision_plugin.forward_context():
            if own:
                module.sampler = module.build_sampler(self.batch_size)
            assert module.sampler is not None
            size = module.sampler.sampler.batch_size
            show = trainer.is_global_zero and trainer.progress_bar_callback is not None
            try:
                with tqdm(total=self.count, desc="drawing for FID", unit="image", leave=False, disable=not show) as bar:
                    for index in share.numbers.split(size):
                        started, asked = time.perf_counter(), share.ask(index)
                        numbers = index.to(module.device)
                        images, _ = module.sample(asked.condition, numbers, self.seed, asked.lengths)
                        self._spent("images", started, images)
                        if some := int((index < self.count).sum()):
                            labels = None if asked.labels is None else asked.labels[:some]
                            captions = None if asked.captions is None else asked.captions[:some]
                            self._measure(images[:some].permute(0, 3, 1, 2), numbers[:some], labels, captions)
                        bar.update(min(ranks * len(index), self.count - bar.n))
            finally:
                if own:
                    module.sampler = None

    def _spent(self, on: str, started: float, after: Tensor) -> None:
        if after.is_cuda:
            torch.cuda.synchronize(after.device)
        self._seconds[on] += time.perf_counter() - started

    def _report(self, trainer: pl.Trainer, pl_module: pl.LightningModule, numbers: dict[str, float]) -> None:
        assert self._gallery is not None
        assert self.features is not None
        gallery = self._gallery
        if trainer.world_size > 1:
            galleries: list[Any] = [None] * trainer.world_size
            dist.all_gather_object(galleries, gallery)
            gallery = Gallery().together(galleries)
        generator = cast(Any, pl_module).generator
        if not trainer.is_global_zero:
            return
        logged = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("test/")}
        facts: dict[str, Any] = {
            "images": {"count": self._total, "resolution": self._size},
            "reference": "the images themselves" if self.reference is None else self.reference.facts(),
            "extractor": {"name": extractor_name(self.features), "checksum": extractor_checksum(self.features)},
            "model": {"class": type(generator).__name__, "weights": self._weights, **asdict(generator.config)},
            "precision": str(trainer.precision),
            "seconds": {name: round(seconds, 1) for name, seconds in self._seconds.items()},
        }
        if self._kind == "generation":
            module = cast(Draws, pl_module)
            facts["sampling"] = {**asdict(module.sampling), "seed": module.sample_seed if self._asked else self.seed}
            if module.needs_captions:
                facts["captions"] = module.caption_metadata
        folder = Path(trainer.default_root_dir) / FOLDER
        write_report(
            folder,
            f"{type(generator).__name__} against {self.reference.name if self.reference else 'its images'}",
            numbers | logged,
            facts,
            published(generator.config, self._size),
            gallery.grids(self.reference),
        )
        print(f"report: {folder / 'report.md'}", flush=True)
