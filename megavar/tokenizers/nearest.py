"""The nearest of a codebook's vectors, without ever holding all distances."""

import torch
import torch.nn.functional as F
from torch import Tensor

_DISTANCE_ELEMENTS = 1 << 26
"""Distances held at once during the search (256 MiB of float32)."""


@torch.no_grad()
def nearest(vectors: Tensor, codes: Tensor) -> Tensor:
    """Index of the code with the smallest Euclidean distance; ties go to the lower index.

    Args:
        vectors: float32 [N, C].
        codes: float32 [V, C].

    Returns:
        int64 [N].
    """
    squares = codes.square().sum(1)
    parts = [
        torch.addmm(part.square().sum(1, keepdim=True) + squares, part, codes.T, alpha=-2).argmin(1)
        for part in _parts(vectors, codes)
    ]
    return torch.cat(parts)


@torch.no_grad()
def nearest_by_angle(vectors: Tensor, codes: Tensor) -> Tensor:
    """Index of the code with the largest cosine; see :func:`nearest`."""
    directions = F.normalize(codes, dim=-1).T
    return torch.cat([(F.normalize(part, dim=-1) @ directions).argmax(1) for part in _parts(vectors, codes)])


def _parts(vectors: Tensor, codes: Tensor) -> tuple[Tensor, ...]:
    return vectors.split(max(1, _DISTANCE_ELEMENTS // len(codes)))
