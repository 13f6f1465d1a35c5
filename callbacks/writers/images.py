"""Writes the images that ``predict`` of the autoregressive model yields. N images of H × W pixels."""

import hashlib
import math
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import lightning.pytorch as pl
import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from PIL import Image
from torch import nn
from tqdm import tqdm

from callbacks.compiled_sampling import CompiledSampling
from callbacks.writers.image_threads import ImageThreads
from callbacks.writers.prompt_records import (
    PromptRequests,
    image_text,
    prompts_plan,
    warn_of_cut_prompts,
    write_metadata,
)
from callbacks.writers.sample_folder import ARCHIVE, GRID, SampleFolder
from llamagen.checkpoints.contents import weights_checksum
from llamagen.files import atomic_file
from llamagen.grids import captioned_grid, grid_image, save_png
from llamagen.sampling import Images

T = TypeVar("T")


class SamplingModule(Protocol):
    """A module that draws images."""

    sampling: Any
    """Dataclass of what decides an image, beside its label or prompt and the seed."""
    sample_seed: int
    image_size: int | None
    """Side in pixels to which images are resized."""

    @property
    def generator(self) -> nn.Module:
        """The model whose codes become images."""

    @property
    def tokenizer_checksum(self) -> str | None:
        """Of the tokenizer that makes images of codes."""


class ImageRequests(Protocol):
    """A DataModule that asks for images, of classes or of prompts."""

    label_name: str
    """What a label is the number of: ``class`` or ``prompt``."""
    labels: np.ndarray
    """Of each image, (N,) int64."""
    prompts: list[str] | None
    """By label; None where labels are classes. With prompts there are also
    :attr:`~callbacks.writers.prompt_records.PromptRequests.columns`."""

    def leave_out(self, done: Iterable[int]) -> None:
        """Ask for all images but these indices."""


