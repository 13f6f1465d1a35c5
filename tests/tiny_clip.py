"""A CLIP with random weights and a real tokenizer, in a folder like the published ones."""

from pathlib import Path

import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

SIDE = 32
LENGTH = 16
LETTERS = sorted(ByteLevel.alphabet())
MERGES = [("c", "a"), ("ca", "t</w>"), ("r", "e"), ("re", "d</w>")]


def tiny_tokenizer(extra: tuple[str, ...] = ()) -> CLIPTokenizer:
    """Byte-level BPE like CLIP's, with two words that are one token each."""
    pieces = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), *("".join(pair) for pair in MERGES), *extra]
    vocabulary = {piece: place for place, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocabulary, MERGES, model_max_length=LENGTH)


def save_tiny_clip(folder: Path, seed: int = 1, old_end: bool = False, side: int = SIDE) -> Path:
    """Write model, tokenizer and image processor into a folder, and return it.

    With ``old_end`` the configuration has the wrong end token of old ones such as OpenAI's.
    """
    tokenizer = tiny_tokenizer()
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = CLIPConfig(
        text_config={
            **size,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": LENGTH,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": 2 if old_end else tokenizer.eos_token_id,
        },
        vision_config={**size, "image_size": side, "patch_size": 8},
        projection_dim=24,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CLIPModel(config)
        for parameter in model.parameters():  # with the default initialisation all images have nearly the same features
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size=side).save_pretrained(folder)
    return folder
