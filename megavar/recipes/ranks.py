"""Sums and means over all ranks, for the few quantities a recipe needs during a step. One process: nothing happens.

Ranks that hold copies of the same samples (tensor parallelism) do not change a mean.
"""

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """The number of ranks of the default process group, 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This rank in the default process group, 0 without one."""
    return dist.get_rank() if world_size() > 1 else 0


def data_parallel_rank() -> int:
    """Which part of the global batch this rank has; the same on ranks that share a model."""
    from megatron.core import parallel_state

    return parallel_state.get_data_parallel_rank() if world_size() > 1 else 0


@torch.no_grad()
def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The sum of a tensor of equal shape on all ranks. Collective."""
    if world_size() == 1:
        return tensor
    total = tensor.clone()
    dist.all_reduce(total)
    return total


def mean_over_ranks(tensor: Tensor) -> Tensor:
    """The mean of a tensor of equal shape on all ranks. Collective."""
    return sum_over_ranks(tensor) / world_size()


@torch.no_grad()
def gather_over_ranks(tensor: Tensor) -> Tensor:
    """Tensors of equal shape [n, ...] of all ranks, concatenated in rank order. Collective."""
    if world_size() == 1:
        return tensor
    tensor = tensor.contiguous()  # before empty_like, which would keep the strides of a transposed one
    parts = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(parts, tensor)
    return torch.cat(parts)
