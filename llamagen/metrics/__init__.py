"""Metrics (``torchmetrics.Metric``s) and feature extractors."""

from llamagen.metrics.classifier import Classifier, SmallClassifier
from llamagen.metrics.codebook import CodebookStatistics, CodebookUsage
from llamagen.metrics.features import Features, extract, extractor_checksum, extractor_name
from llamagen.metrics.frechet import FID, SFID, frechet_distance
from llamagen.metrics.inception import Inception, InceptionNet
from llamagen.metrics.inception_score import InceptionScore, SplitStatistics
from llamagen.metrics.kernel_distance import KID
from llamagen.metrics.precision_recall import PrecisionRecall, PrecisionRecallStatistics, precision_recall
from llamagen.metrics.prediction import CodePrediction, PredictionStatistics

__all__ = [
    "Classifier",
    "CodePrediction",
    "CodebookStatistics",
    "CodebookUsage",
    "FID",
    "Features",
    "Inception",
    "InceptionNet",
    "InceptionScore",
    "KID",
    "PrecisionRecall",
    "PrecisionRecallStatistics",
    "PredictionStatistics",
    "SFID",
    "SmallClassifier",
    "SplitStatistics",
    "extract",
    "extractor_checksum",
    "extractor_name",
    "frechet_distance",
    "precision_recall",
]
