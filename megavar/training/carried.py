"""Gives what one pass carries to the next to every rank that computes with it."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def share_carried(tensors: list[Tensor], count: int, device: torch.device) -> list[Tensor]:
    """Tensors of the last pipeline stage, on all stages, and bit for bit equal on tensor-parallel ranks. Collective.

    Args:
        tensors: one per micro-batch on the last stage; empty on the others.
        count: number of micro-batches.
        device: where this rank computes.
    """
    from megatron.core import parallel_state

    last = parallel_state.is_pipeline_last_stage(ignore_virtual=True)
    assert len(tensors) == (count if last else 0), f"{len(tensors)} results of {count} micro-batches"
    tensors = [tensor.to(device).contiguous() for tensor in tensors]
    if last and parallel_state.get_tensor_model_parallel_world_size() > 1:
        group, source = parallel_state.get_tensor_model_parallel_group(), _first_tensor_rank()
        for tensor in tensors:
            dist.broadcast(tensor, source, group=group)
    if parallel_state.get_pipeline_model_parallel_world_size() == 1:
        return tensors
    group, source = (
        parallel_state.get_pipeline_model_parallel_group(),
        parallel_state.get_pipeline_model_parallel_last_rank(),
    )
    described: list[Any] = [[(tensor.shape, tensor.dtype) for tensor in tensors] if last else None]
    dist.broadcast_object_list(described, source, group=group)
    if not last:
        tensors = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in described[0]]
    for tensor in tensors:
        dist.broadcast(tensor, source, group=group)
    return tensors


def _first_tensor_rank() -> int:
    from megatron.core import parallel_state

    return dist.get_global_rank(parallel_state.get_tensor_model_parallel_group(), 0)
