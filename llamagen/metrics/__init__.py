"""``torchmetrics.Metric``s."""

from llamagen.metrics.codebook import CodebookStatistics, CodebookUsage
from llamagen.metrics.frechet import FrechetDistance, frechet_distance
from llamagen.metrics.prediction import CodePrediction, PredictionStatistics

__all__ = [
    "CodePrediction",
    "CodebookStatistics",
    "CodebookUsage",
    "FrechetDistance",
    "PredictionStatistics",
    "frechet_distance",
]
