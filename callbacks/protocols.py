"""What callbacks need from a module and its data. B batch, L codes, C caption positions, D feature width, H × W pixels.

Callbacks never import ``lightning_modules``: a module of another project works with every callback whose protocol it
satisfies. Each callback checks this in ``setup`` by :func:`require`.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn

from llamagen.models.gpt import GPT
from llamagen.models.vqgan import VQGAN
from llamagen.sampling import ImageSampler
from llamagen.text import CaptionEncoder, Cleaning, EncodedCaptions

T = TypeVar("T")


@runtime_checkable
class HasGenerator(Protocol):
    """A module with a generator."""

    @property
    def generator(self) -> nn.Module:
        """The network that is used after training: EMA averages it, and reports and checkpoints describe it."""


@runtime_checkable
class EvaluatesStages(Protocol):
    """A module that evaluates a batch for a given stage."""

    def evaluate(self, batch: Any, stage: str) -> None:
        """Add a batch to the metrics of a stage, which are logged as ``<stage>/…`` at the end of the validation."""


@runtime_checkable
class CountsOperations(Protocol):
    """A module that counts its operations."""

    @property
    def flops_per_sequence(self) -> float:
        """Floating-point operations of a training step for one sequence."""


@runtime_checkable
class CountsCodes(Protocol):
    """A module with a codebook."""

    code_counts: dict[str, Tensor]
    """How often each of K codes was used, over all ranks: (K,) int64 for the last training epoch (``train``) and the
    last validation (``val``)."""


@runtime_checkable
class PredictsCodes(Protocol):
    """A module that predicts codes."""

    nats_by_position: dict[str, Tensor]
    """Cross entropy of each position, over all ranks: (L,) in nats by stage (``val``, ``test``, and ``val_raw`` if the
    raw weights were validated, too)."""


@runtime_checkable
class ReconstructsImages(Protocol):
    """A module that reconstructs images."""

    def reconstruct(self, images: Tensor) -> Tensor:
        """Encode and decode images: (B, 3, H, W) in about [-1, 1] → same shape."""


@runtime_checkable
class TokenizesImages(ReconstructsImages, Protocol):
    """A module whose generator is an image tokenizer."""

    @property
    def generator(self) -> VQGAN:
        """The tokenizer."""


@runtime_checkable
class EncodesCaptions(Protocol):
    """A module that encodes captions."""

    @property
    def encoder(self) -> CaptionEncoder:
        """The text encoder."""


class CaptionOutputs(Protocol):
    """Predictions of a module that encodes captions, for a batch."""

    @property
    def captions(self) -> EncodedCaptions:
        """Features of the captions."""

    @property
    def short_captions(self) -> EncodedCaptions | None:
        """Features of their first sentences, if the data has these."""


@runtime_checkable
class SamplesImages(Protocol):
    """A module that samples images."""

    device: torch.device

    def check_requests(self, classes: Sequence[int], prompts: Sequence[str] = ()) -> None:
        """Raise a ``ValueError`` if images of these classes or prompts cannot be sampled."""

    def batch_condition(self, batch: dict[str, Any]) -> Any:
        """Condition of a batch: ``features``, (B,) classes or (B, C, D) padded on the left, and ``lengths`` (B,)."""

    def sample(
        self, condition: Tensor, indices: Tensor, seed: int, caption_lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Conditions and sample numbers (B,) → images (B, H, W, 3) uint8 and codes (B, L)."""


@runtime_checkable
class KeepsSampler(Protocol):
    """A module that keeps an image sampler."""

    sampling: Any
    """Dataclass of the sampling settings."""
    sampler: ImageSampler | None
    """Used by all calls of the module while it is set."""
    can_sample: bool
    """Whether there is a tokenizer to decode codes."""

    @property
    def generator(self) -> GPT:
        """The autoregressive model."""

    def build_sampler(self, batch_size: int, compiled: bool = False, int8: bool = False) -> ImageSampler:
        """A new sampler."""


@runtime_checkable
class PredictsImages(Protocol):
    """A module whose predict step samples images."""

    sampling: Any
    """Dataclass of the sampling settings: with label or prompt, index and seed they determine an image."""
    sample_seed: int
    image_size: int | None
    """Side in pixels to which images are resized."""

    @property
    def generator(self) -> nn.Module:
        """The model that samples codes."""

    @property
    def tokenizer_checksum(self) -> str | None:
        """Checksum of the tokenizer that decodes the codes."""

    @property
    def caption_metadata(self) -> dict[str, Any]:
        """The text encoder, as primitives by name; empty without one."""


