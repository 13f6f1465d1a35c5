"""``torchmetrics.Metric``s."""

from llamagen.metrics.codebook import CodebookStatistics, CodebookUsage
from llamagen.metrics.frechet import FrechetDistance, frechet_distance

__all__ = ["CodebookStatistics", "CodebookUsage", "FrechetDistance", "frechet_distance"]
