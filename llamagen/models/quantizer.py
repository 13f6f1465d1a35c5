"""The interface of a quantiser, and how one is built from a configuration (arXiv 2406.06525, section 2.1).

A quantiser turns each vector of the encoder's latent into an integer code, and a code back into a vector. B batch,
E channels of the quantised latent, h × w grid, K codes.
"""

import inspect
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from importlib import import_module
from typing import Any, NamedTuple

from torch import Tensor, nn

from llamagen.finite import not_finite
from llamagen.option_checks import check_integer

MAX_CODES = 2**18
"""Largest number of codes: that of the largest published tokenizers."""
CLASS_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+")


def check_number_of_codes(name: str, size: int) -> None:
    """Check the number of codes before memory is allocated for them.

    Args:
        name: name of the value, for the message.
        size: number of codes.

    Raises:
        ValueError: in one line, if there are too many.
    """
    if size > MAX_CODES:
        raise ValueError(f"{name} is {size}; at most {MAX_CODES:,} codes are supported")


class Quantized(NamedTuple):
    """A quantised latent.

    Attributes:
        quantized: (B, E, h, w) float32, input of the decoder. Its gradient must reach ``latent``, for example by a
            straight-through estimator.
        codes: (B, h, w) int64 in [0, K).
        latent: (B, E, h, w) float32, the latent that was compared with the codes.
        losses: unweighted loss terms, scalars with a gradient. The keys are :attr:`Quantizer.loss_names`.
    """

    quantized: Tensor
    codes: Tensor
    latent: Tensor
    losses: dict[str, Tensor]


class Quantizer(nn.Module, ABC):
    """Base of all quantisers. A subclass implements :meth:`forward`, :meth:`lookup` and, if needed, :attr:`loss_names`.

    Its constructor takes only numbers, strings, booleans, and lists or dicts of them. Checkpoints store these
    arguments, and the quantiser is built from them again.

    Args:
        size: number of codes K, at most :data:`MAX_CODES`.
        dim: channels E of the quantised latent.

    Raises:
        ValueError: in one line, if a number is not a positive integer, or there are too many codes.
    """

    straight_through = True
    """Whether the gradient of the quantised latent passes unchanged to :attr:`Quantized.latent`."""

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        for name, value in (("size", size), ("dim", dim)):
            check_integer(f"{name} of {type(self).__name__}", value)
        check_number_of_codes(f"size of {type(self).__name__}", size)
        self.size = size
        self.dim = dim

    @abstractmethod
    def forward(self, latent: Tensor) -> Quantized:
        """Quantise a latent (B, E, h, w) of any floating-point dtype; autocast may be on."""

    @abstractmethod
    def lookup(self, codes: Tensor) -> Tensor:
        """Quantised latents of codes: (B, h, w) int64 → (B, E, h, w) float32."""

    @property
    def loss_names(self) -> tuple[str, ...]:
        """Names of the losses that :meth:`forward` returns; none by default.

        ``codebook``, ``commitment`` and ``entropy`` are multiplied by their weights in
        :class:`~lightning_modules.vqgan_config.VQGANLossConfig`. Other losses have the weight 1; scale them in
        :meth:`forward`.
        """
        return ()

    def set_loss_weights(self, weights: Mapping[str, float]) -> None:
        """Receive the weights of the losses before training; override it to skip an expensive loss of weight 0."""

    @property
    def residual_scale(self) -> Tensor | float:
        """Size of what this quantiser leaves, relative to its latents; a number or (E, 1, 1).

        :class:`~llamagen.models.quantizers.Residual` divides by it before the next level. 1 if codes learn their size.
        """
        return 1.0

    def residual_input(self, residual: Tensor) -> Tensor:
        """The input of :meth:`forward` whose latent is a scaled residual (B, E, h, w); by default the residual."""
        return residual

    @property
    def learned_codes(self) -> Tensor | None:
        """The parameter (K, …) that holds the codes, which code revival needs; None if codes are not learned."""
        return None

    def move_codes(self, codes: Tensor, latents: Tensor) -> None:
        """Move codes (n,) to latents (n, E), for code revival.

        Raises:
            NotImplementedError: if the quantiser has no learned codes.
        """
        raise NotImplementedError(f"{type(self).__name__} has no learned codes")

    def before_step(self) -> None:
        """Called before the first training batch of each optimizer step; by default nothing.

        A step has several batches if gradients are accumulated. :meth:`after_step` is not called for a step that the
        optimizer skips, so drop here what its batches have left.
        """

    def after_step(self) -> None:
        """Called after each step of the optimizer, on all ranks, for codes that no gradient moves; by default nothing.

        Not called after skipped steps.
        """

    def broken_parts(self, encoding: Quantized) -> dict[str, Tensor]:
        """Find parts of an encoding that are not finite, which makes its codes meaningless.

        Returns:
            For the name of each part a scalar bool tensor, True if the part is not finite.
        """
        return {
            "the encoder's latent": not_finite(encoding.latent).any(),
            "the quantised latent": not_finite(encoding.quantized).any(),
        }


