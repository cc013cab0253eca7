"""Block-causal attention on a CPU: each segment against the keys up to its end, without copies of what they share.

Autograd of slices would fill a tensor of the complete size with zeros for each segment and input, thirty per block, and
add them up: half of attention's time. Here the backward pass adds each segment's gradients into one tensor.

Shapes: B samples, H heads, L rows, D head size. Tensors keep the queries' order of memory ([L, B, H, D] in blocks).
"""

from typing import Any

import torch
from torch import Tensor

Ranges = tuple[tuple[int, int, int, int], ...]
"""(first query, query after the last, first key, key after the last) of each segment; no query is left out."""

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def serves(q: Tensor, k: Tensor) -> bool:
    """Whether PyTorch's CPU kernel takes these: as many key heads as query heads, on a CPU."""
    return q.device.type == "cpu" and q.shape[1] == k.shape[1]


class SegmentAttention(torch.autograd.Function):
    """softmax(scale q k^T) v of each segment's queries over its range of keys."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, ranges: Ranges, scale: float) -> Tensor:
        """[B, H, L, D] each -> [B, H, L, D]."""
        output = torch.empty_like(q)
        normalizers = []
        for first, end, first_key, end_key in ranges:
            segment, normalizer = _forward(
                q[:, :, first:end], k[:, :, first_key:end_key], v[:, :, first_key:end_key], scale=scale
            )
            output[:, :, first:end] = segment
            normalizers.append(normalizer)
        ctx.save_for_backward(q, k, v, output, *normalizers)
        ctx.ranges, ctx.scale = ranges, scale
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        """Of q, k and v."""
        q, k, v, output, *normalizers = ctx.saved_tensors
        (gradient,) = gradients
        of_q, of_k, of_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for (first, end, first_key, end_key), normalizer in zip(ctx.ranges, normalizers):
            queries, keys = slice(first, end), slice(first_key, end_key)
            parts = _backward(
                gradient[:, :, queries], q[:, :, queries], k[:, :, keys], v[:, :, keys], output[:, :, queries],
                normalizer, 0.0, False, scale=ctx.scale,
            )  # fmt: skip
            of_q[:, :, queries] = parts[0]
            of_k[:, :, keys] += parts[1]
            of_v[:, :, keys] += parts[2]
        return of_q, of_k, of_v, None, None
