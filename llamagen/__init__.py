"""LlamaGen (arXiv 2406.06525) in plain PyTorch: models, losses, sampling and metrics. Never imports Lightning.

``from llamagen import LlamaGen`` loads a trained model and generates images.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llamagen.pretrained.model import LlamaGen

__all__ = ["LlamaGen"]


def __getattr__(name: str) -> Any:
    if name == "LlamaGen":  # imported at first use: most modules of this package need only a few others
        from llamagen.pretrained.model import LlamaGen

        return LlamaGen
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
