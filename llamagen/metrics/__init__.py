"""``torchmetrics.Metric``s."""

from llamagen.metrics.codebook import CodebookStatistics, CodebookUsage
from llamagen.metrics.frechet import FrechetDistance, frechet_distance
from llamagen.metrics.inception import Inception, InceptionNet
from llamagen.metrics.prediction import CodePrediction, PredictionStatistics

__all__ = [
    "CodePrediction",
    "CodebookStatistics",
    "CodebookUsage",
    "FrechetDistance",
    "Inception",
    "InceptionNet",
    "PredictionStatistics",
    "frechet_distance",
]
