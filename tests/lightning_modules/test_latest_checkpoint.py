"""``--ckpt_path last`` takes the newest complete checkpoint, and damaged ones are skipped."""

import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint

from lightning_modules import CheckpointFiles, ShardedStrategy, resolve_checkpoint
from lightning_modules.latest_checkpoint import checkpoint_folders
from llamagen.checkpoints.contents import read_checkpoint
from llamagen.checkpoints.integrity import check_integrity
from llamagen.files import replaced_name


def checkpoint(step: int, batches: int | None = None, epochs: int = 0, **more: Any) -> dict[str, Any]:
    """A checkpoint with training progress and a few weights."""
    loop = {
        "epoch_loop.batch_progress": {"total": {"processed": step if batches is None else batches}},
        "epoch_progress": {"current": {"processed": epochs}},
    }
    entry = {"architecture": "GPT", "config": {}, "prefix": "gpt."}
    moments = {"state": {"gpt.weight": {"exp_avg": torch.zeros(9)}}, "param_groups": [{"params": ["gpt.weight"]}]}
    content = {"llamagen": entry, "global_step": step, "loops": {"fit_loop": loop}, **more}
    return {"optimizer_states": [moments], **content, "state_dict": {"gpt.weight": torch.arange(5000.0) + step}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints"


@pytest.fixture
def save(folder: Path) -> Callable[..., Path]:
    """Writes a checkpoint as one file."""

    def write(name: str, step: int, **more: Any) -> Path:
        path = folder / name
        CheckpointFiles().save_checkpoint(checkpoint(step, **more), path)
        return path

    return write


def truncate(path: Path, share: float = 0.5) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def change_a_byte(path: Path) -> None:
    """Change a byte in the middle of a file, among the weights; in meta.pt, which has no weights, in a key."""
    content = bytearray(path.read_bytes())
    content[content.index(b"global_step") if path.name == "meta.pt" else len(content) // 2] ^= 1
    path.write_bytes(content)


def trainer_for(folder: Path, *callbacks: pl.Callback) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        default_root_dir=folder.parent,
        logger=False,
        callbacks=[ModelCheckpoint(folder, save_last=True), *callbacks],
    )


def last(folder: Path, stage: str = "fit", *callbacks: pl.Callback) -> Any:
    return resolve_checkpoint("last", trainer_for(folder, *callbacks), stage)


def test_last_is_chosen_by_progress_not_by_name_or_time(save: Callable[..., Path], folder: Path) -> None:
    save("step_0000020.ckpt", 20)
    older, newest = save("last.ckpt", 20), save("last-v1.ckpt", 30)
    os.utime(newest, (1, 1))
    assert last(folder) == str(newest)
    newest.unlink()
    assert last(folder) == str(older)  # of equal progress: last.ckpt
    newer = save("epoch=3.ckpt", 20, epochs=1)
    assert last(folder) == str(newer)
    newer = save("batch.ckpt", 20, batches=41)  # within an accumulated step
    assert last(folder) == str(newer)


@pytest.mark.parametrize(
    "damage", [truncate, lambda path: truncate(path, 0), change_a_byte, lambda path: path.write_text("x")]
)
def test_unreadable_checkpoints_are_skipped_with_a_warning(
    damage: Callable[[Path], None], save: Callable[..., Path], folder: Path
) -> None:
    whole, damaged = save("step_0000020.ckpt", 20), save("last.ckpt", 30)
    damage(damaged)
    with pytest.warns(UserWarning, match="skipped a checkpoint") as said:
        assert last(folder) == str(whole)
    (line,) = [str(each.message) for each in said if "skipped" in str(each.message)]
    assert str(damaged) in line
    assert f"takes {whole}" in line
    assert "\n" not in line


def test_links_count_as_their_target_and_dangling_links_are_ignored(save: Callable[..., Path], folder: Path) -> None:
    target = save("step_0000020.ckpt", 20)
    (folder / "last.ckpt").symlink_to(target.name)
    assert last(folder) == str(folder / "last.ckpt")
    target.unlink()
    target = save("step_0000030.ckpt", 30)
    assert last(folder) == str(target)


def test_temporary_and_other_files_are_ignored(save: Callable[..., Path], folder: Path) -> None:
    whole = save("step_0000020.ckpt", 20)
    for name in (".last.ckpt.0000-1-2.tmp", ".hidden.ckpt", "notes.txt"):
        shutil.copy(whole, folder / name)
    shutil.copy(whole, folder.parent / "exported.ckpt")  # in the run's own folder only SLURM's are candidates
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "skipped a checkpoint")
        assert last(folder) == str(whole)


