"""The optimizer of both modules."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR


@dataclass(frozen=True)
class AdamWConfig:
    """AdamW with a constant learning rate, as in the paper, after an optional linear warmup.

    Args:
        lr: learning rate.
        betas: decay of the first and second moments.
        weight_decay: on tensors of two and more dimensions only.
        warmup_steps: optimizer steps over which the rate grows from ``lr / warmup_steps`` to ``lr``; 0 for none.
    """

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.05
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        """Refuse values without a meaning."""
        if self.lr <= 0:
            raise ValueError(f"lr is {self.lr}; it must be positive")
        if not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ValueError(f"betas are {self.betas}; each must be at least 0 and below 1")
        if self.weight_decay < 0 or self.warmup_steps < 0:
            raise ValueError(
                f"weight_decay is {self.weight_decay} and warmup_steps {self.warmup_steps}; both must be at least 0"
            )


def build_adamw(networks: Iterable[nn.Module], config: AdamWConfig) -> dict[str, Any]:
    """One AdamW over several networks, in the form that ``configure_optimizers`` returns.

    Args:
        networks: whose trainable parameters to optimise.
        config: its settings.

    Returns:
        The optimizer, with a group for decayed and one for other parameters of each network, and its schedule by step.
    """
    groups = []
    for network in networks:
        parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
        groups += [
            {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ]
    optimizer = AdamW([group for group in groups if group["params"]], lr=config.lr, betas=config.betas)

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0

    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}}
