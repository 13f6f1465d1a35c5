"""The base of datasets that skip what they cannot use."""

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
    """Examples by number and epoch; a batch leaves out what cannot be used, and says so.

    Args:
        examples: the examples.
        never_empty: where nothing of a batch can be used, put another example in its place. For training, where other
            ranks would wait for one without a batch, and Lightning ends an epoch properly only at its planned last one.
    """

    def __init__(self, examples: "ExampleIndex | StreamIndex", never_empty: bool = False) -> None:
        self.examples, self.never_empty = examples, never_empty

    def __len__(self) -> int:
        return len(self.examples)

    @abstractmethod
    def read(self, number: int, epoch: int) -> dict[str, Any]:
        """The parts of an example.

        Raises:
            BadExampleError: if it cannot be used.
        """

    @abstractmethod
    def join(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """A batch of what :meth:`read` gave, at least one."""

    def read_many(self, addresses: list[Address]) -> tuple[list[dict[str, Any]], list[int], list[Skipped]]:
        """What of the addressed examples can be used, their numbers, and what cannot."""
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
            index, place = self.examples.locate(number)
        except BadExampleError:
            return ""
        key: str = index.keys[place]
        return key

    def __getitem__(self, address: Address) -> dict[str, Any]:
        """One example.

        Raises:
            BadExampleError: if it cannot be used.
        """
        batch = self.join([self.read(*address)])
        return {name: part[0].item() if name in ("labels", "condition") else part[0] for name, part in batch.items()}

    def __getitems__(self, addresses: list[Address]) -> dict[str, Any]:
        """A batch of the examples that can be used, with ``numbers`` (B,) int64; the others under ``skipped``."""
        examples, numbers, skipped = self.read_many(addresses)
        number, epoch = addresses[0]
        for attempt in range(1, MAX_ATTEMPTS + 1 if self.never_empty else 0):
            if numbers:
                break
            examples, numbers, _ = self.read_many([(self.examples.another(number, attempt), epoch)])
        if self.never_empty and not numbers:
            raise ValueError(f"{MAX_ATTEMPTS} examples in a row cannot be used, the last: {skipped[-1].message}")
        batch = {**self.join(examples), "numbers": torch.tensor(numbers)} if numbers else {}
        news, opened = self.examples.take_news()
        return {**batch, SKIPPED: (skipped + news, opened)} if skipped or news else batch
