"""Files in the layout of the published ones, with weights by the fill rule of tests/golden.py."""

from functools import cache
from io import BytesIO
from pathlib import Path

import torch
from torch import nn

from llamagen.hub.published import PUBLISHED
from llamagen.models.gpt import GPT, GPTConfig
from llamagen.models.vqgan import VQGAN, VQGANConfig
from tests.golden import fill
from tests.models.test_published_shapes import GPT_SIZES, TOKENIZERS
from tests.small_models import small_gpt, small_vqgan

BARE = ("XXL", "3B")
"""Sizes that were trained with FSDP: their files are the state dict itself."""


@cache
def small_file(name: str) -> bytes:
    """A file of the published name, of a model of tests/small_models.py."""
    kind = PUBLISHED[name].kind
    model = small_vqgan() if kind == "tokenizer" else small_gpt(condition=kind)
    buffer = BytesIO()
    torch.save(_layout(name, model), buffer)
    return buffer.getvalue()


def full_file(name: str, folder: Path) -> Path:
    """A file of the published name, with all its parameters: 288 MB for a tokenizer, 446 MB for ``c2i_B_256``."""
    published = PUBLISHED[name]
    model: nn.Module
    if published.kind == "tokenizer":
        model = VQGAN(VQGANConfig(channel_multipliers=TOKENIZERS[published.size]))
    else:
        options = GPT_SIZES[f"GPT-{published.size} {'t2i' if published.kind == 'text' else 'c2i'} 256"]
        model = GPT(GPTConfig(**options | {"block_size": (published.resolution // 16) ** 2}))
    path = folder / published.file
    torch.save(_layout(name, fill(model)), path)
    return path


def _layout(name: str, model: nn.Module) -> object:
    return model.state_dict() if PUBLISHED[name].size in BARE else {"model": model.state_dict()}
