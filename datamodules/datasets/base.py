"""Base class of the datasets, which skip bad examples."""

from abc import abstractmethod
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Dataset

from datamodules.loading.loader import SKIPPED
from datamodules.loading.order import Address
from datamodules.storage.bad_examples import BadExampleError, Skipped
from datamodules.storage.index import ExampleIndex

if TYPE_CHECKING:
    from datamodules.loading.stream import StreamIndex

MAX_ATTEMPTS = 100


class ExampleDataset(Dataset[dict[str, Any]]):
    """Examples by number and epoch. A batch leaves out bad examples and lists them.

    Args:
        examples: index of the examples.
        never_empty: if all examples of a batch are bad, use another example instead. Needed in training, where other
            ranks would wait for a rank without a batch, and where Lightning ends an epoch only at its last batch.
    """

    def __init__(self, examples: "ExampleIndex | StreamIndex", never_empty: bool = False) -> None:
        self.examples, self.never_empty = examples, never_empty

    def __len__(self) -> int:
        return len(self.examples)

    @abstractmethod
    def read(self, number: int, epoch: int) -> dict[str, Any]:
        """Read an example.

        Raises:
            BadExampleError: if it is bad.
        """

    @abstractmethod
    def collate(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Combine at least one result of :meth:`read` into a batch."""

    def read_many(self, addresses: list[Address]) -> tuple[list[dict[str, Any]], list[int], list[Skipped]]:
        """Read examples. Returns the good ones, their numbers, and the bad ones."""
        examples: list[dict[str, Any]] = []
        numbers: list[int] = []
        skipped: list[Skipped] = []
        for number, epoch in addresses:
            try:
                examples.append(self.read(number, epoch))
                numbers.append(number)
            except BadExampleError as error:
                skipped.append(Skipped(number, self._key(number), error.reason, str(error)))
        return examples, numbers, skipped

    def _key(self, number: int) -> str:
        try:
            index, position = self.examples.locate(number)
        except BadExampleError:
            return ""
        key: str = index.keys[position]
        return key

    def __getitem__(self, address: Address) -> dict[str, Any]:
        """Read one example.

        Raises:
            BadExampleError: if it is bad.
        """
        batch = self.collate([self.read(*address)])
        return {name: part[0].item() if name in ("labels", "condition") else part[0] for name, part in batch.items()}

    def __getitems__(self, addresses: list[Address]) -> dict[str, Any]:
        """A batch of the good examples with their ``numbers``, (B,) int64; the bad ones are listed under
        ``skipped``.
        """
        examples, numbers, skipped = self.read_many(addresses)
        number, epoch = addresses[0]
        for attempt in range(1, MAX_ATTEMPTS + 1 if self.never_empty else 0):
            if numbers:
                break
            examples, numbers, _ = self.read_many([(self.examples.substitute(number, attempt), epoch)])
        if self.never_empty and not numbers:
            raise ValueError(f"{MAX_ATTEMPTS} examples in a row are bad, e.g.: {skipped[-1].message}")
        batch = {**self.collate(examples), "numbers": torch.tensor(numbers)} if numbers else {}
        more, opened = self.examples.pop_skipped()
        return {**batch, SKIPPED: (skipped + more, opened)} if skipped or more else batch