def check_quantizer_spec(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Check the description of a quantiser; nothing is imported.

    Args:
        spec: ``class_path`` and, if the class needs arguments, ``init_args``. All other keys are arguments, too,
            because the command line omits the level ``init_args``.

    Returns:
        ``{"class_path": str, "init_args": dict}``, primitives only.

    Raises:
        ValueError: in one line, if the class path or an argument is invalid.
    """
    arguments = {key: value for key, value in spec.items() if key not in ("class_path", "init_args")}
    path, given = spec.get("class_path"), spec.get("init_args") or {}
    if not isinstance(path, str) or not CLASS_PATH.fullmatch(path):
        raise ValueError(f"quantizer.class_path is {path!r}; give a class as package.module.Name")
    if not isinstance(given, Mapping):
        raise ValueError(f"quantizer.init_args is {given!r}; give the arguments of {path} by name")
    arguments = {**given, **arguments}
    for name, value in arguments.items():
        if not _is_primitive(value):
            raise ValueError(
                f"quantizer.init_args.{name} is {value!r}; give a number, a string, a boolean, or a list or dict of "
                "them, which a checkpoint can hold"
            )
    return {"class_path": path, "init_args": arguments}


def _is_primitive(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(_is_primitive, value))
    if isinstance(value, dict):
        return all(isinstance(key, str) for key in value) and all(map(_is_primitive, value.values()))
    return value is None or isinstance(value, bool | int | float | str)


def build_quantizer(spec: Mapping[str, Any]) -> Quantizer:
    """Build the quantiser that a configuration or a file of weights describes.

    footgun: the class path may come from a downloaded file. The module must be on the Python path, so no code of the
    file runs; but importing a module runs its top-level statements, and only then is the class checked.

    Args:
        spec: description of the quantiser, as returned by :func:`check_quantizer_spec`.

    Raises:
        ValueError: in one line, if the class does not exist, is not a :class:`Quantizer`, or rejects the arguments.
    """
    path, arguments = spec["class_path"], spec["init_args"]
    module, _, name = path.rpartition(".")
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"quantizer.class_path is {path}, which cannot be imported ({error}); give a class of a module on the "
            "Python path"
        ) from error
    if not (isinstance(found, type) and issubclass(found, Quantizer)) or inspect.isabstract(found):
        raise ValueError(
            f"quantizer.class_path is {path}, which is not a quantiser; give a subclass of "
            "llamagen.models.quantizer.Quantizer that defines forward and lookup"
        )
    signature = inspect.signature(found)
    try:
        signature.bind(**arguments)
        return found(**arguments)
    except TypeError as error:
        raise ValueError(
            f"quantizer.init_args is {arguments}, which {path} does not accept ({error}); its arguments are {signature}"
        ) from error
