"""Quantisers whose codes move without a gradient, or are frozen, in steps of the trainer."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_modules import AdamWConfig, VQGANModule
from llamagen.checkpoints.weights import Weights
from llamagen.checkpoints.writing import write_weights
from llamagen.models.vqgan import VQGAN, VQGANConfig
from tests.lightning_modules.runs import vqgan_module
from tests.pipeline import TOKENIZER_NET

PACKAGE = "llamagen.models.quantizers"
EMA_CODES = {"codebook_size": 64, "codebook_dim": 4}


def net_with(kind: str, arguments: dict[str, Any]) -> VQGANConfig:
    quantizer = {"class_path": f"{PACKAGE}.{kind}", "init_args": arguments}
    return VQGANConfig(**TOKENIZER_NET, dropout=0.1, quantizer=quantizer)


def images() -> Tensor:
    return torch.rand(16, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


def fit(module: VQGANModule, folder: Path, steps: int) -> None:
    """Train for a few steps of 8 images each."""
    trainer = pl.Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        max_steps=steps,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader([{"images": image} for image in images()], batch_size=8))


def test_a_step_moves_the_entries_of_all_levels_to_their_latents_only(tmp_path: Path) -> None:
    net = net_with("Residual", {"level": f"{PACKAGE}.EMAVectorQuantizer", "level_args": EMA_CODES, "depth": 2})
    module = vqgan_module(options={"net": net, "optimizer": AdamWConfig(weight_decay=0.0)}, adversarial_weight=0.0)
    levels: Any = list(module.vqgan.quantize.levels)
    before = [level.embedding.weight.detach().clone() for level in levels]
    for level in levels:
        level._pending = torch.ones(64, 5)  # of a step that the optimizer skipped, with latents of each entry
    fit(module, tmp_path, steps=1)
    for level, start in zip(levels, before, strict=True):
        moved = (level.embedding.weight != start).any(-1).sum()
        assert 0 < moved < 64


@pytest.mark.parametrize(
    ("kind", "arguments", "entropy_weight"), [("EMAVectorQuantizer", EMA_CODES, 0.0), ("LFQ", {"bits": 5}, 0.03)]
)
def test_codes_of_a_frozen_tokenizer_stay_identical(
    kind: str, arguments: dict[str, Any], entropy_weight: float, tmp_path: Path
) -> None:
    net = net_with(kind, arguments)
    torch.manual_seed(0)
    base = VQGAN(net).eval()
    write_weights(base, Weights(dict(base.state_dict()), None, None, None, "base"), tmp_path / "base.pt")
    codes = base.encode(images()).codes
    assert len(codes.unique()) > 5
    options = {"net": net, "init_from": tmp_path / "base.pt", "freeze": ("encoder", "quantizer")}
    module = vqgan_module(options=options, adversarial_start=0, entropy_weight=entropy_weight)
    fit(module, tmp_path, steps=2)
    assert torch.equal(module.vqgan.eval().encode(images()).codes, codes)
    found, decoder = module.vqgan.state_dict(), "decoder.conv_out.weight"
    for name, value in base.state_dict().items():
        if name.startswith(("encoder.", "quant_conv.", "quantize.")):
            assert torch.equal(found[name], value), name
    assert not torch.equal(found[decoder], base.state_dict()[decoder])
