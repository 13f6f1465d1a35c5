"""Copies and initialisation of tensors that may be sharded over ranks."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


@torch.no_grad()
def copy_full_(tensor: Tensor, full: Tensor) -> None:
    """Copy a full tensor, which every rank has, into a tensor that may be sharded.

    Args:
        tensor: destination, of any dtype and device. If it is sharded, each rank copies its own shard.
        full: source, of the same (global) shape.
    """
    if isinstance(tensor, DTensor):
        # No communication: every rank moves the full tensor to its device and keeps its shard.
        part = distribute_tensor(
            full.to(tensor.device, tensor.dtype), tensor.device_mesh, tensor.placements, src_data_rank=None
        )
        tensor.to_local().copy_(part.to_local())
    else:
        tensor.copy_(full)


@torch.no_grad()
def init_full_(tensor: Tensor, init: Callable[[Tensor], Any]) -> None:
    """Initialise a tensor in place. A sharded tensor gets the values of an unsharded tensor on the CPU.

    Args:
        tensor: tensor on any device.
        init: fills a tensor in place, for example :func:`torch.nn.init.ones_`.
    """
    if isinstance(tensor, DTensor) and not tensor.is_meta:
        full = torch.empty(tensor.shape)
        init(full)
        copy_full_(tensor, full)
    else:
        init(tensor)
