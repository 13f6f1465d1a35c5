"""The rows of the next step: the guidance scales that the model reads, and the noise that samples codes."""

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from llamagen.sampling.logits import filter_logits
from llamagen.sampling.noise import gumbel, seed_tensor
from serving.vllm.settings import RequestSettings


class StepScales:
    """Guidance scale of each row of logits of the next step.

    Attributes:
        conditions: (S,) int64, number of condition tokens of the request in each slot of the V2 model runner.
    """

    def __init__(self) -> None:
        self._scales: Sequence[float] | Tensor = ()
        self.conditions = torch.empty(0, dtype=torch.int64)

    def set(self, scales: Sequence[float] | Tensor) -> None:
        """Set the scales, (R,), before the model runs."""
        self._scales = scales

    def rows(self, count: int, device: torch.device) -> Tensor:
        """Scales (R,) float32 for ``count`` rows; rows without a request, as in warm-up, are not guided."""
        if isinstance(self._scales, Tensor):
            scales = self._scales[:count]
            return torch.cat([scales, scales.new_ones(count - len(scales))])
        scales_list = list(self._scales[:count])
        scales_list += [1.0] * (count - len(scales_list))
        return torch.tensor(scales_list, dtype=torch.float32, device=device)


@cache
def step_scales() -> StepScales:
    """The scales of this process: a worker has one model, and all its parts are built by vLLM, which passes nothing."""
    return StepScales()


class Row:
    """The request in a row of the batch: its settings and random seed.

    Args:
        settings: settings of the request.
        length: L, number of codes of an image.
    """

    def __init__(self, settings: RequestSettings, length: int) -> None:
        self.settings, self.length = settings, length
        self.seed = int(seed_tensor(settings.seed))
        self.scales = settings.sampling.guidance_scales(length)

    def scale(self, step: int) -> float:
        """Guidance scale of code ``step``."""
        return self.scales[min(step, self.length - 1)]


def add_noise(logits: Tensor, rows: dict[int, Row], steps: dict[int, int] | Tensor, counters: Tensor) -> Tensor:
    """Apply temperature, top-k and top-p of each row and add its Gumbel noise: the largest sum is the sampled code.

    Args:
        logits: (R, W) float32 with W ≥ V, changed in place. Columns from V on are not codes.
        rows: requests by row; others stay as they are.
        steps: index of the code that each row samples: by row, or (R,) int64.
        counters: (V,) int64, see :func:`~llamagen.sampling.noise.code_counters`.

    Returns:
        ``logits``.
    """
    groups: dict[tuple[float, int, float], list[int]] = {}
    for row, request in rows.items():
        sampling = request.settings.sampling
        if sampling.temperature > 0.0 and row < len(logits):
            groups.setdefault((sampling.temperature, sampling.top_k, sampling.top_p), []).append(row)
    codes, device = len(counters), logits.device
    for (temperature, top_k, top_p), members in groups.items():
        index = torch.tensor(members, device=device)
        part = logits[index, :codes]
        # footgun: without the clamp, a row that is −inf because its logits were not finite would become NaN.
        largest = part.amax(dim=-1, keepdim=True).clamp(min=torch.finfo(part.dtype).min)
        part = (part - largest) / temperature
        seeds = torch.tensor([rows[row].seed for row in members], device=device)
        numbers = torch.tensor([rows[row].settings.index for row in members], device=device)
        own = (
            steps[index] if isinstance(steps, Tensor) else torch.tensor([steps[row] for row in members], device=device)
        )
        logits[index, :codes] = filter_logits(part, top_k, top_p) + gumbel(seeds, numbers, own, counters)
    return logits
