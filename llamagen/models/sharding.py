"""Parameters spread over ranks (FSDP2), beside the model, which knows nothing of it."""

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from llamagen.models.gpt import GPT


def shard(gpt: GPT, mesh: DeviceMesh, dtype: torch.dtype | None = None) -> None:
    """Spread the parameters of a model over ranks, each of which then keeps its part of every tensor.

    A block is put together for its forward and its backward pass, and taken apart behind each. Embeddings, last norm
    and head, which both ends of a step need, stay together in between.

    Args:
        gpt: may be on the meta device; a second call changes nothing.
        mesh: of one dimension, the ranks.
        dtype: in which blocks are put together; that of autocast sends half as much around. None for their own.
    """
    if isinstance(gpt, FSDPModule):
        return
    # The residual stream stays as it is.
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in gpt.layers:
        fully_shard(block, mesh=mesh, mp_policy=policy if dtype is not None else MixedPrecisionPolicy())
    fully_shard(gpt, mesh=mesh, reshard_after_forward=False)
    register_fsdp_forward_method(gpt, "features")


def is_sharded(model: nn.Module) -> bool:
    """Whether a model's parameters are spread over ranks."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def reshard(model: nn.Module) -> None:
    """Give back what was put together and is kept, so that the next forward pass sees parameters that were changed."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
