"""State of a DataModule: training data resume where the checkpoint was written."""

import io
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from datamodules.images import ImageDataModule
from tests.datamodules.shard_files import write_images

pytestmark = pytest.mark.filterwarnings("ignore:.*worker processes in total.*")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_images(tmp_path, train=11, val=2)
    return tmp_path


def image_data(root: Path, **options: Any) -> ImageDataModule:
    data = ImageDataModule(root, **{"image_size": 4, "batch_size": 2, "num_workers": 0, "seed": 9, **options})
    data.setup("fit")
    return data


def keys(batches: Any) -> list[str]:
    return [key for batch in batches for key in batch["keys"]]


def saved_and_loaded(state: dict[str, Any]) -> dict[str, Any]:
    """Save a state to a checkpoint file and load it, primitives only."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    loaded: dict[str, Any] = torch.load(buffer, weights_only=True)
    return loaded


@pytest.mark.parametrize(("done", "num_workers"), [(1, 0), (3, 0), (3, 2), (6, 0)])
def test_training_data_resume_at_the_saved_position(root: Path, done: int, num_workers: int) -> None:
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


def test_saved_position_resumes_with_another_batch_size(root: Path) -> None:
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


def test_restored_position_can_be_saved_before_training_resumes(root: Path) -> None:
    place = {"train": {"epoch": 2, "consumed": 4}}
    restored = image_data(root)
    restored.load_state_dict(place)
    assert restored.state_dict() == place
    restored.train_dataloader()
    assert restored.state_dict() == place


def test_validation_does_not_move_the_position(root: Path) -> None:
    data = image_data(root)
    batches = iter(data.train_dataloader())
    next(batches)
    place = data.state_dict()
    assert keys(data.val_dataloader()) == ["val/0", "val/1"]
    assert data.state_dict() == place == {"train": {"epoch": 0, "consumed": 2}}


def trainer_of(epoch: int = 0, world_size: int = 1, rank: int = 0) -> Any:
    progress = SimpleNamespace(is_last_batch=False)
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress))
    return SimpleNamespace(global_rank=rank, world_size=world_size, current_epoch=epoch, fit_loop=loop)


def test_reloaded_loader_continues_with_the_next_epoch(root: Path) -> None:
    data = image_data(root)
    data.trainer = trainer_of()
    first = keys(data.train_dataloader())
    data.trainer = trainer_of(epoch=1)
    loader = data.train_dataloader()
    second = keys(loader)
    assert loader.state_dict()["epoch"] == 1
    assert sorted(second) == sorted(first)
    assert second != first


def test_position_loaded_after_the_loader_was_built_resumes_too(root: Path) -> None:
    # With sharded parameters and a cosine schedule, Lightning builds the loader before it loads the checkpoint.
    whole = image_data(root)
    expected = keys(whole.train_dataloader())[2:]
    late = image_data(root)
    late.trainer = trainer_of()
    late.trainer.train_dataloader = loader = late.train_dataloader()
    late.load_state_dict({"train": {"epoch": 0, "consumed": 2}})
    assert keys(loader) == expected
    assert late.state_dict() == whole.state_dict()


def test_epoch_that_ends_early_is_saved_as_finished(root: Path) -> None:
    data = image_data(root)
    data.trainer = trainer_of()
    next(iter(data.train_dataloader()))
    assert data.state_dict() == {"train": {"epoch": 0, "consumed": 2}}
    data.trainer.fit_loop.epoch_loop.batch_progress.is_last_batch = True
    assert data.state_dict() == {"train": {"epoch": 0, "consumed": 11}}


def test_fewer_validation_examples_than_ranks_are_refused(root: Path) -> None:
    data = image_data(root)
    data.trainer = trainer_of(world_size=3)
    with pytest.raises(ValueError, match="2 validation examples cannot be distributed over 3 ranks"):
        data.val_dataloader()


def on_ranks(root: Path, world_size: int, place: dict[str, Any] | None, done: int | None, **options: Any) -> list[Any]:
    """For each rank, the keys of its next ``done`` batches or of the rest of an epoch, and its state afterwards."""
    found = []
    for rank in range(world_size):
        data = image_data(root, **options)
        data.trainer = trainer_of(world_size=world_size, rank=rank)
        if place is not None:
            data.load_state_dict(place)
        batches = keys(islice(data.train_dataloader(), done))
        found.append((batches, saved_and_loaded(data.state_dict())))
    return found


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 3), (3, 2), (1, 5)])
def test_epoch_resumes_on_another_number_of_ranks_without_loss(root: Path, before: int, after: int) -> None:
    started = on_ranks(root, before, None, 1)
    places = [place for _, place in started]
    assert places == [{"train": {"epoch": 0, "consumed": 2 * before}}] * before
    finished = on_ranks(root, after, places[0], None)
    seen = [key for batches, _ in [*started, *finished] for key in batches]
    assert sorted(seen) == sorted(f"train/{number}" for number in range(11))
    assert [place for _, place in finished] == [{"train": {"epoch": 0, "consumed": 11}}] * after


def test_resampled_epoch_resumes_at_the_saved_position(root: Path) -> None:
    loader = image_data(root, resampled_epoch=20).train_dataloader()
    expected = [keys(loader) for _ in range(2)]
    assert [len(epoch) for epoch in expected] == [20, 20]
    assert expected[0] != expected[1]
    stopped = image_data(root, resampled_epoch=20)
    before = keys(islice(stopped.train_dataloader(), 3))
    resumed = image_data(root, resampled_epoch=20)
    resumed.load_state_dict(saved_and_loaded(stopped.state_dict()))
    loader = resumed.train_dataloader()
    assert before + keys(loader) == expected[0]
    assert keys(loader) == expected[1]


@pytest.mark.parametrize(
    ("consumed", "batch_size", "expected"), [(0, 2, (0, 6)), (4, 2, (2, 6)), (4, 5, (1, 3)), (11, 2, (6, 6))]
)
def test_saved_position_is_converted_to_batches_of_this_run(
    root: Path, consumed: int, batch_size: int, expected: tuple[int, int]
) -> None:
    data = image_data(root, batch_size=batch_size)
    assert data.batches_done({"train": {"epoch": 3, "consumed": consumed}}) == expected
    assert data.batches_done({}) is None


@pytest.mark.parametrize(("remainder", "batches"), [("keep", 6), ("drop", 5), ("repeat", 6)])
def test_remainder_is_kept_dropped_or_filled_up(root: Path, remainder: str, batches: int) -> None:
    loader = image_data(root, remainder=remainder).train_dataloader()
    found = [keys([batch]) for batch in loader]
    assert len(found) == len(loader) == batches
    first = keys(image_data(root).train_dataloader())
    wanted = {"keep": first, "drop": first[:10], "repeat": [*first, first[0]]}[remainder]
    assert [key for batch in found for key in batch] == wanted
