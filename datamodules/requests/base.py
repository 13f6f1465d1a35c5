"""Requests for images to sample, distributed over ranks. N: images of a run, B: images in a batch."""

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
    """Requests for images of classes or prompts, in rounds: each round requests one image per entry.

    Image i belongs to entry i modulo the number of entries. With more images per entry, the first images stay the same.

    Args:
        labels: label of each entry: its class, or the number of its prompt.
        per_entry: images per entry.
        batch_size: images per batch and rank.

    Attributes:
        labels: label of each image of the run, (N,) int64.
        prompts: text of each prompt, by label; None if the labels are classes.

    Raises:
        ValueError: if ``per_entry`` or ``batch_size`` is not a positive integer.
    """

    label_name: ClassVar[str]
    """Kind of the labels, ``class`` or ``prompt``; the user's option is ``per_class`` or ``per_prompt``."""

    prompts: list[str] | None = None

    def __init__(self, labels: Sequence[int], per_entry: int, batch_size: int) -> None:
        super().__init__()
        self.allow_zero_length_dataloader_with_multiple_devices = True  # fewer images than ranks
        if not _is_count(per_entry) or not _is_count(batch_size):
            raise ValueError(
                f"per_{self.label_name} is {per_entry} and batch_size {batch_size}; both must be integers of at least 1"
            )
        if len(labels) * per_entry > MAX_REQUESTS:
            raise ValueError(
                f"per_{self.label_name} is {per_entry}, which with {len(labels)} entries requests "
                f"{len(labels) * per_entry} images, more than {MAX_REQUESTS}; request fewer"
            )
        self.batch_size, self._per_entry = batch_size, per_entry
        self.set_labels(labels)
        self._done = np.zeros(len(self.labels), dtype=bool)

    def set_labels(self, labels: Sequence[int]) -> None:
        """Set the label of each entry, for labels that are known only in ``setup``; their number stays the same."""
        self.labels = np.tile(np.array(labels, dtype=np.int64), self._per_entry)

    @abstractmethod
    def request(self, index: int) -> dict[str, Any]:
        """Entries of a batch for one image: its ``index`` and its condition."""

    @property
    def left(self) -> int:
        """Number of images still requested."""
        return int((~self._done).sum())

    def leave_out(self, done: Iterable[int]) -> None:
        """Request all images except those that are done.

        Args:
            done: indices of these images, the same on every rank.
        """
        self._done[:] = False
        self._done[np.fromiter(done, dtype=np.int64)] = True

    def test_dataloader(self) -> EvaluationLoader:
        """The same requests, for images that are measured but not saved.

        Raises:
            ValueError: if there are fewer images than ranks. Lightning skips the test on a rank without batches, and
                the other ranks would wait for it forever.
        """
        ranks = 1 if self.trainer is None else self.trainer.world_size
        if self.left < ranks:
            raise ValueError(
                f"{self.left} images cannot be measured on {ranks} ranks; request more images "
                f"(per_{self.label_name}), or reduce trainer.devices"
            )
        return self.predict_dataloader()

    def predict_dataloader(self) -> EvaluationLoader:
        """Requests of this rank, in order."""
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)
        equally = ranks_wait(self.trainer)
        numbers = np.flatnonzero(~self._done)
        if equally and len(numbers):  # other ranks would wait for a rank without images: generate finished ones again
            numbers = np.append(numbers, np.flatnonzero(self._done)[: -len(numbers) % world_size])
        shares = shared_batches(len(numbers), self.batch_size, rank, world_size, equally)
        batches = [[(int(numbers[position]), epoch) for position, epoch in share] for share in shares]
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
