"""Callbacks: EMA, compiled sampling, FID, grids, curves, checkpoints, signals, and writers for ``predict``."""

from callbacks.checkpoints import BestCheckpoint, LastCheckpoint, StepCheckpoint
from callbacks.codebook import CodebookHistogram
from callbacks.compiled_sampling import CompiledSampling
from callbacks.curves import LearningCurves
from callbacks.ema import EMA
from callbacks.fid import FIDMonitor
from callbacks.grids import ReconstructionGrid, SampleGrid
from callbacks.positions import PositionLoss
from callbacks.progress import SamplingProgress
from callbacks.requeue import Requeue
from callbacks.stopping import StopOnSignal
from callbacks.throughput import Throughput
from callbacks.writers.codes import CodeWriter
from callbacks.writers.features import FeatureWriter
from callbacks.writers.images import ImageWriter

__all__ = [
    "EMA",
    "BestCheckpoint",
    "CodeWriter",
    "CodebookHistogram",
    "CompiledSampling",
    "FIDMonitor",
    "FeatureWriter",
    "ImageWriter",
    "LastCheckpoint",
    "LearningCurves",
    "PositionLoss",
    "ReconstructionGrid",
    "Requeue",
    "SampleGrid",
    "SamplingProgress",
    "StepCheckpoint",
    "StopOnSignal",
    "Throughput",
]
