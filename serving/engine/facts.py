"""What the front of a server needs to know of a model. Plain data, which processes and machines exchange."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from llamagen.class_names import ClassNames
from llamagen.sampling import IMAGE_SETTINGS, SamplingConfig

if TYPE_CHECKING:  # the front of a server imports no models
    from llamagen import LlamaGen

Kind = Literal["class", "text", "tokenizer"]


@dataclass(frozen=True)
class ModelFacts:
    """A loaded model.

    Attributes:
        name: name of the model.
        kind: what it generates images of; ``tokenizer`` for one that only reconstructs.
        description: one line for people: name, parameters, size, precision.
        dtype: ``float32``, ``bfloat16`` or ``mixed``.
        device: device of the model, such as ``cpu`` or ``cuda:1``.
        batch_size: images that are generated at a time.
        downsampling: pixels per code in each direction.
        codebook_size: number of codes of the tokenizer.
        resolution: side of the images in pixels; None for a tokenizer.
        grid: height and width of the grid of codes of an image; None for a tokenizer.
        classes: names of the classes, by number; empty for other models.
        sampling: default settings of sampling, all of :data:`~llamagen.sampling.config.IMAGE_SETTINGS`.
        parameters: number of parameters of the autoregressive model; None for a tokenizer, or if unknown.
        class_ids: another name of each class, such as the name of its folder; empty if there are none.
        can_inpaint: whether any codes of a given image can be kept, and not only its upper rows.
    """

    name: str
    kind: Kind
    description: str
    dtype: str
    device: str
    batch_size: int
    downsampling: int
    codebook_size: int
    resolution: int | None = None
    grid: int | None = None
    classes: tuple[str, ...] = ()
    sampling: Mapping[str, Any] = field(default_factory=dict)
    parameters: int | None = None
    class_ids: tuple[str, ...] = ()
    can_inpaint: bool = False

    @classmethod
    def from_model(cls, model: "LlamaGen") -> "ModelFacts":
        """Describe a loaded model."""
        names = model.class_names
        return cls(
            name=model.name,
            kind=model.condition or "tokenizer",
            description=repr(model),
            dtype=str(model.dtype),
            device=str(model.device),
            batch_size=model.batch_size,
            downsampling=model.tokenizer.config.downsampling,
            codebook_size=model.tokenizer.config.codebook_size,
            resolution=model.resolution,
            grid=None if model.gpt is None else model.gpt.config.grid_size,
            classes=() if names is None else names.names,
            sampling=model.sampling.image_settings(),
            parameters=None if model.gpt is None else sum(each.numel() for each in model.gpt.parameters()),
            class_ids=() if names is None or names.ids is None or names.ids == names.names else names.ids,
            can_inpaint=model.gpt is not None and model.gpt.config.target_aware,
        )

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "ModelFacts":
        """Read :meth:`to_json`. Fields of newer versions are ignored."""
        known = {each.name: values[each.name] for each in fields(cls) if each.name in values}
        return cls(**{**known, **{name: tuple(known.get(name, ())) for name in ("classes", "class_ids")}})

    def to_json(self) -> dict[str, Any]:
        """All fields, for JSON."""
        return asdict(self)

    @cached_property
    def class_names(self) -> ClassNames:
        """Names of the classes, which are found by their ids, too."""
        return ClassNames(self.classes, self.class_ids or None)

    def settings(self, given: Mapping[str, Any]) -> SamplingConfig:
        """Settings of sampling: the given ones, and the model's for the others.

        Raises:
            ValueError: in one line, if there is no such setting, or a value is out of range.
        """
        if unknown := sorted(set(given) - set(IMAGE_SETTINGS)):
            raise ValueError(
                f"there is no setting {unknown[0]!r:.60} of sampling; the settings are {', '.join(IMAGE_SETTINGS)}"
            )
        return replace(SamplingConfig(**self.sampling), **given)
