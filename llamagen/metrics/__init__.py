"""``torchmetrics.Metric``s."""

from llamagen.metrics.codebook import CodebookUsage

__all__ = ["CodebookUsage"]
