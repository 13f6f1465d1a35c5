"""A stopped and resumed run ends in the same state as an uninterrupted one."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_modules import AdamWConfig, ARGenModule, GenerationOrder
from lightning_modules.base import GenerativeModule
from tests.lightning_modules.runs import argen_module, state_of, train, vqgan_module
from tests.pipeline import Pipeline

STEPS = 11  # an epoch has 8

Make = Callable[..., GenerativeModule]


def vqgan_with_everything(seed: int = 0) -> GenerativeModule:
    """A tokenizer with everything that has state or uses random numbers."""
    options = {
        "revive_codes_every": 3,
        "augmentation": ("color", "translation", "cutout"),
    }
    return vqgan_module(seed, options, lecam_weight=0.1, adaptive_weight=True, adversarial="non_saturating")


def vqgan_with_ema_codebook(seed: int = 0) -> GenerativeModule:
    """A tokenizer whose codebook is an average of latents."""
    arguments = {"codebook_size": 32, "codebook_dim": 4}
    quantizer = {"class_path": "llamagen.models.quantizers.EMAVectorQuantizer", "init_args": arguments}
    net = replace(vqgan_module().vqgan.config, quantizer=quantizer)
    return vqgan_module(seed, {"net": net, "revive_codes_every": 3})


def argen_with_everything(seed: int = 0) -> GenerativeModule:
    """A GPT with everything that uses random numbers or adds parameters, in orders annealed from step 2 to step 9."""
    plain = argen_module(seed, qk_norm=True, adaptive_norm=True, attn_dropout=0.1, code_factors=(4, 8))
    return ARGenModule(plain.gpt.config, AdamWConfig(lr=1e-3), order=GenerationOrder(2, 9))


@pytest.fixture(scope="module")
def uninterrupted(
    pipeline: Pipeline, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Make], dict[str, torch.Tensor]]:
    """The final state of a module's uninterrupted run; each is trained once."""

    @cache
    def state(make: Make) -> dict[str, torch.Tensor]:
        module = make()
        trainer = train(module, pipeline, tmp_path_factory.mktemp("whole"), max_steps=STEPS)
        return state_of(module, trainer)

    return state


class UsesGlobalGenerator(pl.Callback):
    """Uses global random numbers between steps, as sample grids or foreign metrics may do."""

    def on_train_batch_end(self, *_: Any) -> None:
        torch.randn(7)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(vqgan_module, marks=pytest.mark.slow),
        vqgan_with_everything,
        pytest.param(vqgan_with_ema_codebook, marks=pytest.mark.slow),
        argen_with_everything,
    ],
)
@pytest.mark.parametrize(
    ("stop", "every", "resume_from"),
    [
        ({"max_epochs": 1}, None, "last.ckpt"),
        ({"max_steps": 5}, None, "last.ckpt"),
        ({"max_steps": 9}, None, "last.ckpt"),
        # The first run continues past the checkpoint, like one that is killed.
        ({"max_steps": 7}, 5, "last.ckpt"),
    ],
    ids=["at the end of an epoch", "in the first epoch", "in the second epoch", "killed after a checkpoint"],
)
def test_a_resumed_run_ends_in_the_same_weights(
    make: Make,
    stop: dict[str, int],
    every: int | None,
    resume_from: str,
    uninterrupted: Callable[[Make], dict[str, torch.Tensor]],
    pipeline: Pipeline,
    tmp_path: Path,
) -> None:
    expected = uninterrupted(make)
    train(make(), pipeline, tmp_path / "first", every=every, **stop)
    # Another seed: everything must come from the checkpoint.
    resumed = make(seed=99)
    trainer = train(
        resumed,
        pipeline,
        tmp_path / "second",
        UsesGlobalGenerator(),
        ckpt_path=tmp_path / "first/checkpoints" / resume_from,
        max_steps=STEPS,
    )
    assert trainer.global_step == STEPS
    state = state_of(resumed, trainer)
    assert state.keys() == expected.keys()
    assert any(name.endswith("/ema") for name in state)
    different = [name for name in expected if not torch.equal(state[name], expected[name])]
    assert different == []


@pytest.mark.parametrize(
    ("make", "stop", "options"),
    [
        pytest.param(vqgan_module, {"max_steps": 11}, {}, marks=pytest.mark.slow),
        (argen_module, {"max_steps": 11}, {}),
        (argen_module, {"max_steps": 3}, {"accumulate_grad_batches": 2}),
        (argen_module, {"max_epochs": 1}, {"limit_train_batches": 5}),
    ],
    ids=["tokenizer", "argen", "accumulated", "limited"],
)
def test_a_stopped_run_resumes_to_the_end_of_its_last_epoch(
    make: Make, stop: dict[str, int], options: dict[str, int], pipeline: Pipeline, tmp_path: Path
) -> None:
    whole, resumed = make(), make()
    expected = train(whole, pipeline, tmp_path / "whole", max_epochs=2, **options)
    train(resumed, pipeline, tmp_path / "first", **stop, **options)
    last = tmp_path / "first/checkpoints/last.ckpt"
    resumed = make(seed=99)
    trainer = train(resumed, pipeline, tmp_path / "second", ckpt_path=last, max_epochs=2, **options)
    assert (trainer.global_step, trainer.current_epoch) == (expected.global_step, 2)
    state, whole_state = state_of(resumed, trainer), state_of(whole, expected)
    assert [name for name in whole_state if not torch.equal(state[name], whole_state[name])] == []


class Seen(pl.Callback):
    """Records epoch, index and first image of each training batch."""

    def __init__(self) -> None:
        self.batches: list[tuple[int, int, str]] = []

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.batches.append((trainer.current_epoch, batch_idx, batch["keys"][0]))


def test_a_run_saved_at_the_end_of_an_epoch_without_validation_resumes_with_the_next_epoch(
    pipeline: Pipeline, tmp_path: Path
) -> None:
    # Lightning would train one batch of the next epoch, count it as part of the previous one, and skip the rest.
    whole, resumed, options = Seen(), Seen(), {"check_val_every_n_epoch": 3}
    train(argen_module(), pipeline, tmp_path / "whole", whole, max_epochs=2, **options)
    ends = ModelCheckpoint(tmp_path / "ends", monitor="step", mode="max", save_last=True, save_on_train_epoch_end=True)
    train(argen_module(), pipeline, tmp_path / "first", ends, max_epochs=1, **options)
    train(
        argen_module(), pipeline, tmp_path / "second", resumed, ckpt_path=tmp_path / "ends/last.ckpt", max_steps=16,
        **options,
    )  # fmt: skip
    assert resumed.batches == whole.batches[8:]
    more = Seen()  # max_steps below the steps of the checkpoint: nothing to do
    train(argen_module(), pipeline, tmp_path / "third", more, ckpt_path=tmp_path / "ends/last.ckpt", max_steps=4)
    assert more.batches == []


def test_runs_of_different_seeds_differ(pipeline: Pipeline, tmp_path: Path) -> None:
    first, second = argen_module(), argen_module()
    second.gpt.load_state_dict(first.gpt.state_dict())
    pl.seed_everything(0, verbose=False)
    train(first, pipeline, tmp_path / "a", max_steps=2)
    pl.seed_everything(1, verbose=False)
    train(second, pipeline, tmp_path / "b", max_steps=2)
    assert not torch.equal(first.gpt.tok_embeddings.weight, second.gpt.tok_embeddings.weight)
