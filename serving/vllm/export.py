"""A folder that vLLM loads, for any model."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from llamagen.checkpoints.contents import build_model
from llamagen.checkpoints.writing import write_weights
from llamagen.models.gpt import GPT
from llamagen.pretrained.exported_config import (
    CONFIG_FILE,
    MODEL_FILE,
    MODEL_TYPE,
    is_exported,
    read_config,
    write_config,
)
from llamagen.pretrained.loading import read_gpt_weights
from llamagen.pretrained.source import Source


@contextmanager
def vllm_folder(source: Source) -> Iterator[Path]:
    """The folder of an exported model; for other models, and exports of older versions, a temporary one.

    Args:
        source: files of the model.

    Raises:
        ValueError: in one line, if it is a tokenizer, or a file is damaged.
    """
    # Only its own weights: another file in the folder may be another model.
    given = source.model.parent if source.model is not None and source.model.name == MODEL_FILE else None
    if given is not None and is_exported(given) and read_config(given).get("model_type") == MODEL_TYPE:
        yield given
        return
    weights, _ = read_gpt_weights(source)
    if weights is None:
        raise ValueError(f"{source.name} is a tokenizer; vLLM needs an autoregressive model, such as c2i_B_256")
    gpt = build_model(weights)
    assert isinstance(gpt, GPT)
    with TemporaryDirectory(prefix="llamagen_vllm_") as temporary:
        folder = Path(temporary)
        write_weights(gpt, weights, folder / MODEL_FILE)
        write_config(folder, source.name, [MODEL_FILE], {"dtype": source.dtype}, gpt.config)
        del gpt, weights  # vLLM loads them again
        yield folder


def is_guided(folder: Path) -> bool:
    """Whether vLLM computes the unconditional branch of the model in a folder."""
    return bool(json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8")).get("guided", True))
