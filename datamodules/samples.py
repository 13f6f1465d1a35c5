"""What to sample: labels × how many. N pictures."""

import re
from collections.abc import Iterable
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
from torch.utils.data import Dataset

from datamodules.loader import EvaluationLoader, ranks_wait
from datamodules.order import Address, shared_batches

CLASS_NUMBER = re.compile("[0-9]{1,9}")


class ClassRequests(Dataset[dict[str, int]]):
    """The labels in turn, until each entry was asked for ``per_class`` times."""

    def __init__(self, classes: list[int], per_class: int) -> None:
        self.classes, self.per_class = classes, per_class

    def __len__(self) -> int:
        return len(self.classes) * self.per_class

    def __getitem__(self, address: Address) -> dict[str, int]:
        """``index`` of the picture in the run and ``condition``, its class."""
        index = address[0]
        return {"index": index, "condition": self.classes[index % len(self.classes)]}


def read_labels(path: Path) -> list[int]:
    """The labels of a text file, one class number a line; blank lines do not count.

    Raises:
        ValueError: if the file cannot be read, has no labels, or has something else in a line.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise ValueError(
            f"classes is {path}, which cannot be read ({reason}); give a number, a list, or a text file with one class "
            "number a line"
        ) from error
    labels = []
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if not text:
            continue
        if not CLASS_NUMBER.fullmatch(text):
            raise ValueError(
                f"{path}, line {number}: {text[:40]!r} is no class number; write one number from 0 on in each line"
            )
        labels.append(int(text))
    if not labels:
        raise ValueError(f"{path} has no labels, not even in line 1; write one class number in each line")
    return labels


class SampleDataModule(pl.LightningDataModule):
    """Requests for pictures: the labels in turn, until each entry was asked for ``per_class`` times.

    ``predict`` is for pictures that are kept, ``test`` for pictures that are measured.

    Args:
        classes: which classes, or how many: 10 means 0 to 9; or a text file with one class number a line, in which a
            class may come several times, for example a file of 50,000 random labels with ``per_class`` 1.
        per_class: pictures of each entry.
        batch_size: pictures a rank and batch.

    Attributes:
        classes: the entries, in order.
    """

    def __init__(self, classes: int | list[int] | Path | str = 1000, per_class: int = 50, batch_size: int = 64) -> None:
        super().__init__()
        self.allow_zero_length_dataloader_with_multiple_devices = True  # fewer pictures than ranks
        if isinstance(classes, (str, Path)):
            self.classes = read_labels(Path(classes))
        else:
            self.classes = list(range(classes)) if isinstance(classes, int) else list(classes)
            if not self.classes or len(set(self.classes)) < len(self.classes) or not all(map(_is_label, self.classes)):
                raise ValueError(
                    f"classes is {classes}; give a positive number, a list of different class numbers, or a text file "
                    "with one class number a line"
                )
        if per_class < 1 or batch_size < 1:
            raise ValueError(f"per_class is {per_class} and batch_size {batch_size}; both must be at least 1")
        self.per_class, self.batch_size = per_class, batch_size
        self._done = np.zeros(len(self.classes) * per_class, dtype=bool)

    @property
    def labels(self) -> np.ndarray:
        """Class of each picture of the run, (N,) int64."""
        return np.tile(np.array(self.classes, dtype=np.int64), self.per_class)

    @property
    def left(self) -> int:
        """How many pictures are still asked for."""
        return int((~self._done).sum())

    def leave_out(self, done: Iterable[int]) -> None:
        """Ask for all pictures but these.

        Args:
            done: their indices, the same on every rank.
        """
        self._done[:] = False
        self._done[np.fromiter(done, dtype=np.int64)] = True

    def test_dataloader(self) -> EvaluationLoader:
        """The same requests, for pictures that are measured and not kept.

        Raises:
            ValueError: if there are fewer than ranks: Lightning leaves a rank that has none out of the whole test, and
                the others would wait for it.
        """
        ranks = 1 if self.trainer is None else self.trainer.world_size
        if self.left < ranks:
            raise ValueError(
                f"{self.left} pictures cannot be measured on {ranks} ranks; ask for more of them (per_class), or set "
                "trainer.devices to less"
            )
        return self.predict_dataloader()

    def predict_dataloader(self) -> EvaluationLoader:
        """The requests of this rank, in order."""
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)
        equally = ranks_wait(self.trainer)
        numbers = np.flatnonzero(~self._done)
        if equally and len(numbers):  # a rank without pictures would be waited for: draw some that are there once more
            numbers = np.append(numbers, np.flatnonzero(self._done)[: -len(numbers) % world_size])
        shares = shared_batches(len(numbers), self.batch_size, rank, world_size, equally)
        batches = [[(int(numbers[place]), epoch) for place, epoch in share] for share in shares]
        return EvaluationLoader(ClassRequests(self.classes, self.per_class), batches, num_workers=0)


def _is_label(label: int) -> bool:
    return isinstance(label, int) and 0 <= label < 10**9
