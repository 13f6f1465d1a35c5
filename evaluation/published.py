"""The paper's figures (arXiv 2406.06525, tables of sections 2 and 3)."""

from dataclasses import replace
from typing import NamedTuple

from llamagen.models.gpt_config import GPTConfig
from llamagen.models.vqgan import VQGANConfig
from llamagen.pretrained.sizes import SIZES


class Generation(NamedTuple):
    """Class-conditional sampling, 50,000 images, measured at 256 px against ADM's reference."""

    fid: float
    inception_score: float
    precision: float
    recall: float
    guidance_scale: float | None


class Reconstruction(NamedTuple):
    """Reconstruction of ImageNet's validation images. SSIM has a data range of 2, so it is larger than ours."""

    fid: float
    psnr: float | None
    ssim: float | None


TOKENIZERS = (VQGANConfig(), VQGANConfig(channel_multipliers=(1, 2, 2, 4)))
"""VQ-16 and VQ-8."""

GENERATION: dict[tuple[str, int], Generation] = {
    ("B", 256): Generation(5.46, 193.6, 0.84, 0.46, 2.0),
    ("L", 256): Generation(3.80, 248.3, 0.83, 0.51, 1.75),
    ("XL", 256): Generation(3.39, 227.1, 0.81, 0.54, None),
    ("XXL", 256): Generation(3.09, 253.6, 0.83, 0.53, None),
    ("3B", 256): Generation(3.05, 222.3, 0.80, 0.58, None),
    ("B", 384): Generation(6.09, 182.5, 0.85, 0.42, 2.0),
    ("L", 384): Generation(3.07, 256.1, 0.83, 0.52, 2.0),
    ("XL", 384): Generation(2.62, 244.1, 0.80, 0.57, 1.75),
    ("XXL", 384): Generation(2.34, 253.9, 0.80, 0.59, 1.75),
    ("3B", 384): Generation(2.18, 263.3, 0.81, 0.58, 1.65),
}
"""Figures by model size and the side in pixels at which images are sampled."""

RECONSTRUCTION: dict[tuple[int, int], Reconstruction] = {
    (16, 256): Reconstruction(2.19, 20.79, 0.675),
    (16, 384): Reconstruction(0.94, 21.94, 0.726),
    (16, 512): Reconstruction(0.70, None, None),
    (8, 256): Reconstruction(0.59, 24.45, 0.813),
}
"""Figures by downsampling factor and side in pixels."""


class Published(NamedTuple):
    """The paper's figures for a model.

    Attributes:
        title: the model's name.
        figures: the figures by result name, without the slash and the reference after it.
        remark: how the figures were measured.
    """

    title: str
    figures: dict[str, float]
    remark: str


def published(config: GPTConfig | VQGANConfig | None, image_size: int | None) -> list[Published]:
    """The paper's figures for a model. If the paper has no such model, those of all its models of the same kind.

    For text-conditional models the list is empty.

    Args:
        config: configuration of the model; None for images of unknown origin, which get the figures of all GPTs.
        image_size: side of reconstructions in pixels. For a GPT the number of codes determines it: 16 × 16 codes are
            256 pixels.
    """
    if isinstance(config, VQGANConfig):
        key = (config.downsampling, image_size or 0)
        own = key in RECONSTRUCTION and replace(config, dropout=0.0) in TOKENIZERS
        rows = {key: RECONSTRUCTION[key]} if own else RECONSTRUCTION
        return [_reconstruction(*key, row) for key, row in rows.items()]
    if config is not None and config.condition == "text":
        return []
    if config is not None:
        shape = {"n_layer": config.n_layer, "n_head": config.n_head, "dim": config.dim}
        side = 16 * config.grid_size
        size = next((name for name, known in SIZES.items() if known == shape), "")
        task = config.condition, config.num_classes, config.vocab_size
        if (size, side) in GENERATION and task == ("class", 1000, 16384):
            return [_generation(size, side, GENERATION[size, side])]
    return [_generation(*key, row) for key, row in GENERATION.items()]


def _generation(size: str, side: int, row: Generation) -> Published:
    scale = "" if row.guidance_scale is None else f", guidance {row.guidance_scale}"
    figures = {
        "gfid": row.fid,
        "inception_score": row.inception_score,
        "precision": row.precision,
        "recall": row.recall,
    }
    return Published(
        f"{size}, {side} px", figures, f"50,000 samples{scale}, measured at 256 px against ADM's reference"
    )


def _reconstruction(factor: int, side: int, row: Reconstruction) -> Published:
    figures = {"rfid": row.fid, "psnr": row.psnr, "ssim": row.ssim}
    known = {name: value for name, value in figures.items() if value is not None}
    resized = "" if side == 256 else ", resized to 256 px"
    remark = f"ImageNet's validation set{resized}; SSIM with a data range of 2, so larger"
    return Published(f"VQ-{factor}, {side} px", known, remark)
