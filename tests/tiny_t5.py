"""A T5 encoder with random weights and a real tokenizer, in a folder like the published ones."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

WIDTH = 32
WORDS = ("a", "photo", "of", "the", "cat", "dog", "red", "house", "on", "in", "and", "sits", "under", "tree", ",", ".")
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"


def tiny_tokenizer(extra: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """Unigram with T5's special tokens and ids. Unknown words become letters and <unk>."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    pieces += [(f"▁{word}", -2.0) for word in (*WORDS, *extra)]
    pieces += [(letter, -6.0) for letter in LETTERS]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single=["$A", "</s>"], special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>", pad_token="<pad>", model_max_length=512
    )


def save_tiny_model(folder: Path, seed: int = 0) -> None:
    config = T5Config(
        vocab_size=96,
        d_model=WIDTH,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.1,
        pad_token_id=0,
        eos_token_id=1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        T5EncoderModel(config).save_pretrained(folder)


def save_tiny_t5(folder: Path, seed: int = 0) -> Path:
    """Write model and tokenizer into a folder, and return it."""
    save_tiny_model(folder, seed)
    tiny_tokenizer().save_pretrained(folder)
    return folder
