"""The golden text model through the whole path: right-padded features → packed → padded left → module → images."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_modules import ARGenModule
from llamagen.sampling import ImageSampler, SamplingConfig
from llamagen.text import pack
from tests.golden import assert_matches, golden, integer_input
from tests.golden_gpts import golden_gpt, golden_inputs
from tests.lightning_modules.runs import evaluator
from tests.small_models import small_vqgan

ENTRY = "gpt_tiny_t2i"
NO_DROPOUT = dict.fromkeys(("condition_dropout", "token_dropout", "resid_dropout", "ffn_dropout"), 0.0)


def text_module(**net: Any) -> ARGenModule:
    """The golden model in a module, with a tokenizer of its vocabulary."""
    gpt = golden_gpt(ENTRY)
    module = ARGenModule(replace(gpt.config, **net))
    module.gpt.load_state_dict(gpt.state_dict())
    module._tokenizer = (small_vqgan(codebook_size=gpt.config.vocab_size),)
    return module.eval()


def padded_right() -> tuple[Tensor, Tensor]:
    """The golden features as an encoder returns them: tokens first, then arbitrary padding."""
    features, lengths = golden_inputs(ENTRY, golden_gpt(ENTRY).config)
    assert lengths is not None
    right = torch.full_like(features, 7.0)
    for row, length in enumerate(lengths.tolist()):
        right[row, :length] = features[row, -length:]
    return right, lengths


def stored_batch() -> dict[str, Any]:
    """A batch of the data layer: packed features and codes."""
    features, lengths = padded_right()
    config = golden_gpt(ENTRY).config
    codes = integer_input(f"{ENTRY}/idx", config.vocab_size, (len(lengths), config.block_size))
    return {"codes": codes, "caption_features": pack(features, lengths), "caption_lengths": lengths}


@torch.no_grad()
def test_packed_features_give_the_published_logits() -> None:
    module, batch = text_module(), stored_batch()
    condition, lengths, _ = module.batch_condition(batch)
    assert torch.equal(condition, golden_inputs(ENTRY, module.gpt.config)[0])
    assert_matches(module(batch["codes"], condition, lengths), golden(ENTRY)["train_logits"])


def test_validation_has_the_published_loss() -> None:
    (metrics,) = evaluator().validate(text_module(), DataLoader([stored_batch()], batch_size=None), verbose=False)
    assert metrics["val/loss"] == pytest.approx(golden(ENTRY)["train_loss"], abs=1e-4)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["eager", "compiled"])
def test_training_has_the_published_loss(compiled: bool) -> None:
    module = text_module(**NO_DROPOUT)
    if compiled:
        module.gpt.compile_blocks()
    logged: dict[str, Tensor] = {}
    module.log = lambda name, value, **_: logged.update({name: value})  # type: ignore[method-assign]
    module.check_finite = lambda *_: None  # type: ignore[method-assign]
    module.train()
    loss = module.training_step(stored_batch(), 0)
    assert loss.item() == pytest.approx(golden(ENTRY)["train_loss"], abs=1e-4)
    assert logged["train/loss"].item() == pytest.approx(golden(ENTRY)["train_loss"], abs=1e-4)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize(
    ("batch_size", "scale"),
    [
        *((2, scale) for scale in ("1.0", "1.75", "4.0", "half")),
        *((batch_size, "half") for batch_size in (1, 8)),
        *(pytest.param(n, scale, marks=pytest.mark.slow) for n in (1, 8) for scale in ("1.0", "1.75", "4.0")),
    ],
)
def test_greedy_codes_of_both_engines_are_the_published_ones(compiled: bool, batch_size: int, scale: str) -> None:
    module = text_module()
    guided = {"guidance_scale": 3.0, "guidance_steps": module.gpt.config.block_size // 2 + 2}
    expected = golden(ENTRY)["greedy_cfg3_interval_half"] if scale == "half" else golden(ENTRY)["greedy"][scale]
    module.sampling = SamplingConfig(
        temperature=0.0, **(guided if scale == "half" else {"guidance_scale": float(scale)})
    )
    module.sampler = module.build_sampler(batch_size, compiled=compiled)
    assert isinstance(module.sampler, ImageSampler)
    outputs = module.predict_step({**stored_batch(), "index": torch.arange(3)}, 0)
    assert outputs["codes"].tolist() == expected
    assert outputs["images"].numpy().shape == (3, 32, 32, 3)
    assert "truncated" not in outputs
