"""An attention kernel that computes nothing: what it would cost goes to a ledger.

Fake tensors cannot run all kernels (FlexAttention has no backward pass on CPUs), and PyTorch's counter of operations
knows nothing of masks.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megavar.planning.ledger import Ledger
from megavar.transformer.kernels import Visibility
from megavar.transformer.sequence import SequenceLayout

FLEX_TILE = 128
"""Rows and columns of the tiles that FlexAttention keeps or skips as a whole."""


def seen_rows(layout: SequenceLayout) -> list[tuple[int, int]]:
    """First key, and key after the last, that each token sees."""
    tokens = layout.tokens
    if layout.rule == "full":
        return [(0, tokens)] * tokens
    if layout.rule == "causal":
        return [(0, row + 1) for row in range(tokens)]
    is_prefix = layout.rule == "block_causal"
    return [(0 if is_prefix else start, end) for start, end in layout.bounds for _ in range(start, end)]


def attention_pairs(layout: SequenceLayout, kernel: str) -> int:
    """Pairs (query, key) of a sequence that an attention kernel computes.

    ``dense`` computes all; ``flex`` whole tiles with at least one visible pair; the others, and ``visible``, which is
    the mathematics, the visible ones.
    """
    if kernel == "dense":
        return layout.length**2
    if layout.rule == "table":
        return sum(layout.sizes[q] * layout.sizes[k] for q, keys in enumerate(layout.sees) for k in keys)
    seen = seen_rows(layout)
    if kernel != "flex":
        return sum(end - start for start, end in seen)
    tiles = 0
    for row in range(0, len(seen), FLEX_TILE):
        inside = seen[row : row + FLEX_TILE]
        first, last = min(start for start, _ in inside), max(end for _, end in inside)
        tiles += -(-last // FLEX_TILE) - first // FLEX_TILE
    return tiles * FLEX_TILE**2


class _Attention(torch.autograd.Function):
    """Keeps what fused kernels keep: queries, keys, values, result and a log-sum-exp per row."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, in_order: bool, ledger: Ledger, needed: float, done: float
    ) -> Tensor:
        batch, heads, length, _ = q.shape
        if in_order:  # one call writes rows where the projection reads them; several are joined and copied there
            out = q.new_empty(length, batch, heads, v.shape[-1]).permute(1, 2, 0, 3)
        else:
            out = q.new_empty(batch, heads, length, v.shape[-1])
        ctx.save_for_backward(q, k, v, out, q.new_empty(batch, heads, length, dtype=torch.float32))
        ctx.ledger, ctx.needed, ctx.done = ledger, needed, done
        ledger.count(needed, done)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        q, k, v, _, _ = ctx.saved_tensors
        ctx.ledger.count(2 * ctx.needed, 2.5 * ctx.done)  # fused kernels compute the scores once more: five products
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), None, None, None, None


def continued_attention(ledger: Callable[[], Ledger]) -> Callable[..., Tensor]:
    """What stands for attention to a cache, ``AttentionCore._continue``: all pairs, as torch's attention computes them.

    Args:
        ledger: gives the one that is kept at the time of a call.
    """

    def attend(core: Any, query: Tensor, keys: Tensor, values: Tensor, past: int, context: Any) -> Tensor:
        """[L, B, H, D] to keys and values [B, G, past + L, D] -> [L, B, H D]."""
        rows, batch, heads, size = query.shape
        operations = 2.0 * rows * batch * heads * keys.shape[2] * (size + values.shape[3])
        ledger().count(operations, operations)
        return query.new_empty(rows, batch, heads * values.shape[3])

    return attend


def attention_kernel(name: str, ledger: Callable[[], Ledger]) -> Callable[..., Tensor]:
    """What stands for the kernel ``name`` of ``transformer/kernels.py``.

    Args:
        ledger: gives the one that is kept at the time of a call.
    """

    def attend(q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, scale: float) -> Tensor:
        """[B, H, L, D], keys and values perhaps with fewer heads -> [B, H, L, D]."""
        pair = 2.0 * q.shape[0] * q.shape[1] * (q.shape[3] + v.shape[3])  # operations per pair, all heads
        needed, done = (pair * attention_pairs(visibility.layout, kernel) for kernel in ("visible", name))
        in_order = name in ("dense", "causal")
        return _Attention.apply(q, k, v, in_order, ledger(), needed, done)  # type: ignore[no-any-return]

    return attend
