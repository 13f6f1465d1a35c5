"""Training with sharded parameters (FSDP2), and sharded checkpoints."""

from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy, StrategyRegistry
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.optim import Optimizer

from lightning_modules.base import GenerativeModule
from lightning_modules.checkpoint_files import CheckpointFiles, tensor_bytes
from llamagen.checkpoints.contents import check_fits, read_checkpoint
from llamagen.checkpoints.sharded import numbered
from llamagen.distributed.full_tensor import copy_full_
from llamagen.files import publish_folder, remove, remove_leftovers, temporary_name
from llamagen.full_disk import DiskFullError, disk_full_error, full_disk_errno, size_of
from llamagen.models.lora import adapters_of


class ShardedStrategy(ModelParallelStrategy):
    """Lightning's ``ModelParallelStrategy`` (FSDP2) with all ranks as one data-parallel group.

    ``--trainer.strategy sharded`` is this strategy with its defaults. A checkpoint is a folder into which each rank
    writes its part. It gets its final name when all ranks are done. A run can resume from it on any number of ranks and
    with any strategy. ``python -m llamagen.checkpoints.export`` converts it to a single file of weights.

    Args:
        data_parallel_size: number of ranks over which the parameters are sharded; by default all.
        tensor_parallel_size: must be 1.
        save_distributed_checkpoint: ``False`` gathers the checkpoint on the first rank, into one file.
        process_group_backend: by default that of the device: ``nccl``, or ``gloo`` on CPUs.
        timeout: time after which a rank that does not answer counts as dead.
    """

    def __init__(
        self,
        data_parallel_size: Literal["auto"] | int = "auto",
        tensor_parallel_size: Literal["auto"] | int = 1,
        save_distributed_checkpoint: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        super().__init__(
            data_parallel_size, tensor_parallel_size, save_distributed_checkpoint, process_group_backend, timeout
        )
        self.checkpoint_io = CheckpointFiles()

    def setup_environment(self) -> None:
        """Shard over all ranks by default."""
        if self._data_parallel_size == "auto" and self._tensor_parallel_size == 1:
            self._data_parallel_size = self.num_processes * self.num_nodes
        super().setup_environment()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write a temporary folder next to the final one, which all ranks share, and rename it.

        Raises:
            DiskFullError: on all ranks, if the disk of one is full; the previous checkpoint is kept.
        """
        if not self._save_distributed_checkpoint:  # not ModelParallelStrategy's: it first removes a folder of this name
            Strategy.save_checkpoint(self, checkpoint, filepath, storage_options)
            return
        path = Path(self.broadcast(filepath))
        temporary = Path(self.broadcast(temporary_name(path)))
        if self.global_rank == 0:
            remove_leftovers(path.parent)
        own_bytes = tensor_bytes(checkpoint)
        error: BaseException | None = None
        try:
            super().save_checkpoint(checkpoint, temporary, storage_options)  # returns when all ranks have written
            if self.global_rank == 0:
                publish_folder(temporary, path)
        except (Exception, CheckpointException) as caught:  # CheckpointException is a BaseException
            error = caught
        failure: BaseException | None = error
        if error is not None and self.global_rank == 0:
            number, written = full_disk_errno(error, path.parent), size_of(temporary)
            remove(temporary)
            if number is not None:
                failure = disk_full_error(path, number, own_bytes * self.world_size, written)
        # An error of the first rank stops all ranks: none may wait for it.
        is_full, reason = self.broadcast((isinstance(failure, DiskFullError), "" if failure is None else str(failure)))
        if self.global_rank and reason:
            failure = DiskFullError(reason) if is_full else OSError(reason)
        if failure is not None:
            raise failure from (None if failure is error else error)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Optimizer state with the parameters numbered in the optimizer's order; Lightning numbers in the model's."""
        state: dict[str, Any] = super().optimizer_state(optimizer)
        return state if self._save_distributed_checkpoint or not state else numbered(state)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Load into the model and its optimizer.

        Raises:
            ValueError: in one line, if it is the checkpoint of another model; nothing is changed.
        """
        module, path = self.lightning_module, Path(self.broadcast(checkpoint_path))
        assert isinstance(module, GenerativeModule)
        checkpoint = read_checkpoint(path, wanted=lambda _: False)
        check_fits(checkpoint, module.generator)
        has_adapters = adapters_of(module.generator) is not None
        if path.is_dir() and not has_adapters:
            return super().load_checkpoint(path, weights_only)
        if path.is_dir():  # Lightning would miss the frozen weights; adapters are small enough for each rank
            checkpoint = read_checkpoint(path, wanted=lambda _: True)
        # Not Lightning's: it assumes that the optimizer's parameters are in the order of the model's.
        if self.optimizers and "optimizer_states" not in checkpoint:
            raise ValueError(f"{path} holds only weights; start a new run from them with model.init_args.init_from")
        weights, own = checkpoint.pop("state_dict"), module.state_dict()
        for name in weights if has_adapters else own:
            copy_full_(own[name], weights[name])
        for optimizer, state in zip(self.optimizers, checkpoint.get("optimizer_states", ()), strict=False):
            _load_optimizer(optimizer, state)
        return checkpoint


def _load_optimizer(optimizer: Optimizer, full: dict[str, Any]) -> None:
    """Load the optimizer state of a run without sharding."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {
        number: {name: _sharded_like(value, parameters[int(number)]) for name, value in entries.items()}
        for number, entries in full["state"].items()
    }
    optimizer.load_state_dict({**full, "state": state})


def _sharded_like(value: Any, parameter: Tensor) -> Any:
    """Shard a moment or average like its parameter; other values are unchanged."""
    if not isinstance(value, Tensor) or value.shape != parameter.shape:  # the step count
        return value
    part = torch.empty_like(parameter, dtype=value.dtype)
    copy_full_(part, value)
    return part


StrategyRegistry.register("sharded", ShardedStrategy, description="FSDP2 over all ranks")
