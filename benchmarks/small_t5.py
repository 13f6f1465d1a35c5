"""A small T5 encoder with random weights and a tokenizer of given words, for benchmarks without a network.

Both are classes of transformers, saved by ``save_pretrained``, so ``CaptionEncoder`` reads them like published ones.
"""

from collections.abc import Iterable
from pathlib import Path

import torch

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
HEAD_WIDTH = 16


def save_small_t5(folder: Path, words: Iterable[str], width: int = 64, seed: int = 0) -> Path:
    """Write a model and its tokenizer.

    Args:
        folder: folder to write to; created if it does not exist.
        words: each becomes one token. Other words are split into letters and digits, and other characters become
            ``<unk>``.
        width: width of the features, a multiple of 16.
        seed: seed of the weights, which are initialised as transformers does it.

    Returns:
        The folder.

    Raises:
        ValueError: for another width.
    """
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    if width < HEAD_WIDTH or width % HEAD_WIDTH:
        raise ValueError(f"width {width} of a small T5 must be a multiple of {HEAD_WIDTH}, the width of its heads")
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    pieces += [(f"▁{word}", -2.0) for word in dict.fromkeys(words)]
    known = {piece for piece, _ in pieces}
    pieces += [(letter, -6.0) for letter in LETTERS if letter not in known]
    T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512).save_pretrained(folder)
    config = T5Config(
        vocab_size=len(pieces),
        d_model=width,
        d_kv=HEAD_WIDTH,
        d_ff=2 * width,
        num_layers=2,
        num_heads=width // HEAD_WIDTH,
        feed_forward_proj="gated-gelu",
        pad_token_id=0,
        eos_token_id=1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        T5EncoderModel(config).save_pretrained(folder)
    return folder
