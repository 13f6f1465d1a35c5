"""The published models by name: where their files are, and which sizes and settings belong to them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

CLASS_REPOSITORY = "FoundationVision/LlamaGen"
TEXT_REPOSITORY = "peizesun/llamagen_t2i"


@dataclass(frozen=True)
class PublishedModel:
    """A published file of weights, and the facts that the file does not contain.

    Attributes:
        name: name by which it is given.
        repository: repository of the hub, ``owner/name``.
        file: name of the file in the repository.
        kind: ``"tokenizer"``, or a model conditional on a ``"class"`` or on ``"text"``.
        size: size of the model, ``"VQ-16"``, ``"VQ-8"``, ``"B"``, ``"L"``, ``"XL"``, ``"XXL"`` or ``"3B"``.
        resolution: side in pixels of the images that it was trained on.
        tokenizer: name of the tokenizer whose codes it predicts; None for a tokenizer.
        guidance: scale of classifier-free guidance with which the paper measured ``fid``.
        fid: the paper's FID, of samples for a class model (measured at 256 px), of reconstructions for a tokenizer.
    """

    name: str
    repository: str
    file: str
    kind: Literal["tokenizer", "class", "text"]
    size: str
    resolution: int
    tokenizer: str | None = None
    guidance: float | None = None
    fid: float | None = None


def _tokenizer(name: str, repository: str, size: str, fid: float | None = None) -> PublishedModel:
    return PublishedModel(name, repository, f"{name}.pt", "tokenizer", size, 256, fid=fid)


def _class_model(size: str, resolution: int, guidance: float, fid: float) -> PublishedModel:
    name = f"c2i_{size}_{resolution}"
    return PublishedModel(name, CLASS_REPOSITORY, f"{name}.pt", "class", size, resolution, "vq_ds16_c2i", guidance, fid)


def _text_model(stage: int, resolution: int) -> PublishedModel:
    name = f"t2i_XL_stage{stage}_{resolution}"
    return PublishedModel(name, TEXT_REPOSITORY, f"{name}.pt", "text", "XL", resolution, "vq_ds16_t2i")


PUBLISHED: Mapping[str, PublishedModel] = {
    model.name: model
    for model in (
        _tokenizer("vq_ds16_c2i", CLASS_REPOSITORY, "VQ-16", 2.19),
        _tokenizer("vq_ds8_c2i", CLASS_REPOSITORY, "VQ-8", 0.59),
        _class_model("B", 256, 2.0, 5.46),
        _class_model("B", 384, 2.0, 6.09),
        _class_model("L", 256, 1.75, 3.80),
        _class_model("L", 384, 2.0, 3.07),
        _class_model("XL", 384, 1.75, 2.62),
        _class_model("XXL", 384, 1.75, 2.34),
        _class_model("3B", 384, 1.65, 2.18),
        _tokenizer("vq_ds16_t2i", TEXT_REPOSITORY, "VQ-16"),
        _text_model(1, 256),
        _text_model(2, 512),
    )
}
"""All published models by name (arXiv 2406.06525)."""

TEXT_FILES = frozenset(model.file for model in PUBLISHED.values() if model.kind == "text")
"""Files of models whose captions were cleaned with ``published``. The files do not record it."""
