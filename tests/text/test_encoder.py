"""The frozen T5: features do not depend on the batch, and errors are one line."""

import json
import shutil
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertConfig, T5Config, T5ForConditionalGeneration

from llamagen.text import CaptionEncoder, TextEncoderConfig, encoder
from llamagen.text.pretrained import tokenize, truncate
from tests.tiny_t5 import WIDTH, save_tiny_model, save_tiny_t5, tiny_tokenizer

CAPTIONS = [
    "a photo of the cat",
    "",
    "zebra",
    "a cat " * 30,
    "the dog sits under a red tree .",
    "\0\x07 \ud800 🙂 猫 <pad>",
]
LENGTHS = [6, 1, 7, 12, 9]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_t5(tmp_path_factory.mktemp("t5"))


@pytest.fixture(scope="module")
def t5(folder: Path) -> CaptionEncoder:
    return CaptionEncoder(folder, caption_length=12, dtype="float32")


def error_of(name: str | Path) -> str:
    with pytest.raises(ValueError) as error:
        CaptionEncoder(name)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_features_are_those_of_the_t5_with_zeros_after_the_last_token(t5: CaptionEncoder) -> None:
    features, lengths, truncated = t5(CAPTIONS)
    assert features.shape == (6, 12, WIDTH)
    assert lengths.tolist()[:5] == LENGTHS
    assert lengths.dtype is torch.int64
    assert truncated.tolist() == [False, False, False, True, False, False]
    for row, caption in enumerate(CAPTIONS[:5]):
        ids = t5.tokenizer([caption], truncation=True, max_length=12, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            expected = t5.model(input_ids=ids).last_hidden_state[0]
        torch.testing.assert_close(features[row, : len(expected)], expected, rtol=0, atol=1e-5)
        assert (features[row, len(expected) :] == 0).all()


def test_a_truncated_caption_keeps_its_end_token(t5: CaptionEncoder) -> None:
    whole = tokenize(t5.tokenizer, ["a cat " * 30])[0]
    assert len(whole) == 61
    assert (
        truncate(whole, t5.caption_length)
        == t5.tokenizer(["a cat " * 30], truncation=True, max_length=12)["input_ids"][0]
    )
    assert not t5(["a cat " * 5 + "a"]).truncated.item()  # 11 words and the end


@pytest.mark.parametrize("tokens_in_pass", [1, 20, 8192])
def test_features_do_not_depend_on_batch_order_or_padding(
    t5: CaptionEncoder, monkeypatch: pytest.MonkeyPatch, tokens_in_pass: int
) -> None:
    alone = torch.cat([t5([caption]).features for caption in CAPTIONS])
    monkeypatch.setattr(encoder, "MAX_PASS_TOKENS", tokens_in_pass)
    torch.testing.assert_close(t5(CAPTIONS).features, alone, rtol=0, atol=1e-5)
    backward = t5(CAPTIONS[::-1])
    torch.testing.assert_close(backward.features.flip(0), alone, rtol=0, atol=1e-5)
    assert backward.lengths.flip(0).tolist()[:5] == LENGTHS


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_captions_that_are_encoded_separately_have_the_same_bits_in_any_list(folder: Path, dtype: Any) -> None:
    t5 = CaptionEncoder(folder, caption_length=12, dtype=dtype)
    together = t5(CAPTIONS, separately=True)
    for row, caption in enumerate(CAPTIONS):
        alone = t5([caption], separately=True)
        assert torch.equal(alone.features[0], together.features[row])
        assert torch.equal(alone.lengths[0], together.lengths[row])
    assert torch.equal(t5(CAPTIONS[::-1], separately=True).features.flip(0), together.features)


def test_duplicate_captions_are_encoded_once(t5: CaptionEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    encode = t5._encode
    monkeypatch.setattr(t5, "_encode", lambda tokens: seen.append(len(tokens)) or encode(tokens))
    found = t5(["a cat", "a red dog", "a cat", "a cat " * 9, "a red dog"])
    assert sum(seen) == 3
    assert torch.equal(found.features[0], found.features[2])
    assert torch.equal(found.features[1], found.features[4])
    assert found.lengths.tolist() == [3, 4, 3, 12, 4]
    assert found.truncated.tolist() == [False, False, False, True, False]


def test_passes_hold_each_caption_once_longest_first_and_no_more_tokens_than_allowed() -> None:
    lengths = torch.randint(1, 121, (2000,), generator=torch.Generator().manual_seed(0)).tolist()
    shares = list(encoder.passes(lengths))
    assert sorted(row for rows in shares for row in rows) == list(range(2000))
    longest = [max(lengths[row] for row in rows) for rows in shares]
    assert longest == sorted(longest, reverse=True)
    assert all(len(rows) * most <= encoder.MAX_PASS_TOKENS for rows, most in zip(shares, longest, strict=True))
    padded = sum(len(rows) * most for rows, most in zip(shares, longest, strict=True))
    assert padded < 1.1 * sum(lengths)  # 2 × without sorting


def test_no_captions_give_no_features(t5: CaptionEncoder) -> None:
    features, lengths, truncated = t5([])
    assert (features.shape, lengths.shape, truncated.shape) == ((0, 12, WIDTH), (0,), (0,))


@pytest.mark.parametrize(
    "text", ["\x00", "\ud83d", "👩‍👩‍👧", "猫" * 500, "\u202eabc", "</s> <pad> <unk>", " ", "x" * 100_000]
)
def test_encodes_any_text(t5: CaptionEncoder, text: str) -> None:
    features, lengths, _ = t5([text, "a cat"])
    assert features.isfinite().all()
    assert 1 <= lengths[0] <= 12


def test_features_that_are_not_finite_are_an_error_with_caption_and_weight(tmp_path: Path) -> None:
    encoder = CaptionEncoder(save_tiny_t5(tmp_path), 12, "float32")
    row = encoder.tokenizer("cat")["input_ids"][0]
    encoder.model.shared.weight[row, 0] = float("nan")
    said = r"^the features of the caption encoder .* are not finite in 1 of 2 examples \(first: number 1\) \(prec"
    with pytest.raises(FloatingPointError, match=said):
        encoder(["a dog", "a cat"])
    assert encoder(["a dog"]).features.isfinite().all()
    encoder.model.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"cannot be used: its weight .*shared\.weight is not finite; download it again"
    ):
        CaptionEncoder(tmp_path)


@pytest.mark.parametrize("captions", ["a cat", ["a cat", None], [b"a cat"]])
def test_rejects_anything_but_a_list_of_texts(t5: CaptionEncoder, captions: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        t5(captions)
    assert "must be a" in str(error.value)


def test_the_encoder_is_frozen_and_stays_in_evaluation_mode(t5: CaptionEncoder) -> None:
    parent = nn.ModuleList([t5]).train()
    assert parent.training
    assert not any(module.training for module in t5.modules())
    assert not any(parameter.requires_grad for parameter in t5.parameters())
    assert torch.equal(t5(["a cat"]).features, t5(["a cat"]).features)  # no dropout
    assert not t5(["a cat"]).features.requires_grad


def test_a_module_that_holds_the_encoder_in_a_tuple_does_not_own_its_weights(t5: CaptionEncoder) -> None:
    owner = nn.Linear(2, 2)
    owner.encoder = (t5,)
    assert set(owner.state_dict()) == {"weight", "bias"}
    owner.half()
    assert t5.dtype is torch.float32


def test_neither_autocast_nor_inference_mode_changes_features(t5: CaptionEncoder) -> None:
    plain = t5(CAPTIONS).features
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(t5(CAPTIONS).features, plain)
    with torch.inference_mode():
        assert torch.equal(t5(CAPTIONS).features, plain)
    weight = torch.ones(WIDTH, requires_grad=True)
    (t5(["a cat"]).features * weight).sum().backward()  # which features of inference mode would not allow
    assert weight.grad is not None


def test_bfloat16_is_the_default_for_all_weights_and_near_float32(folder: Path, t5: CaptionEncoder) -> None:
    small = CaptionEncoder(folder, caption_length=12)
    assert {parameter.dtype for parameter in small.parameters()} == {torch.bfloat16}
    found = small(CAPTIONS)
    assert found.features.dtype is torch.bfloat16
    assert torch.equal(found.lengths, t5(CAPTIONS).lengths)
    difference = (found.features.float() - t5(CAPTIONS).features).norm() / t5(CAPTIONS).features.norm()
    assert difference < 0.02


def test_the_config_rejects_float16() -> None:
    with pytest.raises(ValueError, match=r"dtype 'float16' .*bfloat16, float32; T5 overflows in float16"):
        TextEncoderConfig(dtype="float16")  # type: ignore[arg-type]
    assert TextEncoderConfig(dtype="float32").dtype == "float32"


def test_rejects_float16_and_other_invalid_arguments(folder: Path) -> None:
    with pytest.raises(ValueError, match="float16") as error:
        CaptionEncoder(folder, dtype="float16")  # type: ignore[arg-type]
    assert "bfloat16, float32" in str(error.value)
    with pytest.raises(ValueError, match="caption_length 0"):
        CaptionEncoder(folder, caption_length=0)


def test_metadata_are_primitives_that_distinguish_encoders(folder: Path, t5: CaptionEncoder, tmp_path: Path) -> None:
    metadata = t5.metadata()
    assert json.loads(json.dumps(metadata)) == metadata
    assert (metadata["encoder"], metadata["width"], metadata["caption_length"]) == (str(folder), WIDTH, 12)
    assert metadata["dtype"] == "float32"
    same = CaptionEncoder(shutil.copytree(folder, tmp_path / "same"), caption_length=12, dtype="float32")
    t5(CAPTIONS)
    assert {**same.metadata(), "encoder": str(folder)} == t5.metadata() == metadata
    rounded = CaptionEncoder(folder, caption_length=12, dtype="bfloat16").metadata()
    assert rounded == {**metadata, "dtype": "bfloat16"}
    save_tiny_model(tmp_path / "same", seed=1)
    other = CaptionEncoder(tmp_path / "same", caption_length=12, dtype="float32").metadata()
    assert other["weights"] != metadata["weights"]
    assert other["tokenizer"] == metadata["tokenizer"]
    tiny_tokenizer(extra=("sofa",)).save_pretrained(tmp_path / "same")
    assert CaptionEncoder(tmp_path / "same").metadata()["tokenizer"] != metadata["tokenizer"]


def test_a_folder_is_loaded_without_a_network(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert CaptionEncoder(str(folder)).width == WIDTH


def test_a_cached_model_is_loaded_without_a_network(
    folder: Path, t5: CaptionEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a network was used")

    revision = "0" * 40
    repository = tmp_path / "models--someone--tiny-t5"
    shutil.copytree(folder, repository / "snapshots" / revision)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(revision)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    cached = CaptionEncoder("someone/tiny-t5", 12, "float32")
    assert torch.equal(cached(CAPTIONS).features, t5(CAPTIONS).features)


def test_reads_the_encoder_of_a_full_t5(folder: Path, t5: CaptionEncoder, tmp_path: Path) -> None:
    config = T5Config.from_pretrained(folder)
    config.is_encoder_decoder = True
    whole = T5ForConditionalGeneration(config)
    whole.encoder.load_state_dict(t5.model.encoder.state_dict())
    whole.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    found = CaptionEncoder(tmp_path, caption_length=12, dtype="float32")
    assert torch.equal(found(CAPTIONS).features, t5(CAPTIONS).features)


def test_reads_a_sentencepiece_tokenizer(tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    save_tiny_model(tmp_path)
    texts = ["a photo of a cat", "the dog sits under a tree", "red house"]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts * 5),
        model_prefix=str(tmp_path / "spiece"),
        vocab_size=40,
        hard_vocab_limit=False,
        minloglevel=2,
        **{"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1},
    )
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"extra_ids": 0, "tokenizer_class": "T5Tokenizer"}))
    own = sentencepiece.SentencePieceProcessor(str(tmp_path / "spiece.model"))
    found = CaptionEncoder(tmp_path)
    assert tokenize(found.tokenizer, ["a red cat sits"]) == [[*own.encode("a red cat sits"), 1]]


def test_without_transformers_the_message_names_the_extra(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert 'pip install -c constraints.txt -e ".[text]"' in error_of(folder)


@pytest.mark.parametrize("name", ["/no/such/t5", "./t5", "~/no-such-t5", "a/b/c", Path("no/t5")])
def test_a_missing_path_is_not_taken_for_a_name_on_the_hub(name: str | Path) -> None:
    message = error_of(name)
    assert f"{name} does not exist" in message
    assert "google/flan-t5-xl" in message


def test_an_unavailable_name_is_an_error_with_the_places_that_were_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = error_of("someone/no-such-t5")
    for part in ("someone/no-such-t5", "HF_HOME", "hf download someone/no-such-t5", "folder's path"):
        assert part in message


def test_rejects_other_models_than_t5(tmp_path: Path) -> None:
    assert "cannot be used" in error_of(tmp_path)
    BertConfig().save_pretrained(tmp_path)
    assert "it is a bert, not a T5" in error_of(tmp_path)


def test_rejects_missing_or_damaged_weights(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    del weights["encoder.block.1.layer.0.SelfAttention.q.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    assert "lacks 1 weights, such as encoder.block.1.layer.0.SelfAttention.q.weight" in error_of(tmp_path)
    file.write_bytes(b"not weights")
    assert "cannot be used" in error_of(tmp_path)


def test_rejects_a_tokenizer_that_does_not_match(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    tiny_tokenizer(extra=tuple(f"word{i}" for i in range(90))).save_pretrained(tmp_path)
    assert "has a token" in error_of(tmp_path)
    endless = tiny_tokenizer()
    endless.backend_tokenizer.post_processor = None
    endless.save_pretrained(tmp_path)
    assert "does not end captions" in error_of(tmp_path)
