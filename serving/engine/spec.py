"""What a worker process loads.

footgun: a worker process reads this before ``share_cores``, so this module must not import torch, not even indirectly.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

ENGINES = {"embedded": "serving.engine.embedded:load_engine", "vllm": "serving.vllm.engine:load_engine"}
"""By name of an engine, a function that builds it from a :class:`WorkerSpec`."""
BATCH = {"cpu": 4, "cuda": 16}
"""Images at a time by default: few on a CPU, so that the first ones are finished early."""
WINDOW: Mapping[str, int | Literal["auto"]] = {"cpu": "auto", "cuda": 1}
"""Default of ``SamplingConfig.window``. On GPUs windows have not been measured yet."""


def default_window(device: str) -> int | Literal["auto"]:
    """Window on a device such as ``cpu`` or ``cuda:1``, see :data:`WINDOW`."""
    return WINDOW["cpu" if device.startswith("cpu") else "cuda"]


def default_batch_size(device: str) -> int:
    """Images at a time on a device such as ``cpu`` or ``cuda:1``, see :data:`BATCH`."""
    return BATCH["cpu" if device.startswith("cpu") else "cuda"]


@dataclass(frozen=True)
class WorkerSpec:
    """A worker process: what it loads, and where.

    Attributes:
        source: see ``LlamaGen.from_pretrained``, as the following ones.
        tokenizer: file or published name; None for the model's.
        text_encoder: name or folder of the T5; None for the model's.
        device: such as ``cpu`` or ``cuda:1``; None for a GPU if there is one.
        dtype: ``float32``, ``bfloat16`` or ``mixed``; None for the model's.
        batch_size: maximum number of images that are generated at a time.
        engine: name in :data:`ENGINES`, or ``module:function`` of a function that builds an engine from this object.
        options: more options of that engine.
        window: see ``SamplingConfig.window``; for the embedded engine. vLLM ignores it.
    """

    source: str
    tokenizer: str | None = None
    text_encoder: str | None = None
    device: str | None = None
    dtype: str | None = None
    batch_size: int = 8
    engine: str = "embedded"
    options: Mapping[str, Any] = field(default_factory=dict)
    window: int | Literal["auto"] = 1
