"""The one data layer that both modules share."""

from datamodules.captions import CaptionDataModule
from datamodules.codes import CodeDataModule
from datamodules.digits import DigitsDataModule
from datamodules.images import ImageDataModule
from datamodules.prompts import PromptDataModule
from datamodules.samples import SampleDataModule

__all__ = [
    "CaptionDataModule",
    "CodeDataModule",
    "DigitsDataModule",
    "ImageDataModule",
    "PromptDataModule",
    "SampleDataModule",
]
