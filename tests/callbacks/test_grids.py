"""Grids of pictures."""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from callbacks import ReconstructionGrid, SampleGrid
from callbacks.pictures import publish
from llamagen.grids import grid_image


def trainer_at(batches: int, folder: Path, **options: Any) -> Any:
    """What a callback asks of a trainer after so many batches."""
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(total_batch_idx=batches - 1))
    settings = {"loggers": [], "sanity_checking": False, "is_global_zero": True, **options}
    precision = SimpleNamespace(forward_context=nullcontext)
    return SimpleNamespace(default_root_dir=str(folder), fit_loop=loop, precision_plugin=precision, **settings)


def test_a_grid_places_each_picture_in_its_cell() -> None:
    pictures = [np.full((4, 6, 3), value, dtype=np.uint8) for value in (10, 20, 30)]
    grid = np.array(grid_image([pictures[:2], pictures[2:]]))
    assert grid.shape == (2 * 6 + 2, 2 * 8 + 2, 3)
    assert (grid[2:6, 2:8] == 10).all()
    assert (grid[2:6, 10:16] == 20).all()
    assert (grid[8:12, 2:8] == 30).all()
    assert (grid[8:12, 10:16] == 128).all()


def test_a_grid_goes_to_the_folder_and_to_loggers_that_take_images(tmp_path: Path) -> None:
    calls: list[Any] = []
    wandb = SimpleNamespace(log_image=lambda **arguments: calls.append(arguments))
    board = SimpleNamespace(experiment=SimpleNamespace(add_image=lambda *a, **k: calls.append((a, k))))
    csv = SimpleNamespace(experiment=SimpleNamespace())
    trainer = trainer_at(7, tmp_path, loggers=[wandb, board, csv])
    publish(trainer, grid_image([[np.zeros((4, 4, 3), dtype=np.uint8)]]), "samples")
    assert [path.name for path in (tmp_path / "samples").iterdir()] == ["step_0000007.png"]
    assert (calls[0]["key"], calls[0]["step"]) == ("samples", 7)
    (name, pixels, step), options = calls[1]
    assert (name, pixels.shape, step, options) == ("samples", (8, 8, 3), 7, {"dataformats": "HWC"})


@pytest.mark.parametrize(
    "make",
    [
        lambda: ReconstructionGrid(count=0),
        lambda: SampleGrid(classes=0),
        lambda: SampleGrid(classes=[]),
        lambda: SampleGrid(per_class=0),
        lambda: SampleGrid(every_n_validations=0),
    ],
)
def test_an_empty_grid_is_refused(make: Any) -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        make()


def test_samples_are_drawn_at_every_nth_validation(tmp_path: Path) -> None:
    import torch

    class Module(torch.nn.Module):
        device = torch.device("cpu")

        def check_sampling(self, classes: list[int]) -> None:
            assert classes == [3, 1]

        def sample(self, condition: Any, indices: Any, seed: int) -> Any:
            return torch.zeros(len(condition), 4, 4, 3, dtype=torch.uint8), None

    callback = SampleGrid(classes=[3, 1], per_class=2, every_n_validations=3)
    module: Any = Module()
    for step in range(1, 8):
        trainer = trainer_at(step, tmp_path)
        if step == 5:
            restored = SampleGrid(classes=[3, 1], per_class=2, every_n_validations=3)
            restored.load_state_dict(callback.state_dict())
            callback = restored
        callback.on_validation_epoch_end(trainer, module)
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == ["step_0000003.png", "step_0000006.png"]
