"""Grids of images."""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from callbacks import ReconstructionGrid, SampleGrid
from callbacks.figures import publish
from llamagen.grids import GAP, captioned_grid, grid_image, save_png


def trainer_at(batches: int, folder: Path, **options: Any) -> Any:
    """The part of a trainer that callbacks use, after a number of batches."""
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(total_batch_idx=batches - 1))
    settings = {"loggers": [], "sanity_checking": False, "is_global_zero": True, **options}
    precision = SimpleNamespace(forward_context=nullcontext)
    return SimpleNamespace(default_root_dir=str(folder), fit_loop=loop, precision_plugin=precision, **settings)


def test_a_grid_places_each_image_in_its_cell() -> None:
    images = [np.full((4, 6, 3), value, dtype=np.uint8) for value in (10, 20, 30)]
    grid = np.array(grid_image([images[:2], images[2:]]))
    assert grid.shape == (2 * 6 + 2, 2 * 8 + 2, 3)
    assert (grid[2:6, 2:8] == 10).all()
    assert (grid[2:6, 10:16] == 20).all()
    assert (grid[8:12, 2:8] == 30).all()
    assert (grid[8:12, 10:16] == 128).all()


def test_a_grid_is_saved_and_passed_to_loggers_that_accept_images(tmp_path: Path) -> None:
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
def test_rejects_an_empty_grid(make: Any) -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        make()


def test_samples_are_saved_at_every_nth_validation(tmp_path: Path) -> None:
    import torch

    class Module(torch.nn.Module):
        device = torch.device("cpu")
        check_requests = None

        def batch_condition(self, batch: dict[str, Any]) -> Any:
            return batch["condition"], None, None

        def sample(self, condition: Any, indices: Any, seed: int, lengths: Any) -> Any:
            assert condition.tolist() == [3, 3, 1, 1]
            assert lengths is None
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


@pytest.mark.parametrize("training", [True, False])
def test_images_are_reconstructed_in_evaluation_mode_without_changing_the_mode(training: bool, tmp_path: Path) -> None:
    import torch

    modes: list[bool] = []

    class Module(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dropout = torch.nn.Dropout()

        def reconstruct(self, images: torch.Tensor) -> torch.Tensor:
            modes.extend([self.training, self.dropout.training, torch.is_grad_enabled()])
            return images

    module: Any = Module().train(training)
    grid = ReconstructionGrid(count=2, every_n_batches=3)
    grid.on_train_batch_end(trainer_at(3, tmp_path), module, None, {"images": torch.zeros(4, 3, 4, 4)}, 2)
    assert modes == [False, False, False]
    assert module.training == module.dropout.training == training
    assert [path.name for path in (tmp_path / "reconstructions").iterdir()] == ["step_0000003.png"]


@pytest.mark.parametrize("clean", [False, True])
def test_prompts_are_cleaned_if_the_data_cleans_its_captions(clean: bool, tmp_path: Path) -> None:
    import torch

    read: list[list[str]] = []

    class Module(torch.nn.Module):
        device = torch.device("cpu")
        check_requests = None

        def batch_condition(self, batch: dict[str, Any]) -> Any:
            read.append(batch["captions"])
            return torch.zeros(2, 3, 4), torch.tensor([3, 2]), None

        def sample(self, condition: Any, indices: Any, seed: int, lengths: Any) -> Any:
            assert condition.shape == (4, 3, 4)
            assert lengths.tolist() == [3, 3, 2, 2]
            return torch.zeros(len(condition), 4, 4, 3, dtype=torch.uint8), None

    module: Any = Module()
    trainer = trainer_at(1, tmp_path, datamodule=SimpleNamespace(cleaning="web" if clean else None))
    SampleGrid(prompts=["A Cat", "two"], per_class=2).on_validation_epoch_end(trainer, module)
    assert read == [["a cat", "two"] if clean else ["A Cat", "two"]]
    assert [path.name for path in (tmp_path / "samples").iterdir()] == ["step_0000001.png"]


def flat_image(width: int) -> np.ndarray:
    return np.full((width // 2, width, 3), 200, dtype=np.uint8)


@pytest.mark.parametrize(("width", "shown"), [(8, 192), (100, 200), (192, 192), (256, 256)])
def test_captioned_images_have_a_minimum_width(width: int, shown: int) -> None:
    grid = captioned_grid([[flat_image(width)] * 3, [flat_image(width)]], [["a", "b", "c"], ["d"]])
    assert grid.width == 3 * (shown + GAP) + GAP
    pixels = np.array(grid)
    assert (pixels[GAP : GAP + shown // 2, GAP : GAP + shown] == 200).all()
    assert pixels[GAP + shown // 2 :, : GAP + shown].min() < 50


def test_captions_fit_below_their_images_on_as_many_lines_as_they_need() -> None:
    rows = [[flat_image(256)] * 2]
    heights = []
    for caption in ("a", "word " * 12, "word " * 1000, "x" * 10**6, "\u0301" * 10**4):
        grid = captioned_grid(rows, [[caption, ""]])
        heights.append(grid.height)
        assert (np.array(grid)[GAP + 128 :, GAP + 258 :] == 255).all(), caption[:10]
    line = heights[1] - heights[0]
    assert line > 10
    assert heights[2] == heights[3] == heights[0] + 2 * line


def test_long_captions_end_in_an_ellipsis() -> None:
    from llamagen.grids import _font, _wrapped

    font = _font(12)
    lines = _wrapped("a photo of an athlete cat " * 10, 200, font)
    assert len(lines) == 3
    assert all(font.getlength(line) <= 200 for line in lines)
    assert lines[2].endswith("…")
    assert _wrapped("a photo of\n\n an athlete  cat", 1000, font) == ["a photo of an athlete cat"]
    assert "".join(_wrapped("柴犬" * 20, 200, font)) == "柴犬" * 20
    assert _wrapped(" \n", 200, font) == []


ODD = ["日本語", "مرحبا", "हिन्दी", "👩‍👩‍👧🐕‍🦺", "a\0b\x07\ud800\u202e", "", "\u2028", "e\u0301" * 50]


def test_captions_may_be_in_any_script(tmp_path: Path) -> None:
    grid = captioned_grid([[flat_image(64)] * len(ODD)], [ODD])
    save_png(grid, tmp_path / "grid.png")
    assert Image.open(tmp_path / "grid.png").size == grid.size


def test_the_font_has_letters_of_other_european_languages() -> None:
    from llamagen.grids import _font

    font = _font(12)
    lacking = bytes(font.getmask("\U0010ffff"))
    assert all(bytes(font.getmask(letter)) != lacking for letter in "éñßřпΕم…—")


def test_text_is_stored_in_a_png(tmp_path: Path) -> None:
    save_png(Image.fromarray(flat_image(4)), tmp_path / "a.png", {"prompt": "柴犬"})
    with Image.open(tmp_path / "a.png") as image:
        assert image.info["prompt"] == "柴犬"
