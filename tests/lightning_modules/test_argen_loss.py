"""The loss of the autoregressive model: values, memory, and stops for values that are not finite."""

import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.nn import functional as F

from lightning_modules import ARGenLossConfig, ARGenModule
from tests.lightning_modules.runs import argen_module, assert_moved_alike, datamodule_for, evaluator, state_of, train
from tests.pipeline import Pipeline

NO_DROPOUT = dict.fromkeys(("token_dropout", "resid_dropout", "ffn_dropout", "drop_path", "condition_dropout"), 0.0)


class PlainModule(ARGenModule):
    """Computes all logits at once."""

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        logits = self(batch["codes"], batch["condition"]).flatten(0, 1)
        loss = F.cross_entropy(logits, batch["codes"].flatten(), label_smoothing=self.loss_config.label_smoothing)
        return loss + self.loss_config.z_loss * logits.logsumexp(-1).square().mean()


@pytest.mark.parametrize("loss", [{}, {"label_smoothing": 0.1}, {"z_loss": 0.01}], ids=str)
def test_training_equals_training_with_all_logits_at_once(
    pipeline: Pipeline, tmp_path: Path, loss: dict[str, float]
) -> None:
    states = []
    for kind in (ARGenModule, PlainModule):
        module = argen_module(**NO_DROPOUT)
        module.__class__ = kind
        module.loss_config = ARGenLossConfig(**loss)
        start = {name: value.clone() for name, value in module.state_dict().items()}
        train(module, pipeline, tmp_path / kind.__name__, max_steps=4)
        states.append({name: value.clone() for name, value in module.state_dict().items()})
    assert_moved_alike(start, *states)