def test_no_stage_starts_from_scratch_if_no_checkpoint_is_readable(save: Callable[..., Path], folder: Path) -> None:
    for name in ("step_0000020.ckpt", "last.ckpt"):
        truncate(save(name, 20))
    for stage in ("fit", "validate", "predict"):
        with pytest.raises(ValueError, match=r"--ckpt_path last: no checkpoint .* can be read") as error:
            last(folder, stage)
        assert "\n" not in str(error.value)
        assert str(folder / "last.ckpt") in str(error.value)


def test_without_checkpoints_fit_starts_and_other_stages_fail(folder: Path) -> None:
    with pytest.warns(UserWarning, match="starting from the beginning"):
        assert last(folder) is None
    for stage in ("validate", "test", "predict"):
        with pytest.raises(ValueError, match=r"there is no checkpoint in .*; give --ckpt_path"):
            last(folder, stage)


def test_files_with_only_weights_are_validated_but_not_resumed(save: Callable[..., Path], folder: Path) -> None:
    whole, newer = save("step_0000020.ckpt", 20), save("weights.ckpt", 30)
    content = torch.load(newer, weights_only=True)
    del content["optimizer_states"], content["loops"]
    torch.save(content, newer)
    assert last(folder, "validate") == str(newer)
    with pytest.warns(UserWarning, match="holds only weights"):
        assert last(folder) == str(whole)


def test_all_checkpoint_folders_of_the_run_are_searched(save: Callable[..., Path], folder: Path) -> None:
    save("last.ckpt", 20)
    steps = save("steps/step_0000030.ckpt", 30)
    exception = save("../stopped/on_exception.ckpt", 40)
    slurm = save("../hpc_ckpt_1.ckpt", 50)
    more = [ModelCheckpoint(folder / "steps", monitor="step"), OnExceptionCheckpoint(folder.parent / "stopped")]
    for newest in (slurm, exception, steps):
        assert Path(last(folder, "fit", *more)).resolve() == newest.resolve()
        newest.unlink()
    assert last(folder, "fit", *more) == str(folder / "last.ckpt")


def test_remote_folders_are_left_to_lightning(folder: Path) -> None:
    trainer = trainer_for(folder)
    trainer.callbacks[-1].dirpath = "s3://bucket/run"  # type: ignore[attr-defined]
    assert checkpoint_folders(trainer) is None
    assert resolve_checkpoint("last", trainer, "fit") == "last"
    for given in (None, "best", "hpc", "https://server/model.ckpt"):
        assert resolve_checkpoint(given, trainer, "fit") == given


def test_a_damaged_file_given_as_ckpt_path_is_a_one_line_error(save: Callable[..., Path], folder: Path) -> None:
    path = save("last.ckpt", 20)
    assert resolve_checkpoint(str(path), trainer_for(folder), "fit") == str(path)
    change_a_byte(path)
    with pytest.raises(ValueError, match="is damaged") as error:
        resolve_checkpoint(str(path), trainer_for(folder), "fit")
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with sharded checkpoints: step.ckpt of step 20, last.ckpt of step 30."""
    folder = tmp_path_factory.mktemp("sharded")
    for step, name in ((20, "step.ckpt"), (10, "last.ckpt"), (30, "last.ckpt")):
        ShardedStrategy().save_checkpoint(checkpoint(step), folder / name)
    return folder


def test_a_sharded_checkpoint_replaces_the_previous_one(sharded: Path) -> None:
    read = read_checkpoint(sharded / "last.ckpt")
    assert read["global_step"] == 30
    assert torch.equal(read["state_dict"]["gpt.weight"], torch.arange(5000.0) + 30)
    assert sorted(path.name for path in sharded.iterdir()) == ["last.ckpt", "step.ckpt"]


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        *((file, damage) for file in ("__0_0.distcp", ".metadata", "meta.pt") for damage in (truncate, Path.unlink)),
        *((file, change_a_byte) for file in ("__0_0.distcp", "meta.pt")),  # the index has no checksum
    ],
)
def test_a_damaged_sharded_checkpoint_is_skipped(
    file: str, damage: Callable[[Path], None], sharded: Path, folder: Path
) -> None:
    shutil.copytree(sharded, folder)
    damage(folder / "last.ckpt" / file)
    with pytest.warns(UserWarning, match=r"skipped a checkpoint.*last\.ckpt"):
        assert last(folder) == str(folder / "step.ckpt")


def test_a_kill_while_a_folder_is_replaced_loses_nothing(sharded: Path, folder: Path) -> None:
    shutil.copytree(sharded, folder)
    path = folder / "last.ckpt"
    for old in (replaced_name(path), folder / ".last.ckpt.old"):  # the latter from older versions
        path.rename(old)
        assert last(folder) == str(old)
        check_integrity(old)
        old.rename(path)
    shutil.copytree(folder / "step.ckpt", replaced_name(path))  # killed after both renames
    assert last(folder) == str(path)
