"""Writes the pictures that ``predict`` of the autoregressive model yields. N pictures of H × W pixels."""

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
from PIL import Image
from torch import Tensor

from callbacks.pictures import grid_image, save_png
from llamagen.whole_file import whole_file

NAME = "{index:06d}_class{label}.png"
PATTERN = "*_class*.png"
ARCHIVE = "samples.npz"
GRID = "grid.png"


class ImageWriter(pl.Callback):
    """Write each picture as ``{index:06d}_class{label}.png`` into the run's folder, then all in one ``samples.npz``.

    The archive has the form that ADM's evaluation reads: ``arr_0`` uint8 (N, H, W, 3) and ``arr_1`` int64 labels (N,),
    in the order of the index. ``grid.png`` shows a row for each class.

    Args:
        grid_columns: pictures of a class in the grid.
        grid_rows: classes in the grid, the lowest ones.
    """

    def __init__(self, grid_columns: int = 20, grid_rows: int = 20) -> None:
        super().__init__()
        if grid_columns < 1 or grid_rows < 1:
            raise ValueError(f"the grid is {grid_rows} × {grid_columns}; both must be at least 1")
        self.grid_columns, self.grid_rows = grid_columns, grid_rows

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse a folder that already holds pictures: they would be mixed into the archive.

        Raises:
            ValueError: in this case.
        """
        root = Path(trainer.default_root_dir)
        if any(root.glob(PATTERN)) or (root / ARCHIVE).exists():
            raise ValueError(f"{root} already holds samples; delete them or choose another folder")
        trainer.strategy.barrier("sample folder checked")

    def on_predict_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: dict[str, Tensor],
        batch: dict[str, Any],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write the pictures ``outputs["images"]`` (B, H, W, 3) uint8 of a batch."""
        root = Path(trainer.default_root_dir)
        pictures = outputs["images"].numpy()
        labels, indices = batch["condition"].tolist(), outputs["index"].tolist()
        for picture, label, index in zip(pictures, labels, indices, strict=True):
            save_png(Image.fromarray(picture), root / NAME.format(index=index, label=label))

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """When every rank has written its pictures, collect them in the archive and draw the grid."""
        trainer.strategy.barrier("samples written")
        if not trainer.is_global_zero:
            return
        root = Path(trainer.default_root_dir)
        files = sorted(root.glob(PATTERN))
        labels = [int(file.stem.rpartition("_class")[2]) for file in files]
        write_archive(root / ARCHIVE, files, labels)
        by_class = {label: [f for f, of in zip(files, labels, strict=True) if of == label] for label in set(labels)}
        rows = [
            [_pixels(file) for file in by_class[label][: self.grid_columns]]
            for label in sorted(by_class)[: self.grid_rows]
        ]
        save_png(grid_image(rows), root / GRID)
        print(f"wrote {len(files)} pictures; look at {root / GRID}")


def _pixels(file: Path) -> np.ndarray:
    with Image.open(file) as image:
        return np.array(image)


def write_archive(path: Path, files: Sequence[Path], labels: Sequence[int]) -> None:
    """Write pictures and labels as an ADM-style ``.npz``, picture by picture: memory does not grow with their number.

    Args:
        path: the archive; it gets its name when it is whole.
        files: PNG files of one size, in order.
        labels: their classes.
    """
    shape = (len(files), *_pixels(files[0]).shape)
    with whole_file(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as entry:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(entry, header)
            for file in files:
                entry.write(_pixels(file).tobytes())
        with archive.open("arr_1.npy", "w") as entry:
            np.lib.format.write_array(entry, np.array(labels, dtype=np.int64))
