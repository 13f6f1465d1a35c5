"""Which tokenizer's codes a tokenizer writes: its own, or those of the one whose decoder was fine-tuned. Plain torch.

Shards of codes and autoregressive models record the checksum of their tokenizer, and refuse another one. A run that
freezes encoder and quantiser changes the decoder only, so its tokenizer writes the codes of the one it started from.
Its checkpoint says so in ``llamagen.codes_of``: ``tokenizer``, the checksum of that tokenizer, and ``encoder``, the
checksum of the frozen weights. Exports keep this entry, and so does the next such run.
"""

import json
from typing import Any

import torch

from llamagen.checkpoints.contents import weights_checksum
from llamagen.models.vqgan import VQGAN
from llamagen.state_dicts import tensors_checksum


def codes_checksum(vqgan: VQGAN) -> str:
    """The checksum under which codes of a tokenizer are recorded; equal checksums mean equal codes.

    It is that of the tokenizer in :attr:`VQGAN.codes_of` if encoder and quantiser have the weights that are recorded
    there, and otherwise that of the tokenizer itself.

    Returns:
        64 hexadecimal digits, see :func:`~llamagen.checkpoints.contents.weights_checksum`.
    """
    recorded = vqgan.codes_of
    if recorded is not None and recorded["encoder"] == encoder_checksum(vqgan):
        return recorded["tokenizer"]
    return weights_checksum(vqgan)


def codes_of(vqgan: VQGAN) -> dict[str, str]:
    """The entry for tokenizers that get another decoder and keep encoder and quantiser."""
    return {"tokenizer": codes_checksum(vqgan), "encoder": encoder_checksum(vqgan)}


def encoder_checksum(vqgan: VQGAN) -> str:
    """SHA-256 over everything that determines codes: encoder, ``quant_conv``, quantiser, and its configuration."""
    parts: dict[str, Any] = {"encoder": vqgan.encoder, "quant_conv": vqgan.quant_conv, "quantize": vqgan.quantize}
    tensors = {f"{name}.{key}": value for name, part in parts.items() for key, value in part.state_dict().items()}
    if vqgan.config.quantizer is not None:  # levels of FSQ are in no state dict
        description = json.dumps(vqgan.config.quantizer, sort_keys=True).encode()
        tensors["configuration"] = torch.frombuffer(bytearray(description), dtype=torch.uint8)
    return tensors_checksum(tensors)
