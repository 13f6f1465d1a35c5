"""Write the weights of a model to a file, ``.pt`` or ``.safetensors``. Plain torch."""

import json
from pathlib import Path
from typing import Any

import torch

from llamagen.checkpoints.contents import describe
from llamagen.checkpoints.weights import CODES_OF, ENTRY, Weights
from llamagen.files import atomic_file
from llamagen.full_disk import DiskFullError
from llamagen.models.gpt import GPT
from llamagen.models.vqgan import VQGAN

SUFFIXES = (".pt", ".safetensors")


def write_weights(model: GPT | VQGAN, weights: Weights, out: Path) -> None:
    """Write weights, in their dtype.

    Args:
        model: the model built from them.
        weights: content of a file of weights.
        out: file to write, ``.pt`` or ``.safetensors``; complete or absent, even if the process is killed.

    Raises:
        ValueError: in one line, if ``out`` cannot be written.
        DiskFullError: in one line, if the disk is full.
    """
    # Cloned, because tensors may be views, share storage or have another memory format, which torch.save would keep.
    state = {name: weights.state[name].clone(memory_format=torch.contiguous_format) for name in model.state_dict()}
    from safetensors import SafetensorError  # imported here because the import is slow
    from safetensors.torch import save_file

    try:
        with atomic_file(out, sum(tensor.nbytes for tensor in state.values())) as temporary:
            if out.suffix == ".pt":
                with temporary.open("wb") as file:  # its errors name the reason; torch.save's own writer hides it
                    torch.save({"model": state} | _entry_of_tokenizer(model), file)
            else:
                save_file(state, temporary, _metadata(model, weights))
    except DiskFullError:
        raise
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{out} cannot be written ({reason}); choose another place") from error


def _entry_of_tokenizer(model: GPT | VQGAN) -> dict[str, Any]:
    """For a ``.pt`` file, what the shapes of a tokenizer's weights do not say: its quantiser, and whose codes it
    writes.
    """
    if not isinstance(model, VQGAN) or (model.config.quantizer is None and model.codes_of is None):
        return {}
    return {ENTRY: describe(model, prefix="")}


def _metadata(model: GPT | VQGAN, weights: Weights) -> dict[str, str]:
    """Metadata of a safetensors file."""
    description = describe(model, prefix="")
    keys = ("architecture", "config", CODES_OF)
    entry: dict[str, Any] = {key: description[key] for key in keys if key in description}
    entry["averaged"] = weights.averaged
    if weights.captions is not None:
        entry["captions"] = weights.captions
    if weights.tokenizer is not None:
        entry["tokenizer"] = weights.tokenizer
    if weights.classes is not None:
        entry["classes"] = weights.classes
    return {ENTRY: json.dumps(entry)}
