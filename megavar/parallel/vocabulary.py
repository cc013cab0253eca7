"""Cross entropy and accuracy of logits whose vocabulary is sharded over the tensor-parallel ranks."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from torch import Tensor


def vocabulary_cross_entropy(logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross entropy per token in nats.

    Args:
        logits: float32 [B, L, V / tensor-parallel size], this rank's part of the vocabulary.
        targets: int64 [B, L].
        label_smoothing: as in :func:`torch.nn.functional.cross_entropy`.

    Returns:
        float32 [B, L], the same on every tensor-parallel rank.
    """
    size = parallel_state.get_tensor_model_parallel_world_size()
    if size == 1:
        return F.cross_entropy(logits.transpose(1, 2), targets, reduction="none", label_smoothing=label_smoothing)
    # Megatron-core spreads the smoothing over the V - 1 wrong classes, PyTorch over all V.
    vocabulary = logits.shape[-1] * size
    smoothing = label_smoothing * (vocabulary - 1) / vocabulary
    own = logits.clone(memory_format=torch.contiguous_format)  # the kernel works in place, on flat rows
    return tensor_parallel.vocab_parallel_cross_entropy(own, targets, smoothing)


@torch.no_grad()
def vocabulary_hits(logits: Tensor, targets: Tensor) -> Tensor:
    """Whether the most likely token is the target: bool [B, L]; arguments as in :func:`vocabulary_cross_entropy`."""
    size = parallel_state.get_tensor_model_parallel_world_size()
    best, index = logits.max(-1)
    if size == 1:
        return index == targets
    group = parallel_state.get_tensor_model_parallel_group()
    index = index + parallel_state.get_tensor_model_parallel_rank() * logits.shape[-1]
    overall = best.clone()
    dist.all_reduce(overall, dist.ReduceOp.MAX, group=group)
    candidate = torch.where(best == overall, index, torch.iinfo(torch.int64).max)
    dist.all_reduce(candidate, dist.ReduceOp.MIN, group=group)
    return candidate == targets