class ImageWriter(pl.Callback):
    """Write each image as ``images/<label>/{index:06d}_class{label}.png`` into the run's folder, then all in one
    ``samples.npz``.

    The archive has the form that ADM's evaluation reads: ``arr_0`` uint8 (N, H, W, 3) and ``arr_1`` int64 labels (N,),
    in the order of the index. ``grid.png`` shows a row for each class. ``images`` is a folder of class folders.

    Images of prompts are ``images/<number>/{index:06d}_prompt{number}.png``; ``arr_1`` holds the numbers of the
    prompts, from 0 on. ``metadata.jsonl`` says in a line for each image of what and how it was drawn, and the grid
    shows the prompts below the images. Prompts that were longer than the model reads are named at the end.

    The command of a stopped run goes on with the images that are not there yet, on any number of ranks and with any
    batch size. The archive is written when all are there.

    Args:
        grid_columns: most images in a row of the grid: of one class or prompt, or of several that have one each.
        grid_rows: most rows of the grid; the lowest classes, the first prompts.
    """

    def __init__(self, grid_columns: int = 20, grid_rows: int = 20) -> None:
        super().__init__()
        if grid_columns < 1 or grid_rows < 1:
            raise ValueError(f"the grid is {grid_rows} × {grid_columns}; both must be at least 1")
        self.grid_columns, self.grid_rows = grid_columns, grid_rows
        self._folder: SampleFolder | None = None
        self._threads: ImageThreads | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave out the images that are there.

        Raises:
            ValueError: if the folder holds a complete run, or images of something else.
        """
        if stage != "predict":
            return
        data = cast(ImageRequests, trainer.datamodule)  # type: ignore[attr-defined]
        folder = SampleFolder(Path(trainer.default_root_dir), data.labels, data.label_name)
        self._folder, self._threads = folder, None

        def drawn() -> list[int]:
            folder.check_free()
            return folder.drawn()

        # One listing for all ranks, of which none may write before they have it.
        data.leave_out(of_first_rank(trainer, drawn))

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put down what the run is begun with, or see that it was begun with the same.

        Raises:
            ValueError: if labels or prompts, seed, size, sampling settings, precision, model, tokenizer or text encoder
                differ.
        """
        assert self._folder is not None
        folder, module = self._folder, cast(SamplingModule, pl_module)
        prompts = cast(ImageRequests, trainer.datamodule).prompts  # type: ignore[attr-defined]
        plan = {
            "format": "llamagen-samples",
            "number of images": len(folder.labels),
            "order of labels": hashlib.sha256(folder.labels.astype("<i8").tobytes()).hexdigest(),
            **(prompts_plan(prompts, module) if prompts is not None else {}),
            "sample_seed": module.sample_seed,
            "image_size": module.image_size,
            **{f"sampling.{name}": value for name, value in asdict(module.sampling).items()},
            "precision": str(trainer.precision),
            "int8": any(isinstance(c, CompiledSampling) and c.int8 for c in trainer.callbacks),  # type: ignore[attr-defined]
            "model": weights_checksum(module.generator),  # of all ranks, where they share the parameters
            "tokenizer": module.tokenizer_checksum,
        }
        of_first_rank(trainer, lambda: folder.begin(plan))
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
        """Have the images ``outputs["images"]`` of a batch written while the next are drawn.

        ``outputs["truncated"]`` (B,) bool says whose prompts were cut, if the module can tell.
        """
        assert self._folder is not None
        assert self._threads is not None
        truncated = outputs.get("truncated")
        cut: list[int] = [] if truncated is None else truncated.nonzero().flatten().tolist()
        for row, index in enumerate(outputs["index"].tolist()):
            image = partial(_image, outputs["images"], row)
            self._threads.write(image, self._folder.path(index), image_text(row in cut))

    def on_predict_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Wait until every rank has written its images."""
        assert self._threads is not None
        self._threads.finish()
        trainer.strategy.barrier("images written")

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """If all images are there, draw the grid and collect them in the archive, which completes the folder."""
        if not trainer.is_global_zero:
            return
        assert self._folder is not None
        folder, count = self._folder, len(self._folder.labels)
        prompts = cast(ImageRequests, trainer.datamodule).prompts  # type: ignore[attr-defined]
        if prompts is not None:
            warn_of_cut_prompts(folder, prompts)
        if missing := count - len(folder.drawn()):
            rank_zero_warn(
                f"{missing} of {count} images are missing in {folder.root}, so {ARCHIVE} was not written; run the "
                "same command without a limit to go on"
            )
            return
        rows = self._grid_rows(folder)
        images = [[_pixels(folder.path(index)) for index in row] for row in rows]
        if prompts is None:
            save_png(grid_image(images), folder.root / GRID)
        else:
            captions = [[prompts[folder.labels[index]] or "(no words)" for index in row] for row in rows]
            save_png(captioned_grid(images, captions), folder.root / GRID)
            write_metadata(folder, cast(PromptRequests, trainer.datamodule), cast(SamplingModule, pl_module))  # type: ignore[attr-defined]
        write_archive(folder, show_progress=trainer.progress_bar_callback is not None)
        print(f"{count} images are there; look at {folder.root / GRID}")

    def _grid_rows(self, folder: SampleFolder) -> list[list[int]]:
        """Indices of the images in each row."""
        order = np.argsort(folder.labels, kind="stable")
        _, firsts = np.unique(folder.labels[order], return_index=True)
        if len(firsts) == len(order):  # one image of each
            columns = min(self.grid_columns, math.isqrt(len(order) - 1) + 1)
            firsts = np.arange(0, len(order), columns)
        return [row[: self.grid_columns].tolist() for row in np.split(order, firsts[1:])[: self.grid_rows]]

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Complete the folder where this rank had nothing to draw; Lightning then starts no prediction on it.

        Raises:
            ValueError: see :meth:`on_predict_start`.
        """
        if stage == "predict" and self._threads is None:
            self.on_predict_start(trainer, pl_module)
            self.on_predict_epoch_end(trainer, pl_module)
            self.on_predict_end(trainer, pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """End the threads; the images that they have begun are written."""
        if self._threads is not None:
            self._threads.cancel()


def of_first_rank(trainer: pl.Trainer, task: Callable[[], T]) -> T:
    """What a task gives on the first rank, on every rank.

    Raises:
        ValueError: of the task, on every rank, so that none waits for another.
    """
    result, refusal = cast(T, None), ""
    if trainer.is_global_zero:
        try:
            result = task()
        except ValueError as error:
            refusal = str(error)
    result, refusal = trainer.strategy.broadcast((result, refusal))
    if refusal:
        raise ValueError(refusal)
    return result


def _image(images: Images, row: int) -> np.ndarray:
    image: np.ndarray = images.numpy()[row]  # waits for them, in the thread that writes
    return image


def _pixels(file: Path) -> np.ndarray:
    with Image.open(file) as image:
        return np.array(image)


def write_archive(folder: SampleFolder, show_progress: bool = False) -> None:
    """Write images and labels as an ADM-style ``.npz``, image by image: memory does not grow with their number.

    Args:
        folder: holds all its images, which are of one size; the archive gets its name when it is whole.
        show_progress: with a bar.
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
