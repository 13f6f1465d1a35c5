"""Adapters train with each precision, with recomputed and compiled blocks, and in text models."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch._dynamo.utils import counters

from datamodules import CodeDataModule
from lightning_modules import AdamWConfig, ARGenModule
from llamagen.checkpoints.contents import build_model
from llamagen.checkpoints.weights import read_weights
from llamagen.models.gpt import GPTConfig
from llamagen.models.lora import LoRAConfig
from llamagen.text import TextEncoderConfig
from tests.lightning_modules.runs import state_of, train
from tests.pipeline import GPT_NET, Pipeline
from tests.text_pipeline import TextPipeline

pytestmark = pytest.mark.slow

NET = GPTConfig(**GPT_NET)
LORA = LoRAConfig(rank=4, alpha=8.0)


def tuned(pipeline: Pipeline, folder: Path, precision: str = "32-true", **options: Any) -> dict[str, torch.Tensor]:
    """Weights, moments and averages after three steps from the pipeline's model."""
    pl.seed_everything(0, verbose=False)
    module = ARGenModule(
        NET, AdamWConfig(lr=1e-2), init_from=pipeline.argen, init_adapt=["num_classes"], lora=LORA, **options
    )
    trainer = train(module, pipeline, folder, max_steps=3, precision=precision, limit_val_batches=0)
    return state_of(module, trainer)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "options"),
    [
        ("32-true", {"activation_checkpointing": True}),
        ("32-true", {"compile": True}),
        ("bf16-mixed", {}),
    ],
    ids=str,
)
def test_options_of_training_change_no_more_than_rounding(
    precision: str, options: dict[str, Any], pipeline: Pipeline, tmp_path: Path
) -> None:
    torch._dynamo.reset()
    counters.clear()
    wanted = tuned(pipeline, tmp_path / "wanted")
    found = tuned(pipeline, tmp_path / "found", precision, **options)
    if options.get("compile"):
        assert not counters["graph_break"]
        assert counters["stats"]["unique_graphs"] <= 2
    tolerance = 1e-4 if precision == "32-true" else 0.3
    for name, value in wanted.items():
        if "lora_B" in name:
            assert (found[name] - value).norm() < tolerance * value.norm(), name


@pytest.mark.slow
def test_bf16_true_trains_and_merges(pipeline: Pipeline, tmp_path: Path) -> None:
    found = tuned(pipeline, tmp_path, "bf16-true")
    assert all(value.dtype == torch.bfloat16 for name, value in found.items() if "lora" in name)
    weights = read_weights(tmp_path / "checkpoints/last.ckpt", averaged=False)
    build_model(weights)
    base = read_weights(pipeline.argen).state
    assert weights.state.keys() == base.keys()
    assert not torch.equal(weights.state["layers.1.feed_forward.w2.weight"], base["layers.1.feed_forward.w2.weight"])


@pytest.mark.slow
def test_a_text_model_is_adapted_with_its_caption_projection(text_pipeline: TextPipeline, tmp_path: Path) -> None:
    base = read_weights(text_pipeline.argen)
    net = replace(GPTConfig(**base.config), drop_path=0.0)  # type: ignore[arg-type]
    pl.seed_everything(0, verbose=False)
    encoder = TextEncoderConfig(name=str(text_pipeline.t5))
    module = ARGenModule(net, AdamWConfig(lr=1e-2), init_from=text_pipeline.argen, lora=LORA, text_encoder=encoder)
    data = CodeDataModule(text_pipeline.features, batch_size=50, num_workers=0)
    trainer = pl.Trainer(
        accelerator="cpu", default_root_dir=tmp_path, logger=False, max_steps=3, limit_val_batches=1,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(module, data)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    weights = read_weights(tmp_path / "last.ckpt")
    assert weights.captions == base.captions
    changed = {name for name, value in weights.state.items() if not torch.equal(value, base.state[name])}
    names = ("wqkv", "wo", "w1", "w2", "w3", "fc1", "fc2")
    assert changed == {name for name in base.state if name.split(".")[-2] in names}
