"""What to sample: classes × how many."""

import lightning.pytorch as pl
from torch.utils.data import Dataset

from datamodules.loader import EvaluationLoader, ranks_wait
from datamodules.order import Address, shared_batches


class ClassRequests(Dataset[dict[str, int]]):
    """The classes in turn, until each was asked for ``per_class`` times."""

    def __init__(self, classes: list[int], per_class: int) -> None:
        self.classes, self.per_class = classes, per_class

    def __len__(self) -> int:
        return len(self.classes) * self.per_class

    def __getitem__(self, address: Address) -> dict[str, int]:
        """``index`` of the picture in the run and ``condition``, its class."""
        index = address[0]
        return {"index": index, "condition": self.classes[index % len(self.classes)]}


class SampleDataModule(pl.LightningDataModule):
    """Requests for pictures, balanced over classes; for ``predict``.

    Args:
        classes: which classes, or how many: 10 means 0 to 9.
        per_class: pictures of each.
        batch_size: pictures a rank and batch.
    """

    def __init__(self, classes: int | list[int] = 1000, per_class: int = 50, batch_size: int = 64) -> None:
        super().__init__()
        self.allow_zero_length_dataloader_with_multiple_devices = True  # fewer pictures than ranks
        self.classes = list(range(classes)) if isinstance(classes, int) else list(classes)
        if not self.classes or min(self.classes) < 0 or len(set(self.classes)) < len(self.classes):
            raise ValueError(f"classes is {classes}; give a positive number, or a list of different class numbers")
        if per_class < 1 or batch_size < 1:
            raise ValueError(f"per_class is {per_class} and batch_size {batch_size}; both must be at least 1")
        self.per_class, self.batch_size = per_class, batch_size

    def predict_dataloader(self) -> EvaluationLoader:
        """The requests of this rank, in order."""
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)
        requests = ClassRequests(self.classes, self.per_class)
        batches = shared_batches(len(requests), self.batch_size, rank, world_size, ranks_wait(self.trainer))
        return EvaluationLoader(requests, batches, num_workers=0)
