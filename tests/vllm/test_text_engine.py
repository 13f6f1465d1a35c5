"""The engine of the server's workers with a text model, from files that are not an exported folder."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llamagen import LlamaGen
from llamagen.pretrained.conditions import Prompts
from serving.engine.engine import Work
from tests.small_models import small_gpt
from tests.vllm.models import checkpoint_files
from tests.vllm.workloads import SETTINGS, ScriptedInbox, assert_images, png, run, started


def test_captions_of_several_lengths_with_kept_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpt = small_gpt(condition="text", dim=64, n_head=2, n_kv_head=1, vocab_size=64)
    files = checkpoint_files(gpt, tmp_path / "model")
    model = LlamaGen.from_pretrained(files["checkpoint"], tokenizer=files["tokenizer"], device="cpu", compile=False)
    encoded: list[str] = []

    def encode(_: Prompts, prompts: list[str], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Stands for T5: features of a prompt's length."""
        encoded.extend(prompts)
        lengths = [len(prompt) for prompt in prompts]
        features = [torch.randn(6, 12, generator=torch.Generator().manual_seed(length)) for length in lengths]
        return torch.stack(features), torch.tensor(lengths)

    monkeypatch.setattr(Prompts, "__call__", encode)
    works = [Work(key, "abcdef"[: key + 1], seed=9, index=key, settings=SETTINGS[key]) for key in range(6)]
    works += [replace(works[key], key=10 + key, image=png(model, key), keep_rows=2) for key in range(6)]
    with started(files["checkpoint"], tokenizer=files["tokenizer"]) as engine:  # not an exported folder
        assert encoded == [""]  # the start loads the encoder
        reports = run(engine, ScriptedInbox([works[:5], [], works[5:]]))
        assert encoded[1:] == [work.condition for work in works[:6]]  # each prompt once
        assert_images(model, works, reports)
