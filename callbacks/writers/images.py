"""Writer of the images that ``predict`` of the autoregressive model samples. N images of H × W pixels."""

import hashlib
import math
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import lightning.pytorch as pl
import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from PIL import Image
from tqdm import tqdm

from callbacks.compiled_sampling import CompiledSampling
from callbacks.progress import shows_progress
from callbacks.protocols import ImageRequests, PredictsImages, PromptRequests, datamodule, require
from callbacks.writers.image_threads import ImageThreads
from callbacks.writers.prompt_records import image_text, prompts_plan, warn_about_truncation, write_metadata
from callbacks.writers.sample_folder import ARCHIVE, GRID, SampleFolder
from llamagen.checkpoints.contents import weights_checksum
from llamagen.files import atomic_file
from llamagen.grids import captioned_grid, grid_image, save_png
from llamagen.sampling import Images

T = TypeVar("T")


class ImageWriter(pl.Callback):
    """Write each image as ``images/<label>/{index:06d}_class{label}.png`` into the run's folder, then all of them into
    ``samples.npz``.

    The archive has the format of ADM's evaluation: ``arr_0`` uint8 (N, H, W, 3) and ``arr_1`` int64 labels (N,),
    sorted by index. ``grid.png`` shows a row for each class. ``images`` can be read as a folder of class folders.

    Images of prompts are ``images/<number>/{index:06d}_prompt{number}.png``; ``arr_1`` holds the numbers of the
    prompts, starting at 0. ``metadata.jsonl`` has a line with prompt, seed and settings for each image, and the grid
    shows the prompts below the images. A warning at the end names the prompts that were truncated.

    The same command resumes a stopped run with the remaining images, on any number of ranks and with any batch size.
    The archive is written when all images exist.

    Args:
        grid_columns: maximum number of images in a row of the grid. A row shows one class or prompt, or several if
            there is one image of each.
        grid_rows: maximum number of rows; those of the lowest classes or first prompts are shown.
    """

    def __init__(self, grid_columns: int = 20, grid_rows: int = 20) -> None:
        super().__init__()
        if grid_columns < 1 or grid_rows < 1:
            raise ValueError(f"the grid is {grid_rows} × {grid_columns}; both must be at least 1")
        self.grid_columns, self.grid_rows = grid_columns, grid_rows
        self._folder: SampleFolder | None = None
        self._threads: ImageThreads | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check module, data and folder, and request only the images that do not exist yet.

        Raises:
            ValueError: if the module samples no images, the data requests none, or the folder holds a complete run or
                other images.
        """
        if stage != "predict":
            return
        require(PredictsImages, pl_module, self)
        data = self._data(trainer)
        folder = SampleFolder(Path(trainer.default_root_dir), data.labels, data.label_name)
        self._folder, self._threads = folder, None

        def finished() -> list[int]:
            folder.check_free()
            return folder.finished()

        # All ranks use the listing of rank zero, and none may write before all of them have it.
        data.leave_out(on_rank_zero(trainer, finished))

    def _data(self, trainer: pl.Trainer) -> ImageRequests:
        data = require(ImageRequests, datamodule(trainer), self)
        return data if data.prompts is None else require(PromptRequests, data, self)

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the plan of the run, or compare it with that of the stopped run.

        Raises:
            ValueError: if labels or prompts, seed, size, sampling settings, precision, model, tokenizer or text encoder
                differ.
        """
        assert self._folder is not None
        folder, module = self._folder, require(PredictsImages, pl_module, self)
        prompts = self._data(trainer).prompts
        plan = {
            "format": "llamagen-samples",
            "number of images": len(folder.labels),
            "order of labels": hashlib.sha256(folder.labels.astype("<i8").tobytes()).hexdigest(),
            **(prompts_plan(prompts, module) if prompts is not None else {}),
            "sample_seed": module.sample_seed,
            "image_size": module.image_size,
            **{f"sampling.{name}": value for name, value in module.sampling.image_settings().items()},
            "precision": str(trainer.precision),
            "int8": any(isinstance(c, CompiledSampling) and c.int8 for c in trainer.callbacks),  # type: ignore[attr-defined]
            "model": weights_checksum(module.generator),  # with sharded parameters, on all ranks
            "tokenizer": module.tokenizer_checksum,
        }
        on_rank_zero(trainer, lambda: folder.begin(plan))
        self._threads = ImageThreads()

    def on_predict_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: dict[str, Any],
        batch: dict[str, Any],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Queue the images ``outputs["images"]`` of a batch; they are written while the next ones are sampled.

        If the module encodes prompts, ``outputs["truncated"]`` (B,) bool tells which of them were truncated.
        """
        assert self._folder is not None
        assert self._threads is not None
        truncated = outputs.get("truncated")
        cut_rows: list[int] = [] if truncated is None else truncated.nonzero().flatten().tolist()
        for row, index in enumerate(outputs["index"].tolist()):
            image = partial(_image, outputs["images"], row)
            self._threads.write(image, self._folder.path(index), image_text(row in cut_rows))

    def on_predict_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Wait until every rank has written its images."""
        assert self._threads is not None
        self._threads.finish()
        trainer.strategy.barrier("images written")

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """If all images exist, write the grid and then the archive, which marks the folder as complete."""
        if not trainer.is_global_zero:
            return
        assert self._folder is not None
        folder, count = self._folder, len(self._folder.labels)
        data = self._data(trainer)
        prompts = data.prompts
        if prompts is not None:
            warn_about_truncation(folder, prompts)
        if missing := count - len(folder.finished()):
            rank_zero_warn(
                f"{missing} of {count} images are missing in {folder.root}, so {ARCHIVE} was not written; resume with "
                "the same command without a limit"
            )
            return
        rows = self._grid_rows(folder)
        images = [[_pixels(folder.path(index)) for index in row] for row in rows]
        if prompts is None:
            save_png(grid_image(images), folder.root / GRID)
        else:
            captions = [[prompts[folder.labels[index]] or "(no words)" for index in row] for row in rows]
            save_png(captioned_grid(images, captions), folder.root / GRID)
            module = require(PredictsImages, pl_module, self)
            write_metadata(folder, require(PromptRequests, data, self), module)
        write_archive(folder, shows_progress(trainer))
        print(f"{count} images are complete, see {folder.root / GRID}")

    def _grid_rows(self, folder: SampleFolder) -> list[list[int]]:
        """Indices of the images in each row."""
        order = np.argsort(folder.labels, kind="stable")
        _, firsts = np.unique(folder.labels[order], return_index=True)
        if len(firsts) == len(order):  # one image of each class or prompt
            columns = min(self.grid_columns, math.isqrt(len(order) - 1) + 1)
            firsts = np.arange(0, len(order), columns)
        return [row[: self.grid_columns].tolist() for row in np.split(order, firsts[1:])[: self.grid_rows]]

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Complete the folder if this rank had nothing to sample: Lightning then calls no hook of ``predict``.

        Raises:
            ValueError: see :meth:`on_predict_start`.
        """
        if stage == "predict" and self._threads is None:
            self.on_predict_start(trainer, pl_module)
            self.on_predict_epoch_end(trainer, pl_module)
            self.on_predict_end(trainer, pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """End the threads once they have written the images that they have begun."""
        if self._threads is not None:
            self._threads.cancel()


def on_rank_zero(trainer: pl.Trainer, task: Callable[[], T]) -> T:
    """Run a task on rank zero and return its result on every rank.

    Raises:
        ValueError: if the task raises one; on every rank, so that none waits for another.
    """
    result, message = cast(T, None), ""
    if trainer.is_global_zero:
        try:
            result = task()
        except ValueError as error:
            message = str(error)
    result, message = trainer.strategy.broadcast((result, message))
    if message:
        raise ValueError(message)
    return result


def _image(images: Images, row: int) -> np.ndarray:
    image: np.ndarray = images.numpy()[row]  # waits for the device, but in a writer thread
    return image


def _pixels(file: Path) -> np.ndarray:
    with Image.open(file) as image:
        return np.array(image)


def write_archive(folder: SampleFolder, show_progress: bool = False) -> None:
    """Write images and labels as an ``.npz`` in ADM's format, one image at a time: memory is independent of N.

    Args:
        folder: complete, with images of one size; the archive gets its name when it is complete.
        show_progress: show a progress bar.
    """
    count = len(folder.labels)
    shape = (count, *_pixels(folder.path(0)).shape)
    with (
        atomic_file(folder.root / ARCHIVE) as temporary,
        zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive,
    ):
        with archive.open("arr_0.npy", "w", force_zip64=True) as entry:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(entry, header)
            for index in tqdm(range(count), f"writing {ARCHIVE}", unit="image", disable=not show_progress):
                entry.write(_pixels(folder.path(index)).tobytes())
        with archive.open("arr_1.npy", "w") as entry:
            np.lib.format.write_array(entry, folder.labels)
