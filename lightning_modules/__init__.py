"""Training logic of the two models, the frozen caption encoder, and extensions of Lightning for their runs."""

from lightning_modules.argen import ARGenModule
from lightning_modules.argen_config import ARGenLossConfig
from lightning_modules.base import models_on_meta_device
from lightning_modules.captions import CaptionModule
from lightning_modules.checkpoint_files import CheckpointFiles
from lightning_modules.generation_order import GenerationOrder
from lightning_modules.latest_checkpoint import resolve_checkpoint
from lightning_modules.metrics_file import use_metrics_logger
from lightning_modules.optimization import AdamWConfig
from lightning_modules.sharded_strategy import ShardedStrategy
from lightning_modules.vqgan import VQGANModule
from lightning_modules.vqgan_config import VQGANLossConfig

__all__ = [
    "ARGenLossConfig",
    "ARGenModule",
    "AdamWConfig",
    "CaptionModule",
    "CheckpointFiles",
    "GenerationOrder",
    "ShardedStrategy",
    "VQGANLossConfig",
    "VQGANModule",
    "resolve_checkpoint",
    "models_on_meta_device",
    "use_metrics_logger",
]
