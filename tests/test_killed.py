"""A run that is killed and resumed with the same command ends like an uninterrupted one."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import main
from lightning_modules.base import GenerativeModule
from tests.pipeline import Pipeline

STEPS = 15
# Float16 with a GradScaler, as on a GPU. Its scale starts too high and grows again, so some steps are skipped.
SCALER = "{device: cpu, init_scale: 1.0e+10, backoff_factor: 1.0e-3, growth_factor: 1.0e+3, growth_interval: 4}"
SCALED = [
    "--trainer.precision=null",
    "--trainer.plugins+={class_path: MixedPrecision, init_args: {precision: 16-mixed, device: cpu, scaler: "
    f"{{class_path: torch.amp.GradScaler, init_args: {SCALER}}}}}}}",
]
# Within the first epoch of 8 batches, at its end, within the second one, before and after a checkpoint. Each killed run
# is resumed and killed again.
KILLS = [1, 4, 7, 8, 13]


def arguments(pipeline: Pipeline, folder: Path) -> list[str]:
    """A training that saves a checkpoint every third step, and resumes from the last one if it exists."""
    kept = [item for item in pipeline.argen_arguments(folder) if not item.startswith(("--trainer.max_steps",))]
    checkpoints = f"{{dirpath: {folder}/checkpoints, save_last: true, every_n_train_steps: 3}}"
    ema, saving = "{class_path: EMA, init_args: {decay: 0.9}}", "{class_path: ModelCheckpoint, init_args: "
    callbacks = f"--trainer.callbacks=[{ema}, {{class_path: LearningCurves}}, {saving}{checkpoints}}}]"
    return [
        *("fit", *kept, callbacks, f"--data.init_args.root={pipeline.codes}", "--data.init_args.batch_size=200"),
        *(f"--trainer.max_steps={STEPS}", "--trainer.accumulate_grad_batches=1", "--ckpt_path=last"),
    ]


def state(folder: Path) -> dict[str, Any]:
    checkpoint: dict[str, Any] = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)
    return checkpoint


def run_until_killed(command: list[str], step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the command in a new process, which is killed after a batch of the given step."""

    def die(self: GenerativeModule, *_: Any) -> None:
        if self.global_step == step:
            os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr(GenerativeModule, "on_train_batch_end", die)
        pid = os.fork()
        if pid == 0:
            try:
                main.main(command)
            finally:
                os._exit(1)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL


@pytest.mark.parametrize(
    ("kills", "more"),
    [pytest.param(KILLS, [], id="float32"), pytest.param([8], SCALED, id="float16", marks=pytest.mark.slow)],
)
def test_a_killed_run_ends_with_the_weights_of_an_uninterrupted_one(
    pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kills: list[int], more: list[str]
) -> None:
    main.main([*arguments(pipeline, tmp_path / "uninterrupted"), *more])
    uninterrupted = state(tmp_path / "uninterrupted")
    # In float16 the scaler has skipped some steps, which the killed run has to repeat.
    steps_taken = int(uninterrupted["optimizer_states"][0]["state"][0]["step"])
    assert STEPS // 2 < steps_taken < STEPS if more else steps_taken == STEPS
    command = [*arguments(pipeline, tmp_path / "killed"), *more]
    for step in kills:
        run_until_killed(command, step, monkeypatch)
        if step >= 3:
            assert state(tmp_path / "killed")["global_step"] == step // 3 * 3
    main.main(command)
    ended = state(tmp_path / "killed")
    assert ended["global_step"] == uninterrupted["global_step"] == STEPS
    assert ended["CodeDataModule"] == uninterrupted["CodeDataModule"]
    assert ended.get("MixedPrecision") == uninterrupted.get("MixedPrecision")
    assert ("MixedPrecision" in ended) is bool(more)
    for name, value in uninterrupted["state_dict"].items():
        assert torch.equal(ended["state_dict"][name], value), name
    moments = ended["optimizer_states"][0]["state"]
    assert len(moments) > 10
    for index, entries in uninterrupted["optimizer_states"][0]["state"].items():
        assert "ema" in entries
        for name, value in entries.items():
            assert torch.equal(moments[index][name], value), (index, name)
