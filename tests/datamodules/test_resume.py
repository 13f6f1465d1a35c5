"""The state of a DataModule: training data go on where the checkpoint was written."""

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from datamodules.images import ImageDataModule
from tests.datamodules.shard_files import write_pictures

pytestmark = pytest.mark.filterwarnings("ignore:.*worker processes in total.*")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_pictures(tmp_path, train=11, val=2)
    return tmp_path


def image_data(root: Path, **options: int) -> ImageDataModule:
    data = ImageDataModule(root, **{"image_size": 4, "batch_size": 2, "num_workers": 0, "seed": 9, **options})  # type: ignore[arg-type]
    data.setup("fit")
    return data


def keys(batches: Any) -> list[str]:
    return [key for batch in batches for key in batch["keys"]]


def saved_and_loaded(state: dict[str, Any]) -> dict[str, Any]:
    """A state after a way through a checkpoint file, primitives only."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    loaded: dict[str, Any] = torch.load(buffer, weights_only=True)
    return loaded


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("done", [1, 3, 6])
def test_the_next_training_data_go_on_at_the_saved_place(root: Path, done: int, num_workers: int) -> None:
    loader = image_data(root).train_dataloader()
    expected = [keys(loader) for _ in range(3)]
    stopped = image_data(root, num_workers=num_workers)
    loader = stopped.train_dataloader()
    keys(loader)
    batches = iter(loader)
    before = keys(next(batches) for _ in range(done))
    resumed = image_data(root)
    resumed.load_state_dict(saved_and_loaded(stopped.state_dict()))
    loader = resumed.train_dataloader()
    rest = keys(loader) if done < 6 else []
    assert before + rest == expected[1]
    assert keys(loader) == expected[2]


def test_a_saved_place_goes_on_with_another_batch_size(root: Path) -> None:
    expected = keys(image_data(root).train_dataloader())
    stopped = image_data(root)
    batches = iter(stopped.train_dataloader())
    before = keys(next(batches) for _ in range(2))
    resumed = image_data(root, batch_size=5)
    resumed.load_state_dict(stopped.state_dict())
    assert before + keys(resumed.train_dataloader()) == expected


def test_without_training_data_there_is_no_state(root: Path) -> None:
    assert image_data(root).state_dict() == {}
    started = image_data(root)
    started.load_state_dict({})
    assert keys(started.train_dataloader()) == keys(image_data(root).train_dataloader())


def test_a_restored_place_can_be_saved_before_training_goes_on(root: Path) -> None:
    place = {"train": {"epoch": 2, "consumed": 4}}
    restored = image_data(root)
    restored.load_state_dict(place)
    assert restored.state_dict() == place
    restored.train_dataloader()
    assert restored.state_dict() == place


def test_validation_does_not_move_the_place(root: Path) -> None:
    data = image_data(root)
    batches = iter(data.train_dataloader())
    next(batches)
    place = data.state_dict()
    assert keys(data.val_dataloader()) == ["val/0", "val/1"]
    assert data.state_dict() == place == {"train": {"epoch": 0, "consumed": 2}}


def trainer_of(epoch: int = 0, world_size: int = 1) -> Any:
    progress = SimpleNamespace(is_last_batch=False)
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress))
    return SimpleNamespace(global_rank=0, world_size=world_size, current_epoch=epoch, fit_loop=loop)


def test_a_reloaded_loader_goes_on_with_the_next_epoch(root: Path) -> None:
    data = image_data(root)
    data.trainer = trainer_of()
    first = keys(data.train_dataloader())
    data.trainer = trainer_of(epoch=1)
    loader = data.train_dataloader()
    second = keys(loader)
    assert loader.state_dict()["epoch"] == 1
    assert sorted(second) == sorted(first)
    assert second != first


def test_an_epoch_that_is_over_early_is_saved_as_over(root: Path) -> None:
    data = image_data(root)
    data.trainer = trainer_of()
    next(iter(data.train_dataloader()))
    assert data.state_dict() == {"train": {"epoch": 0, "consumed": 2}}
    data.trainer.fit_loop.epoch_loop.batch_progress.is_last_batch = True
    assert data.state_dict() == {"train": {"epoch": 0, "consumed": 11}}


def test_fewer_validation_samples_than_ranks_are_refused(root: Path) -> None:
    data = image_data(root)
    data.trainer = trainer_of(world_size=3)
    with pytest.raises(ValueError, match="2 validation samples cannot be shared out over 3 ranks"):
        data.val_dataloader()
