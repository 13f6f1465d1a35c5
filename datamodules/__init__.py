"""The data layer: images, captions and codes for training, and requests for sampling.

The DataModules are imported on first access. A worker process that reads examples needs neither them nor Lightning,
whose import takes several times as long as everything else.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datamodules.captions import CaptionDataModule
    from datamodules.codes import CodeDataModule
    from datamodules.digits import DigitsDataModule
    from datamodules.images import ImageDataModule
    from datamodules.requests.classes import ClassRequestDataModule
    from datamodules.requests.prompts import PromptDataModule

__all__ = [
    "CaptionDataModule",
    "CodeDataModule",
    "DigitsDataModule",
    "ImageDataModule",
    "PromptDataModule",
    "ClassRequestDataModule",
]

_MODULES = {
    "CaptionDataModule": "captions",
    "CodeDataModule": "codes",
    "DigitsDataModule": "digits",
    "ImageDataModule": "images",
    "PromptDataModule": "requests.prompts",
    "ClassRequestDataModule": "requests.classes",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