def test_training_and_validation_never_compute_all_logits(
    pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = argen_module()
    monkeypatch.setattr(module.gpt.output, "forward", None)
    train(module, pipeline, tmp_path, max_steps=2)
    assert module.trainer.global_step == 2


def test_the_logged_loss_excludes_smoothing_and_z_loss(pipeline: Pipeline, tmp_path: Path) -> None:
    module = argen_module(**NO_DROPOUT)
    module.loss_config = ARGenLossConfig(label_smoothing=0.5, z_loss=1.0)
    seen: list[torch.Tensor] = []

    class Recorder(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, *_: Any) -> None:
            seen.extend([trainer.callback_metrics["train/loss"], outputs["loss"]])

    train(module, pipeline, tmp_path, Recorder(), max_steps=1)
    assert seen[0].item() == pytest.approx(math.log(32), abs=1e-5)
    assert seen[1].item() == pytest.approx(math.log(32) + math.log(32) ** 2, abs=1e-4)


def test_validation_logs_top1_top5_and_perplexity(pipeline: Pipeline) -> None:
    module = argen_module()
    torch.nn.init.normal_(module.gpt.output.weight)
    data = datamodule_for(module, pipeline, batch_size=70)
    (found,) = evaluator().validate(module, data, verbose=False)
    samples = [data.datasets["val"][number, 0] for number in range(300)]
    codes = torch.stack([sample["codes"] for sample in samples])
    with torch.no_grad():
        logits = module.gpt.eval()(codes[:, :-1], torch.tensor([sample["condition"] for sample in samples]))
    guesses = logits.topk(5).indices == codes[..., None]
    assert found["val/top1"] == pytest.approx(guesses[..., 0].float().mean().item(), abs=1e-6)
    assert found["val/top5"] == pytest.approx(guesses.any(-1).float().mean().item(), abs=1e-6)
    assert found["val/perplexity"] == pytest.approx(math.exp(found["val/loss"]), rel=1e-5)


class Poison(pl.Callback):
    """Puts a NaN into the first weight before a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            next(pl_module.gpt.parameters()).data.view(-1)[:] = float("nan")


def test_a_nan_loss_stops_the_run_names_the_step_and_keeps_the_last_checkpoint(
    pipeline: Pipeline, tmp_path: Path
) -> None:
    with pytest.raises(FloatingPointError, match=r"^loss not finite at step 5; resume from the last checkpoint"):
        train(argen_module(), pipeline, tmp_path, Poison(5), every=2, max_steps=8)
    checkpoint = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 4
    assert all(value.isfinite().all() for value in checkpoint["state_dict"].values())


def test_a_gradient_that_is_not_finite_stops_the_run_before_the_step(pipeline: Pipeline, tmp_path: Path) -> None:
    module = argen_module()
    module.gpt.norm.weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(FloatingPointError, match=r"^the gradient of the gpt is not finite at step 0"):
        train(module, pipeline, tmp_path, max_steps=2)
    assert all(weight.isfinite().all() for weight in module.parameters())


class Explode(pl.Callback):
    """Multiplies the gradient of one step."""

    def __init__(self, step: int, factor: float) -> None:
        self.step, self.factor = step, factor

    def on_after_backward(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.global_step == self.step:
            for parameter in pl_module.gpt.parameters():
                parameter.grad *= self.factor


def test_an_exploding_gradient_stops_the_run_and_names_step_and_norm(pipeline: Pipeline, tmp_path: Path) -> None:
    module = argen_module()
    module.max_grad_norm = 100.0
    with pytest.raises(
        FloatingPointError, match=r"^the gradient of the gpt has a norm of .*, above max_grad_norm 100, at step 3"
    ):
        train(module, pipeline, tmp_path, Explode(3, 1e6), every=2, max_steps=6)
    assert torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 2


@pytest.mark.parametrize("factor", [1e6, float("nan"), float("inf")])
def test_a_skipped_step_changes_only_the_count(pipeline: Pipeline, tmp_path: Path, factor: float) -> None:
    module = argen_module()
    module.max_grad_norm, module.skip_bad_steps = 100.0, True
    states, skipped = [], []

    class Recorder(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
            states.append(state_of(pl_module, trainer))
            skipped.append(float(trainer.callback_metrics["train/skipped_steps"]))

    train(module, pipeline, tmp_path, Explode(2, factor), Recorder(), max_steps=4)
    assert skipped == [0.0, 0.0, 1.0, 0.0]
    assert any(name.endswith("/ema") for name in states[0])
    for name, value in states[1].items():  # weights, moments and averages
        assert torch.equal(value, states[2][name]), name
    assert not torch.equal(states[2]["gpt.output.weight"], states[3]["gpt.output.weight"])
    assert all(value.isfinite().all() for value in states[3].values())


def test_rejects_an_invalid_gradient_limit() -> None:
    with pytest.raises(ValueError, match=r"^max_grad_norm is 0.0; it must be positive"):
        ARGenModule(argen_module().gpt.config, max_grad_norm=0.0)


def test_the_gradient_norm_is_logged_and_clipped(pipeline: Pipeline, tmp_path: Path) -> None:
    module = argen_module()
    norms: list[float] = []

    class Recorder(pl.Callback):
        def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
            norms.append(torch.nn.utils.get_total_norm([p.grad for p in pl_module.gpt.parameters()]).item())

    train(module, pipeline, tmp_path, Recorder(), max_steps=1, gradient_clip_val=1e-3)
    assert module.trainer.callback_metrics["train/grad_norm_gpt"] > 0.01
    assert norms[0] > 0.01  # before clipping


def test_activation_checkpointing_trains_alike_and_saves_memory(pipeline: Pipeline, tmp_path: Path) -> None:
    states, kept = [], []
    for recompute in (False, True):
        module = argen_module(**{**NO_DROPOUT, "resid_dropout": 0.1})
        module.gpt.checkpoint_activations(recompute)
        start = {name: value.clone() for name, value in module.state_dict().items()}
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, s=sizes: (s.append(x.numel()), x)[1], lambda x: x):  # type: ignore[misc]
            trainer = train(module, pipeline, tmp_path / str(recompute), max_steps=2)
        kept.append(sum(sizes))
        states.append({name: state_of(module, trainer)[name] for name in start})
    assert_moved_alike(start, *states)
    assert kept[1] < 0.6 * kept[0]


@pytest.mark.parametrize("options", [{"label_smoothing": -0.1}, {"label_smoothing": 1.0}, {"z_loss": -1.0}], ids=str)
def test_rejects_invalid_loss_settings(options: dict[str, float]) -> None:
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=rf"^{name} is {value}; it must be"):
        ARGenLossConfig(**options)
