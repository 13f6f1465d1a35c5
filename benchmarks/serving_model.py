"""Exported models with random weights and the shapes of the paper's, for the benchmarks of the servers."""

import contextlib
import io
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn

from benchmarks.sizes import TINY, TINY_TOKENIZER, gpt_shape
from llamagen.checkpoints.weights import Weights
from llamagen.checkpoints.writing import write_weights
from llamagen.models.gpt import GPT
from llamagen.models.gpt_config import GPTConfig
from llamagen.models.vqgan import VQGAN, VQGANConfig
from llamagen.pretrained.export_folder import Export, export_model


def write_model(folder: Path, size: str, pixels: int, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Write an exported class-conditional model, unless it exists.

    Args:
        folder: parent of the model's folder.
        size: name of one of the paper's sizes, or ``tiny``.
        pixels: side of its images.
        dtype: of the stored weights.

    Returns:
        The model's folder.
    """
    to = folder / f"{size}_{pixels}"
    if to.exists():
        return to
    torch.manual_seed(0)
    config = TINY_TOKENIZER if size == TINY else VQGANConfig()
    tokenizer = VQGAN(config)
    with torch.device("meta"):
        shape = GPTConfig(
            **gpt_shape(size),
            vocab_size=config.codebook_size,
            block_size=(pixels // config.downsampling) ** 2,
        )
        gpt = GPT(shape)
    gpt = gpt.to(dtype).to_empty(device="cpu")
    fill(gpt)
    with TemporaryDirectory(dir=folder) as temporary:
        parts = {name: Path(temporary, f"{name}.safetensors") for name in ("model", "tokenizer")}
        models: dict[str, GPT | VQGAN] = {"model": gpt, "tokenizer": tokenizer}
        for name, model in models.items():
            write_weights(model, Weights(dict(model.state_dict()), None, None, None, name), parts[name])
        export = Export(str(parts["model"]), tokenizer=str(parts["tokenizer"]), samples=0)
        with contextlib.redirect_stdout(io.StringIO()):  # it says how to load the folder
            export_model(export, to)
    return to


@torch.no_grad()
def fill(model: nn.Module) -> None:
    """Fill a model with random weights, whose distributions spread over many codes."""
    for parameter in model.parameters():
        parameter.normal_(0, 0.02) if parameter.dim() > 1 else parameter.fill_(1.0)
