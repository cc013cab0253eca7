"""float32 numbers that travel in tensors of a narrower type, without losing a bit.

A float32 number is the sum of three bfloat16 numbers (3 x 8 bits of significand are its 24), so each number takes three
channels. Gradients come back in the same way.

Shapes: L tokens, B samples, N numbers per token, C channels of the tensor that carries them.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_PARTS = {torch.float32: 1, torch.bfloat16: 3}


def rows_per_token(numbers: int, channels: int, dtype: torch.dtype) -> int:
    """Rows of C channels of ``dtype`` that N numbers of a token take."""
    return -(-numbers * _PARTS[dtype] // channels)


def to_rows(values: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    """float32 [L, B, N] -> [L x rows, B, C] of ``dtype``."""
    parts = _Split.apply(values, dtype)
    rows = rows_per_token(values.shape[-1], channels, dtype)
    padded = F.pad(parts, (0, rows * channels - parts.shape[-1]))
    return padded.unflatten(-1, (rows, channels)).transpose(1, 2).flatten(0, 1)


def from_rows(rows: Tensor, numbers: int) -> Tensor:
    """Undo :func:`to_rows`: float32 [L, B, N]."""
    count = rows_per_token(numbers, rows.shape[-1], rows.dtype)
    parts = rows.unflatten(0, (-1, count)).transpose(1, 2).flatten(2)
    return _Join.apply(parts[..., : numbers * _PARTS[rows.dtype]])


def _split(values: Tensor, dtype: torch.dtype) -> Tensor:
    parts, rest = [], values
    for _ in range(_PARTS[dtype]):
        parts.append(rest.to(dtype))
        rest = rest - parts[-1].float()
    return torch.cat(parts, -1)


def _join(parts: Tensor) -> Tensor:
    total, *others = parts.float().chunk(_PARTS[parts.dtype], -1)
    for part in others:  # from the largest to the smallest: every sum is exact
        total = total + part
    return total


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, dtype: torch.dtype) -> Tensor:
        return _split(values, dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _join(gradients[0]), None


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parts: Tensor) -> Tensor:
        ctx.dtype = parts.dtype
        return _join(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return _split(gradients[0], ctx.dtype)
