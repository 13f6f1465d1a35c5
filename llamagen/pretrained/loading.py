"""Builds the models of a :class:`~llamagen.pretrained.source.Source` on their device, in their dtype."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from llamagen.checkpoints.contents import build_model, load_vqgan
from llamagen.checkpoints.lineage import codes_checksum
from llamagen.checkpoints.weights import Weights, read_weights
from llamagen.class_names import ClassNames, class_names_of
from llamagen.models.gpt import GPT
from llamagen.models.gpt_config import GPTConfig
from llamagen.models.vqgan import VQGAN
from llamagen.pretrained.conditions import Prompts
from llamagen.pretrained.sizes import infer_gpt_config, is_gpt
from llamagen.pretrained.source import Source
from llamagen.sampling import SamplingConfig
from llamagen.text import TextCondition, TextEncoderConfig

DTYPES = ("float32", "bfloat16", "mixed")


@dataclass(frozen=True)
class Parts:
    """Models, and what belongs to them.

    Attributes:
        name: name of the model.
        tokenizer: the image tokenizer, float32.
        gpt: the autoregressive model; None for a tokenizer alone.
        sampling: default settings of sampling.
        dtype: ``float32``, ``bfloat16`` or ``mixed``.
        class_names: names of the classes; None for other models.
        text: prompts to conditions; None for other models.
    """

    name: str
    tokenizer: VQGAN
    gpt: GPT | None
    sampling: SamplingConfig
    dtype: Any
    class_names: ClassNames | None = None
    text: Prompts | None = None


def load_parts(
    source: Source,
    text_encoder: str | Path | None = None,
    device: str | torch.device | None = None,
    dtype: Any = None,
) -> Parts:
    """Load the models of a source.

    Args:
        source: files and settings.
        text_encoder: name or folder of the T5 of a text model; None for the source's.
        device: None for a GPU if there is one.
        dtype: None for the source's.

    Raises:
        ValueError: in one line, if a file is damaged, files do not fit together, or an argument is invalid.
    """
    place, kind = _device(device), _dtype(source.dtype if dtype is None else dtype)
    gpt_weights, tokenizer = read_gpt_weights(source)
    vqgan = load_vqgan(tokenizer).to(place)
    if gpt_weights is None:
        for name, value, allowed in (
            ("text_encoder", text_encoder, (None,)),
            ("dtype", dtype and kind, (None, "float32")),
        ):
            if value not in allowed:
                raise ValueError(f"{name} is {value}, but {source.name} is a tokenizer, in float32; leave it out")
        return Parts(source.name, vqgan, None, SamplingConfig(), "float32")
    check_tokenizer(gpt_weights, vqgan, tokenizer)
    gpt = _build_gpt(gpt_weights, place, torch.bfloat16 if kind == "bfloat16" else torch.float32)
    sampling = SamplingConfig(**source.sampling)
    if gpt.config.condition == "class":
        if text_encoder is not None:
            raise ValueError(f"text_encoder is {text_encoder}, but {source.name} is class-conditional; leave it out")
        names = _class_names(source, gpt_weights, gpt.config)
        return Parts(source.name, vqgan, gpt, sampling, kind, class_names=names)
    return Parts(source.name, vqgan, gpt, sampling, kind, text=_prompts(source, gpt_weights, gpt.config, text_encoder))


def read_gpt_weights(source: Source, averaged: bool = True) -> tuple[Weights | None, Path]:
    """Read the weights of the autoregressive model, and find the file of its tokenizer.

    Args:
        source: files and settings.
        averaged: take averaged (EMA) weights if the file has them.

    Returns:
        The weights with their architecture and configuration, or None for a tokenizer alone; and the tokenizer's file.

    Raises:
        ValueError: in one line, if the file is damaged, does not record its size, or its tokenizer is not known.
    """
    weights, tokenizer = None, source.tokenizer
    if source.model is not None:
        weights = read_weights(source.model, averaged)
        if weights.architecture == "VQGAN" or (weights.architecture is None and not is_gpt(weights.state)):
            weights, tokenizer = None, source.model
    if tokenizer is None:
        raise ValueError(
            f"{source.model} does not name its tokenizer; give tokenizer, the file or published name of the tokenizer "
            "whose codes the model was trained on"
        )
    if weights is not None and weights.architecture is None:
        if source.resolution is None:
            raise ValueError(
                f"{source.model} does not record the size of its images; name it as it is published, such as "
                "c2i_B_384.pt, or give a published name"
            )
        config = infer_gpt_config(weights.state, source.resolution, weights.source)
        weights = weights._replace(architecture="GPT", config=asdict(config))
    return weights, tokenizer


def _build_gpt(weights: Weights, device: torch.device, dtype: torch.dtype) -> GPT:
    gpt = build_model(weights, device, dtype)
    if not isinstance(gpt, GPT):
        raise ValueError(f"{weights.source}: the file holds a {weights.architecture}, not an autoregressive model")
    return gpt


def check_tokenizer(weights: Weights, vqgan: VQGAN, tokenizer: Path) -> None:
    """Check that a model was trained on codes of a tokenizer, if its file records the tokenizer.

    Args:
        weights: weights of the autoregressive model.
        vqgan: the tokenizer.
        tokenizer: its file, for the message.

    Raises:
        ValueError: in one line, if it was trained on those of another one.
    """
    if weights.tokenizer is not None and (found := codes_checksum(vqgan)) != weights.tokenizer:
        raise ValueError(
            f"{weights.source}: the model was trained on codes of a tokenizer with other weights (checksum "
            f"{weights.tokenizer[:12]}) than {tokenizer} ({found[:12]}); give that tokenizer"
        )


def _class_names(source: Source, weights: Weights, config: GPTConfig) -> ClassNames:
    names = class_names_of(source.classes or weights.classes, config.num_classes)
    return names or ClassNames([str(number) for number in range(config.num_classes)])


def _prompts(source: Source, weights: Weights, config: GPTConfig, text_encoder: str | Path | None) -> Prompts:
    options = dict(source.text_encoder)
    if text_encoder is not None:
        options["name"] = str(text_encoder)
    condition = TextCondition(config, TextEncoderConfig(**options))
    if weights.captions:
        condition.check_encoder(weights.captions, weights.source)
    return Prompts(condition)


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"device is {device!r}, which is not available ({reason}); give cpu, or leave it out"
        ) from error
    return found


def _dtype(dtype: Any) -> str:
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}")
    return name
