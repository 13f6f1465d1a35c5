"""The one data layer that both modules share.

Its DataModules are imported when they are asked for: a worker process that reads examples needs none of them, and with
them Lightning, which takes several times as long to import as all the rest.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datamodules.captions import CaptionDataModule
    from datamodules.class_requests import ClassRequestDataModule
    from datamodules.codes import CodeDataModule
    from datamodules.digits import DigitsDataModule
    from datamodules.images import ImageDataModule
    from datamodules.prompts import PromptDataModule

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
    "PromptDataModule": "prompts",
    "ClassRequestDataModule": "class_requests",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