@runtime_checkable
class GeneratesImages(SamplesImages, KeepsSampler, PredictsImages, Protocol):
    """A module that generates images from classes or captions."""

    @property
    def output_size(self) -> int:
        """Side of the images in pixels. Raises a ``ValueError`` without a tokenizer."""

    @property
    def num_classes(self) -> int:
        """Number of classes of the model."""

    @property
    def needs_captions(self) -> bool:
        """Whether the model's condition is text."""


@runtime_checkable
class HasImageSize(Protocol):
    """A DataModule with images of one size."""

    image_size: int
    """Side of the images in pixels."""


@runtime_checkable
class CleansCaptions(Protocol):
    """A DataModule that can clean its captions."""

    @property
    def cleaning(self) -> Cleaning | None:
        """Cleaning of the captions, see :func:`llamagen.text.clean_caption`; None if they are not cleaned."""


@runtime_checkable
class ImageRequests(Protocol):
    """A DataModule that requests images, such as ClassRequestDataModule or PromptDataModule."""

    label_name: str
    """What labels are: ``class`` for classes, ``prompt`` for numbers of prompts."""
    labels: np.ndarray
    """Label of each image, (N,) int64, including images that exist already."""
    prompts: list[str] | None
    """Prompts by label; None if labels are classes."""
    batch_size: int

    @property
    def left(self) -> int:
        """Number of images that remain to be sampled."""

    def leave_out(self, done: Iterable[int]) -> None:
        """Request all images except these indices."""


@runtime_checkable
class PromptRequests(ImageRequests, Protocol):
    """A DataModule that requests images of prompts, such as PromptDataModule."""

    prompts: list[str]
    columns: list[dict[str, str]]
    """Further columns of each prompt's row in a table."""


@runtime_checkable
class ShardableData(Protocol):
    """A DataModule whose splits can be read in pieces, such as ImageDataModule or CaptionDataModule."""

    predict_splits: Sequence[str]
    datasets: Mapping[str, Any]
    tallies: Mapping[str, Any]
    class_names: list[str]
    max_bad_share: float

    def fingerprint(self, split: str) -> str:
        """Checksum of the examples of a split and their order."""

    def plan_shards(self, split: str, samples_per_shard: int, done: Collection[int]) -> None:
        """Read a split in pieces of ``samples_per_shard`` examples, except the pieces with the numbers ``done``."""


@runtime_checkable
class ShardableImages(ShardableData, HasImageSize, Protocol):
    """A DataModule of images, such as ImageDataModule."""

    view_names: list[str]


@runtime_checkable
class ShardableCaptions(ShardableData, CleansCaptions, Protocol):
    """A DataModule of captions, such as CaptionDataModule."""

    short_captions: bool
    source_meta: dict[str, Any]

    @property
    def has_codes(self) -> bool:
        """Whether the examples come from a dataset of codes."""


def datamodule(trainer: pl.Trainer) -> object:
    """The DataModule of a trainer, None if it has only loaders. Lightning does not declare this attribute."""
    return getattr(trainer, "datamodule", None)


def missing_members(protocol: type[Any], instance: object) -> list[str]:
    """Names that a protocol declares and an instance lacks, sorted.

    Footgun: ``isinstance`` of a runtime-checkable protocol evaluates properties, and some of them raise (without a
    tokenizer there is no ``output_size``). This function looks at the class first, where they are not evaluated.
    """
    names = set[str]()
    for base in protocol.__mro__:
        if base not in (object, Protocol, Generic):
            names.update(vars(base), base.__annotations__)
    public = sorted(name for name in names if not name.startswith("_"))
    return [name for name in public if not (hasattr(type(instance), name) or hasattr(instance, name))]


def optional(protocol: type[T], instance: object) -> T | None:
    """The instance if it satisfies a protocol, else None.

    Only the presence of attributes and methods is checked.
    """
    return None if missing_members(protocol, instance) else instance  # type: ignore[return-value]


def require(protocol: type[T], instance: object, who: object, remedy: str = "") -> T:
    """Return the instance if it satisfies a protocol, else raise an error.

    Args:
        protocol: one of this file; the first line of its docstring is part of the message.
        instance: a module or DataModule.
        who: the callback that needs it, or its name.
        remedy: remedy in the message; by default removing the callback, or using other data.

    Raises:
        ValueError: in one line with the missing members, if it does not.
    """
    missing = missing_members(protocol, instance)
    if not missing:
        return instance  # type: ignore[return-value]
    name = who if isinstance(who, str) else type(who).__name__
    need = str(protocol.__doc__).splitlines()[0].rstrip(".")
    found = "there is none" if instance is None else f"{type(instance).__name__} has no {', '.join(missing)}"
    if not remedy:
        of_data = need.startswith("A DataModule")
        remedy = "change data.class_path" if of_data else f"remove {name} from trainer.callbacks"
    raise ValueError(f"{name} needs {need[0].lower()}{need[1:]}, but {found}; {remedy}")
