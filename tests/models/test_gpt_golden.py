"""The GPT computes what the published implementation computes."""

import pytest
import torch
from torch.nn import functional as F

from llamagen.models.gpt import GPT, GPTConfig
from tests.golden import assert_matches, fill, golden, integer_input
from tests.golden_gpts import SMALL_ENTRIES, golden_gpt, golden_inputs


def assert_logits_and_loss(gpt: GPT, entry: str) -> None:
    """Teacher forcing of all codes gives the published logits and mean cross entropy."""
    condition, caption_lengths = golden_inputs(entry, gpt.config)
    rows = len(condition)
    codes = integer_input(f"{entry}/idx", gpt.config.vocab_size, (rows, gpt.config.block_size))
    with torch.no_grad():
        logits = gpt(codes[:, :-1], condition, caption_lengths=caption_lengths)
    assert_matches(logits, golden(entry)["train_logits"])
    loss = F.cross_entropy(logits.flatten(0, 1), codes.flatten())
    assert loss.item() == pytest.approx(golden(entry)["train_loss"], abs=1e-4)


@pytest.mark.parametrize("entry", SMALL_ENTRIES)
def test_teacher_forcing_gives_the_published_logits_and_loss(entry: str) -> None:
    assert_logits_and_loss(golden_gpt(entry), entry)


def test_the_111m_model_gives_the_published_logits_and_loss() -> None:
    with torch.device("meta"):
        gpt = GPT(GPTConfig(dim=768, n_layer=12, n_head=12))
    assert_logits_and_loss(fill(gpt.to_empty(device="cpu")).eval(), "GPT-B")


@pytest.mark.parametrize("entry", SMALL_ENTRIES)
def test_training_mode_without_dropout_gives_the_published_logits(entry: str) -> None:
    gpt = golden_gpt(entry, condition_dropout=0.0, token_dropout=0.0, resid_dropout=0.0, ffn_dropout=0.0)
    assert_logits_and_loss(gpt.train(), entry)
