"""Sharding of a GPT's parameters over ranks (FSDP2). The model itself contains no code for it."""

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from llamagen.models.gpt import GPT


def shard(gpt: GPT, mesh: DeviceMesh, dtype: torch.dtype | None = None) -> None:
    """Shard the parameters of a model over ranks, in place. Each rank keeps its part of every tensor.

    A block is gathered for its forward and for its backward pass, and resharded after each. Embeddings, last norm and
    head stay gathered between the passes, because the backward pass starts and ends with them.

    Args:
        gpt: the model, which may be on the meta device. A sharded model is left as it is.
        mesh: one-dimensional mesh of the ranks.
        dtype: dtype in which blocks are gathered; that of autocast halves the traffic. None keeps the parameters' own.
    """
    if isinstance(gpt, FSDPModule):
        return
    # cast_forward_inputs=False: the residual stream keeps its dtype.
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in gpt.layers:
        fully_shard(block, mesh=mesh, mp_policy=policy if dtype is not None else MixedPrecisionPolicy())
    fully_shard(gpt, mesh=mesh, reshard_after_forward=False)
    register_fsdp_forward_method(gpt, "features")


def is_sharded(model: nn.Module) -> bool:
    """Whether a model's parameters are sharded over ranks."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def reshard(model: nn.Module) -> None:
    """Free gathered parameters, so that the next forward pass gathers them again and sees changes to the shards."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
