"""Settings of sampling: temperature, top-k, top-p and guidance."""

from dataclasses import asdict, dataclass, fields, replace
from math import cos, pi
from numbers import Integral, Real
from typing import Any, Literal

from llamagen.option_checks import check_integer

Schedule = Literal["constant", "linear", "cosine", "power_cosine"]
Window = int | Literal["auto"]


@dataclass(frozen=True)
class SamplingConfig:
    """Settings of sampling. The defaults sample from the model's own distribution, without guidance.

    Args:
        temperature: logits are divided by it; 0 is greedy and takes the most likely code.
        top_k: keep the k most likely codes; 0 keeps all.
        top_p: keep the most likely codes whose probabilities add up to this; 1 keeps all.
        guidance_scale: s in ``unconditional + s · (conditional − unconditional)``; 1 means no guidance and halves the
            computation.
        guidance_steps: index of the first code that is no longer guided; None guides all codes to the end.
        guidance_start: index of the first code that is guided.
        guidance_schedule: guidance scale at code t of L: ``constant`` is s everywhere; ``linear`` is
            ``1 + (s − 1) t / L`` (Muse, arXiv 2301.00704, section 2.7); ``cosine`` is
            ``1 + (s − 1) (1 − cos(π t / L)) / 2``; ``power_cosine`` is the same with ``(t / L) ** guidance_power``
            instead of ``t / L`` (MDT, arXiv 2303.14389; RAR, arXiv 2411.00776).
        guidance_power: exponent of ``power_cosine``; with a larger one guidance sets in later.
        window: number of codes of an image that a pass may decide. It changes the speed and not the image: see
            :mod:`llamagen.sampling.windows`. 1 decides one code in each pass; ``auto`` chooses it for each pass, from
            measured times and from how many guesses were right.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    guidance_scale: float = 1.0
    guidance_steps: int | None = None
    guidance_start: int = 0
    guidance_schedule: Schedule = "constant"
    guidance_power: float = 4.0
    window: Window = 1

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            ValueError: if an option is out of range.
        """
        for name in ("temperature", "top_p", "guidance_scale", "guidance_power"):
            if isinstance(value := getattr(self, name), bool) or not isinstance(value, Real):
                raise ValueError(f"{name} is {value!r}; it must be a number")
        for name in ("top_k", "guidance_start", "guidance_steps"):
            value = getattr(self, name)
            if (isinstance(value, bool) or not isinstance(value, Integral)) and (value, name) != (
                None,
                "guidance_steps",
            ):
                raise ValueError(f"{name} is {value!r}; it must be an integer")
        if not 0.0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}; it must be 0 (greedy) or a positive number")
        if not self.top_k >= 0:
            raise ValueError(f"top_k is {self.top_k}; it must be 0 (off) or the number of codes to keep")
        check_integer("top_k", self.top_k, 0)
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p is {self.top_p}; it must be above 0 and at most 1 (off)")
        if not 0.0 <= self.guidance_scale < float("inf"):
            raise ValueError(f"guidance_scale is {self.guidance_scale}; it must be at least 0, and 1 is off")
        if self.guidance_steps is not None:
            check_integer("guidance_steps", self.guidance_steps, 0)
        check_integer("guidance_start", self.guidance_start, 0)
        if self.guidance_schedule not in ("constant", "linear", "cosine", "power_cosine"):
            raise ValueError(
                f"guidance_schedule is {self.guidance_schedule!r}; it must be constant, linear, cosine or power_cosine"
            )
        if self.window != "auto":
            if isinstance(self.window, str):
                raise ValueError(f"window is {self.window!r}; it must be a number of codes or auto")
            check_integer("window", self.window, 1)
            object.__setattr__(self, "window", int(self.window))  # NumPy integers are not ``int``
        if not 0.0 < self.guidance_power < float("inf"):
            raise ValueError(f"guidance_power is {self.guidance_power}; it must be positive")

    def image_settings(self) -> dict[str, Any]:
        """The fields in :data:`IMAGE_SETTINGS`: those that belong in requests, plans and records of images."""
        return {name: value for name, value in asdict(self).items() if name in IMAGE_SETTINGS}

    def one_code_a_pass(self, refusal: str) -> "SamplingConfig":
        """These settings with ``window`` 1, for sampling that cannot use windows; ``auto`` means 1 there.

        Args:
            refusal: why not, and what to do: the end of the message after the window.

        Raises:
            ValueError: in one line, if a window is set.
        """
        if self.window not in (1, "auto"):
            raise ValueError(f"window is {self.window}, but {refusal}")
        return replace(self, window=1)

    def guidance_scales(self, length: int) -> list[float]:
        """Guidance scale at each of ``length`` codes; 1 means no guidance."""
        stop = length if self.guidance_steps is None else min(self.guidance_steps, length)
        return [
            1.0 + (self.guidance_scale - 1.0) * self._rise(step / length) if self.guidance_start <= step < stop else 1.0
            for step in range(length)
        ]

    def guided_steps(self, length: int) -> int:
        """Number of codes, counted from the first of ``length``, that need the unconditional branch."""
        scales = self.guidance_scales(length)
        return max((step + 1 for step, scale in enumerate(scales) if scale != 1.0), default=0)

    def _rise(self, progress: float) -> float:
        """Fraction of ``guidance_scale − 1`` that applies after this fraction of the codes."""
        if self.guidance_schedule == "constant":
            return 1.0
        if self.guidance_schedule == "linear":
            return progress
        power = self.guidance_power if self.guidance_schedule == "power_cosine" else 1.0
        return (1.0 - cos(pi * progress**power)) / 2.0


IMAGE_SETTINGS = tuple(each.name for each in fields(SamplingConfig) if each.name != "window")
"""Names of the settings that an image depends on. ``window`` changes only the speed."""
