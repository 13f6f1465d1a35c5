"""Whole tensors into ones that may be spread over ranks."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


@torch.no_grad()
def copy_full_(tensor: Tensor, whole: Tensor) -> None:
    """Copy a tensor that is whole on every rank; of one that is spread over ranks, each its own part.

    Args:
        tensor: where to, of any dtype and device.
        whole: of the same shape.
    """
    if isinstance(tensor, DTensor):
        # No rank sends anything. A tensor at a time goes to the device as a whole, and only its part stays.
        part = distribute_tensor(
            whole.to(tensor.device, tensor.dtype), tensor.device_mesh, tensor.placements, src_data_rank=None
        )
        tensor.to_local().copy_(part.to_local())
    else:
        tensor.copy_(whole)


@torch.no_grad()
def init_full_(tensor: Tensor, draw: Callable[[Tensor], Any]) -> None:
    """Initialise a tensor in place; one that is spread over ranks like one on the CPU that is not.

    Args:
        tensor: of any device.
        draw: fills a tensor, for example :func:`torch.nn.init.ones_`.
    """
    if isinstance(tensor, DTensor) and not tensor.is_meta:
        whole = torch.empty(tensor.shape)
        draw(whole)
        copy_full_(tensor, whole)
    else:
        draw(tensor)
