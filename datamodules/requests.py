"""Requests for images: entries in turn, each a number of times, shared out over ranks. N images, B a batch."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import lightning.pytorch as pl
import numpy as np
from torch.utils.data import Dataset

from datamodules.loading.loader import EvaluationLoader, ranks_wait
from datamodules.loading.order import Address, shared_batches

MAX_REQUESTS = 10**9


class RequestDataModule(pl.LightningDataModule, ABC):
    """Requests for images: the entries in turn, until each was asked for a number of times.

    So image i is one of entry i modulo their number, and with more images of each entry the first ones stay what
    they were.

    Args:
        labels: of each entry: its class, or the number of its prompt.
        per_entry: images of each entry.
        batch_size: images a rank and batch.

    Attributes:
        labels: of each image of the run, (N,) int64.
        prompts: texts that images are asked of, by label; None where it is classes.

    Raises:
        ValueError: if ``per_entry``, which users know by the name of the label, or ``batch_size`` is not positive.
    """

    label_name: ClassVar[str]
    """What a label is the number of: ``class`` or ``prompt``."""

    prompts: list[str] | None = None

    def __init__(self, labels: Sequence[int], per_entry: int, batch_size: int) -> None:
        super().__init__()
        self.allow_zero_length_dataloader_with_multiple_devices = True  # fewer images than ranks
        if not _is_count(per_entry) or not _is_count(batch_size):
            raise ValueError(
                f"per_{self.label_name} is {per_entry} and batch_size {batch_size}; both must be at least 1, and whole"
            )
        if len(labels) * per_entry > MAX_REQUESTS:
            raise ValueError(
                f"per_{self.label_name} is {per_entry}, which with {len(labels)} entries asks for "
                f"{len(labels) * per_entry} images, more than {MAX_REQUESTS}; ask for fewer"
            )
        self.batch_size = batch_size
        self.labels = np.tile(np.array(labels, dtype=np.int64), per_entry)
        self._done = np.zeros(len(self.labels), dtype=bool)

    @abstractmethod
    def request(self, index: int) -> dict[str, Any]:
        """What a batch holds of an image of the run: its ``index``, and of what it is."""

    @property
    def left(self) -> int:
        """How many images are still asked for."""
        return int((~self._done).sum())

    def leave_out(self, done: Iterable[int]) -> None:
        """Ask for all images but these.

        Args:
            done: their indices, the same on every rank.
        """
        self._done[:] = False
        self._done[np.fromiter(done, dtype=np.int64)] = True

    def test_dataloader(self) -> EvaluationLoader:
        """The same requests, for images that are measured and not kept.

        Raises:
            ValueError: if there are fewer than ranks: Lightning leaves a rank that has none out of the whole test, and
                the others would wait for it.
        """
        ranks = 1 if self.trainer is None else self.trainer.world_size
        if self.left < ranks:
            raise ValueError(
                f"{self.left} images cannot be measured on {ranks} ranks; ask for more of them "
                f"(per_{self.label_name}), or set trainer.devices to less"
            )
        return self.predict_dataloader()

    def predict_dataloader(self) -> EvaluationLoader:
        """The requests of this rank, in order."""
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)
        equally = ranks_wait(self.trainer)
        numbers = np.flatnonzero(~self._done)
        if equally and len(numbers):  # a rank without images would be waited for: draw some that are there once more
            numbers = np.append(numbers, np.flatnonzero(self._done)[: -len(numbers) % world_size])
        shares = shared_batches(len(numbers), self.batch_size, rank, world_size, equally)
        batches = [[(int(numbers[place]), epoch) for place, epoch in share] for share in shares]
        return EvaluationLoader(_Requests(self), batches, num_workers=0)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


class _Requests(Dataset[dict[str, Any]]):
    def __init__(self, data: RequestDataModule) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data.labels)

    def __getitem__(self, address: Address) -> dict[str, Any]:
        return self.data.request(address[0])
