"""How codes are drawn from the model's logits."""

from dataclasses import dataclass


@dataclass(frozen=True)
class SamplingConfig:
    """Settings of a draw. The defaults draw from the model's own distribution, without guidance.

    Args:
        temperature: logits are divided by it; 0 always takes the most likely code.
        top_k: keep the k most likely codes; 0 keeps all.
        top_p: keep the most likely codes whose probabilities add up to this; 1 keeps all.
        guidance_scale: s in ``unconditional + s · (conditional − unconditional)``; 1 is without guidance and needs half
            the computation.
        guidance_steps: guide only the first so many codes, then go on with the conditional branch alone; all of them,
            if not given.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    guidance_scale: float = 1.0
    guidance_steps: int | None = None

    def __post_init__(self) -> None:
        """Refuse values without a meaning."""
        if not 0.0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}; it must be 0 (greedy) or a positive number")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}; it must be 0 (off) or the number of codes to keep")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p is {self.top_p}; it must be above 0 and at most 1 (off)")
        if not 0.0 <= self.guidance_scale < float("inf"):
            raise ValueError(f"guidance_scale is {self.guidance_scale}; it must be at least 0, and 1 is off")
        if self.guidance_steps is not None and self.guidance_steps < 0:
            raise ValueError(f"guidance_steps is {self.guidance_steps}; it must be at least 0")

    def guided_steps(self, length: int) -> int:
        """Of ``length`` codes, how many need the unconditional branch; they are the first."""
        if self.guidance_scale == 1.0:
            return 0
        return length if self.guidance_steps is None else min(self.guidance_steps, length)
