"""Small models exported for vLLM, and requests to them."""

from pathlib import Path
from typing import Any

from llamagen.checkpoints.weights import Weights
from llamagen.checkpoints.writing import write_weights
from llamagen.models.gpt import GPT
from llamagen.pretrained.export_folder import Export, export_model
from tests.small_models import small_gpt, small_vqgan


def export_small(folder: Path, unguided: bool = False, **options: Any) -> GPT:
    """Export a small model as a user does, and return it.

    Args:
        folder: folder to write.
        unguided: whether to leave out the second branch.
        options: options of ``small_gpt``.
    """
    gpt, vqgan = small_gpt(**options), small_vqgan()
    files = folder.with_name(f"{folder.name}_files")
    files.mkdir()
    for name, model in (("gpt", gpt), ("vqgan", vqgan)):
        weights = Weights(dict(model.state_dict()), None, None, None, name)
        write_weights(model, weights, files / f"{name}.safetensors")
    checkpoint, tokenizer = (str(files / f"{name}.safetensors") for name in ("gpt", "vqgan"))
    export_model(Export(checkpoint, tokenizer=tokenizer, samples=0, unguided=unguided), folder)
    return gpt
