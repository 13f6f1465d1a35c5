"""Training with parameters spread over ranks, and its checkpoints."""

import shutil
from datetime import timedelta
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry

from lightning_modules.base import GenerativeModule
from llamagen.checkpoint import check_fits, read_checkpoint
from llamagen.sharded_checkpoint import is_sharded_checkpoint


class ShardedStrategy(ModelParallelStrategy):
    """Lightning's ``ModelParallelStrategy`` (FSDP2) with all ranks as one data-parallel group.

    ``--trainer.strategy sharded`` is this strategy with its defaults. A checkpoint is a folder, in which each rank
    writes its part; it gets its name when all of them are done. It may be resumed on another number of ranks and by
    another strategy. ``python -m llamagen.export`` makes one file of weights of it.

    Args:
        save_distributed_checkpoint: ``False`` gathers all on the first rank, in one file.
        process_group_backend: by default that of the device: ``nccl``, or ``gloo`` on CPUs.
        timeout: after which a rank that does not answer is taken to be gone.
    """

    def __init__(
        self,
        save_distributed_checkpoint: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        super().__init__("auto", 1, save_distributed_checkpoint, process_group_backend, timeout)

    def setup_environment(self) -> None:
        """Take every rank there is."""
        assert self.parallel_devices is not None
        self._data_parallel_size = len(self.parallel_devices) * self.num_nodes
        super().setup_environment()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write to a temporary name beside it, which all ranks know, and rename."""
        if not self._save_distributed_checkpoint:
            super().save_checkpoint(checkpoint, filepath, storage_options)
            return
        path = Path(self.broadcast(filepath))
        temporary, old = (path.with_name(f".{path.name}.{kind}") for kind in ("tmp", "old"))
        if self.global_rank == 0:
            _remove(temporary)
        self.barrier()
        super().save_checkpoint(checkpoint, temporary, storage_options)
        self.barrier()
        if self.global_rank == 0:
            _remove(old)
            if path.exists() or path.is_symlink():
                path.rename(old)
            temporary.rename(path)
            _remove(old)
        self.barrier()

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Load into the model and its optimizer.

        Raises:
            ValueError: in one line, if it is the checkpoint of another model; nothing is changed then.
        """
        module = self.lightning_module
        assert isinstance(module, GenerativeModule)
        check_fits(read_checkpoint(checkpoint_path, wanted=lambda _: False), module.generator)
        return super().load_checkpoint(checkpoint_path, weights_only)


StrategyRegistry.register("sharded", ShardedStrategy, description="FSDP2 over all ranks")


class CheckpointFiles(TorchCheckpointIO):
    """Checkpoints in files, and, to read, sharded ones in folders: for strategies in which each rank is whole."""

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read everything."""
        if is_sharded_checkpoint(Path(path)):
            return read_checkpoint(path, wanted=lambda _: True)
        loaded: dict[str, Any] = super().load_checkpoint(path, map_location, weights_only)
        return loaded


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
