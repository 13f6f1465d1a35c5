"""Prompts and stored features become the condition of a text model, without Lightning."""

import importlib
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from llamagen.models.gpt import GPT, GPTConfig
from llamagen.sampling import SamplingConfig, generate
from llamagen.text import CaptionEncoder, TextCondition, TextEncoderConfig, pack, pad_left
from tests.tiny_t5 import WIDTH, save_tiny_t5

CPU = torch.device("cpu")
LENGTH = 8
CONFIG = GPTConfig(
    dim=32,
    n_layer=1,
    n_head=2,
    multiple_of=16,
    vocab_size=16,
    block_size=4,
    condition="text",
    caption_dim=WIDTH,
    caption_length=LENGTH,
)
PROMPTS = ["a cat", "a red house on a tree and a dog and a house"]


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_t5(tmp_path_factory.mktemp("t5"))


def text_condition(t5: Path) -> TextCondition:
    return TextCondition(CONFIG, TextEncoderConfig(str(t5), "float32"))


@pytest.mark.filterwarnings("ignore:1 of 2 captions have more")
def test_prompts_become_the_left_padded_features_of_the_encoder(t5: Path) -> None:
    features, lengths, truncated = text_condition(t5).encode(PROMPTS, CPU)
    encoded = CaptionEncoder(t5, LENGTH, "float32")(PROMPTS, separately=True)
    assert torch.equal(features, pad_left(encoded.features, encoded.lengths))
    assert lengths is not None
    assert lengths.tolist() == [3, 8]
    assert truncated is not None
    assert truncated.tolist() == [False, True]
    codes = generate(GPT(CONFIG), features, SamplingConfig(guidance_scale=2.0), caption_lengths=lengths)
    assert codes.shape == (2, 4)


def test_warns_of_truncation_once_and_only_on_the_first_rank(t5: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    condition = text_condition(t5)
    with pytest.warns(
        UserWarning, match="1 of 2 captions have more than 8 tokens and were truncated, first 'a red house"
    ):
        condition.encode(PROMPTS, CPU)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        condition.encode(PROMPTS, CPU)
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
        text_condition(t5).encode(PROMPTS, CPU)


@pytest.mark.parametrize(("key", "part"), [("weights", "encoder"), ("tokenizer", "tokenizer")])
def test_rejects_features_of_other_weights_or_another_tokenizer(key: str, part: str) -> None:
    condition = TextCondition(CONFIG, TextEncoderConfig())
    metadata = {"encoder": "t5", "weights": "1" * 64, "tokenizer": "2" * 64, "width": WIDTH}
    condition.check_encoder(metadata, "the checkpoint")
    condition.check_encoder({**metadata, "encoder": "folder/t5"}, "the same encoder under another name")
    with pytest.raises(ValueError, match=f"^the file has another {part} .* than the checkpoint ") as error:
        condition.check_encoder({**metadata, key: "3" * 64}, "the file")
    assert "\n" not in str(error.value)


def test_the_condition_of_a_batch_comes_from_features_or_captions(t5: Path) -> None:
    condition = text_condition(t5)
    features, lengths, _ = condition.encode(PROMPTS[:1], CPU)
    assert lengths is not None
    right = CaptionEncoder(t5, LENGTH, "float32")(PROMPTS[:1]).features
    for batch in (
        {"captions": PROMPTS[:1]},
        {"condition": features, "caption_lengths": lengths},
        {"caption_features": pack(right, lengths), "caption_lengths": lengths},
    ):
        found = condition.from_batch(batch, CPU)
        assert torch.equal(found.features, features)
        assert found.lengths is not None
        assert torch.equal(found.lengths, lengths)
    with pytest.raises(ValueError, match=r"the batch has no captions, only condition; give data with captions"):
        condition.from_batch({"condition": torch.tensor([3])}, CPU)


def test_prompts_are_encoded_one_by_one_and_captions_of_training_together(
    t5: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    condition, passes = text_condition(t5), list[int]()
    encode = condition.encoder._encode
    monkeypatch.setattr(condition.encoder, "_encode", lambda tokens: passes.append(len(tokens)) or encode(tokens))
    captions = ["a cat", "a dog", "a red house"]
    prompts = condition.from_batch({"captions": captions, "index": torch.arange(3)}, CPU)
    assert passes == [1, 1, 1]
    assert torch.equal(condition.encode(captions[1:2], CPU).features[0], prompts.features[1])
    passes.clear()
    condition.from_batch({"captions": captions, "codes": torch.zeros(3, 4)}, CPU)
    assert passes == [3]


LIGHTNING = ("lightning", "lightning_fabric", "lightning_utilities", "pytorch_lightning")


def test_encodes_and_warns_without_lightning(t5: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning's warning raises an error in a process that Lightning did not start."""
    for name in [*LIGHTNING, *sys.modules]:
        if name.partition(".")[0] in LIGHTNING:
            monkeypatch.setitem(sys.modules, name, None)  # to import it is an error
    with pytest.raises(ImportError):
        importlib.import_module("lightning.pytorch")
    with pytest.warns(UserWarning, match="1 of 2 captions have more than 8 tokens"):
        text_condition(t5).encode(PROMPTS, CPU)


@pytest.mark.slow
def test_llamagen_text_does_not_import_lightning(t5: Path) -> None:
    script = (
        "import sys, torch\n"
        "from llamagen.models.gpt_config import GPTConfig\n"
        "from llamagen.text import TextCondition, TextEncoderConfig\n"
        f"config = GPTConfig(32, 1, 2, condition='text', caption_dim={WIDTH}, caption_length=4)\n"
        f"condition = TextCondition(config, TextEncoderConfig({str(t5)!r}, 'float32'))\n"
        "print(condition.encode(['a cat on a red house'], torch.device('cpu')).lengths.tolist())\n"
        "print([name for name in sys.modules if name.startswith('lightning')])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["[4]", "[]"]
    assert "1 of 1 captions have more than 4 tokens" in done.stderr
