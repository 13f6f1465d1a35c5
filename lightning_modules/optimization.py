"""AdamW and its learning rate, for both modules."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from llamagen.option_checks import check_integer, check_not_negative


@dataclass(frozen=True)
class AdamWConfig:
    """AdamW with a constant learning rate, as in the paper, or a cosine decay, after an optional linear warmup.

    Args:
        lr: learning rate.
        betas: decay rates of the first and second moments.
        weight_decay: applied to tensors of two or more dimensions only.
        warmup_steps: optimizer steps over which the rate grows from ``lr / warmup_steps`` to ``lr``; 0 for none.
        schedule: after the warmup: ``constant``, or ``cosine``, a decay to ``final_lr`` at the end of the run.
        final_lr: rate at the end of the cosine; unused for ``constant``.
    """

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.05
    warmup_steps: int = 0
    schedule: Literal["constant", "cosine"] = "constant"
    final_lr: float = 0.0

    def __post_init__(self) -> None:
        """Check the ranges of all values."""
        if not 0.0 < self.lr < math.inf:
            raise ValueError(f"lr is {self.lr}; it must be positive{' and finite' if self.lr == math.inf else ''}")
        if len(self.betas) != 2 or not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ValueError(f"betas are {self.betas}; they must be two, and each must be at least 0 and below 1")
        check_not_negative("weight_decay", self.weight_decay)
        check_integer("warmup_steps", self.warmup_steps, 0)
        if self.schedule not in ("constant", "cosine"):
            raise ValueError(f"schedule is {self.schedule!r}; it must be constant or cosine")
        if not 0.0 <= self.final_lr <= self.lr:
            raise ValueError(f"final_lr is {self.final_lr}; it must be between 0 and lr, {self.lr}")

    def rate(self, step: int, total_steps: float) -> float:
        """Learning rate of a step.

        Args:
            step: optimizer step, from 0.
            total_steps: steps of the run; may be infinite for ``constant``.
        """
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return self.lr
        done = min(1.0, (step - self.warmup_steps) / max(1.0, total_steps - self.warmup_steps))
        return self.final_lr + (self.lr - self.final_lr) * 0.5 * (1.0 + math.cos(math.pi * done))


def build_adamw(
    networks: Iterable[nn.Module], config: AdamWConfig, total_steps: float = math.inf, fused: bool = False
) -> dict[str, Any]:
    """One AdamW over several networks, in the form that ``configure_optimizers`` returns.

    Args:
        networks: networks whose trainable parameters are optimised.
        config: settings of AdamW.
        total_steps: optimizer steps of the run, for ``cosine``.
        fused: update all parameters in one kernel. footgun: not with a GradScaler, which leaves unscaling to a fused
            optimizer, so that clipping would see scaled gradients.

    Returns:
        The optimizer, with two groups for each network (with and without weight decay), and its schedule per step.

    Raises:
        ValueError: if the schedule is ``cosine`` and the run has no end.
    """
    if config.schedule == "cosine" and math.isinf(total_steps):
        raise ValueError("schedule is cosine, which needs the length of the run; set max_epochs or max_steps")
    groups = []
    for network in networks:
        parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
        groups += [
            {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ]
    groups = [group for group in groups if group["params"]]
    optimizer = AdamW(groups, lr=config.lr, betas=config.betas, fused=fused)

    def factor(step: int) -> float:
        return config.rate(step, total_steps) / config.lr

    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}}
