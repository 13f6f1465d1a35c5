"""Settings of the autoregressive model's loss."""

from dataclasses import dataclass

from llamagen.option_checks import check_not_negative


@dataclass(frozen=True)
class ARGenLossConfig:
    """Terms added to the cross entropy; the paper has none.

    Args:
        label_smoothing: fraction of the target probability that is spread over all codes.
        z_loss: weight of the squared logarithm of the partition function, which keeps logits small (PaLM: 1e-4).
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0

    def __post_init__(self) -> None:
        """Check the ranges of all values."""
        if not 0.0 <= self.label_smoothing < 1.0:
            raise ValueError(f"label_smoothing is {self.label_smoothing}; it must be at least 0 and below 1")
        check_not_negative("z_loss", self.z_loss)
