"""Settings of a request to vLLM: ``extra_args["llamagen"]``, a mapping or JSON. No vLLM here."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from llamagen.option_checks import check_integer
from llamagen.sampling import IMAGE_SETTINGS, SamplingConfig

KEY = "llamagen"
"""Name of the settings among the extra arguments of a request."""
SETTINGS = ("seed", "index", *IMAGE_SETTINGS)
MAX_MESSAGE = 300
"""Maximum length of an error message, which may quote what a client sent."""


@dataclass(frozen=True)
class RequestSettings:
    """How the codes of one image are sampled.

    Attributes:
        sampling: temperature, top-k, top-p and guidance.
        seed: seed of the run, any integer.
        index: index of the image within the run, from 0 to 2⁶³ − 1.
    """

    sampling: SamplingConfig
    seed: int = 0
    index: int = 0

    @classmethod
    def from_extra_args(cls, extra_args: Mapping[str, Any] | None) -> "RequestSettings":
        """Read and check the settings of a request.

        Args:
            extra_args: extra arguments of the request (``vllm_xargs`` over HTTP). Their entry ``llamagen`` is a mapping
                of :data:`SETTINGS`, or the same as JSON; the defaults are those of
                :func:`~llamagen.sampling.generate`. A ``window``, as the settings of a model may have, has no effect:
                vLLM decides one code of an image in each pass.

        Raises:
            ValueError: in one line, if a setting is unknown or invalid.
        """
        try:
            given = dict(_as_mapping((extra_args or {}).get(KEY)))
            if unknown := [name for name in given if name not in (*SETTINGS, "window")]:
                raise ValueError(f"there is no setting {unknown[0]!r}; the settings are {', '.join(SETTINGS)}")
            seed, index = given.pop("seed", 0), given.pop("index", 0)
            if isinstance(seed, bool) or not isinstance(seed, int):
                raise ValueError(f"seed is {seed!r}; it must be an integer")
            check_integer("index", index, 0, 2**63 - 1)
            return cls(replace(SamplingConfig(**given), window=1), seed, int(index))
        except (ValueError, TypeError, RecursionError) as error:
            message = " ".join(f"{KEY}: {error}".split())
            raise ValueError(message if len(message) <= MAX_MESSAGE else f"{message[:MAX_MESSAGE]} …") from None

    def extra_args(self) -> dict[str, Any]:
        """The extra arguments of a request with these settings."""
        return {KEY: {"seed": self.seed, "index": self.index, **self.sampling.image_settings()}}


def _as_mapping(given: Any) -> Mapping[str, Any]:
    if given is None:
        return {}
    if isinstance(given, str):  # over HTTP, vllm_xargs has no nested values
        try:
            given = json.loads(given)
        except ValueError as error:
            raise ValueError(f"the settings are not valid JSON ({error})") from error
    if not isinstance(given, Mapping):
        raise ValueError(f"the settings are {given!r}; give a mapping, or one as JSON")
    return given


def check_guidance(settings: RequestSettings, guided: bool) -> None:
    """Check that a model can do the guidance of a request.

    Args:
        settings: settings of the request.
        guided: whether the model has the unconditional branch.

    Raises:
        ValueError: in one line, if it cannot.
    """
    if settings.sampling.guidance_scale != 1.0 and not guided:
        raise ValueError(
            f"guidance_scale is {settings.sampling.guidance_scale}, but the model was exported with --unguided; set it "
            "to 1, or export the model without --unguided"
        )


def check_vllm_parameters(temperature: float, filters: Mapping[str, tuple[Any, Any]]) -> None:
    """Check that vLLM's own parameters leave the sampling to the settings.

    Args:
        temperature: vLLM's temperature.
        filters: vLLM's own parameters that change logits, and the value at which each is off.

    Raises:
        ValueError: in one line, if they do not.
    """
    if temperature != 0:
        raise ValueError(
            f"temperature is {temperature}; set it to 0 and give the temperature of sampling as a setting in {KEY}"
        )
    for name, (value, off) in filters.items():
        if value != off:
            raise ValueError(f"{name} is {value!r:.60}; leave it out, vLLM's own sampling is not used")
