"""Dropout and drop path as functions of (seed, what for, block, sample, position, channel).

The same elements are dropped under every layout, in every split into micro-batches and when a block is computed again.
Both are off where a pass names no samples (``sample_keys``): in evaluation and decoding.
"""

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megavar.parallel import seeds
from megavar.transformer.context import ForwardContext


def dropout(
    hidden: Tensor, context: ForwardContext, *, stream: str, block: int, rate: float, first_channel: int = 0
) -> Tensor:
    """Set elements to zero with probability ``rate`` (to 1/65536) and divide the others by the probability to stay.

    Args:
        hidden: [rows, B, C]: all rows of the sequence, or this rank's part under sequence parallelism.
        stream: what is dropped, different for every place of a block.
        first_channel: number of the first channel where tensor-parallel ranks share them.
    """
    if context.sample_keys is None or rate == 0.0:
        return hidden
    dropped = min(round(rate * 65536), 65535)
    first = context.first_row(hidden.shape[0])
    position = torch.arange(first, first + hidden.shape[0], device=hidden.device)
    bits = seeds.random_bits(context.seed, stream, block, context.sample_keys[None, :], position[:, None])
    kept = seeds.lanes(bits, first_channel, hidden.shape[-1]) >= dropped - 32768
    return torch.where(kept, hidden * (65536 / (65536 - dropped)), 0.0)


def _added(hidden: Tensor, branch: Tensor, gate: Tensor | None) -> Tensor:
    """The residual connection, in one pass over memory."""
    return hidden + branch if gate is None else torch.addcmul(hidden, branch, gate)


class DropPath(nn.Module):
    """Drops the branch of a whole sample, with a rate that rises linearly over the blocks from 0 to ``rate``."""

    def __init__(self, config: TransformerConfig, number: int, depth: int, *, rate: float = 0.0) -> None:
        super().__init__()
        self.number, self.depth = number, depth
        self.rate = rate * number / max(depth - 1, 1)

    def forward(
        self, hidden: Tensor, branch: Tensor, gate: Tensor | None, half: str, context: ForwardContext
    ) -> Tensor:
        """``hidden`` plus what is kept of the gated branch, [L, B, C]; ``half`` is "attention" or "feed_forward"."""
        keep = context.keep_mask(f"drop_path/{half}", self.number, self.depth, self.rate)
        if keep is not None:
            keep = keep.to(branch.dtype)[:, None]
            gate = keep if gate is None else gate * keep
        return _added(hidden, branch, gate)


class Dropout(nn.Module):
    """Drops single elements of a branch."""

    def __init__(self, config: TransformerConfig, number: int, depth: int, *, rate: float = 0.0) -> None:
        super().__init__()
        self.number, self.rate = number, rate

    def forward(
        self, hidden: Tensor, branch: Tensor, gate: Tensor | None, half: str, context: ForwardContext
    ) -> Tensor:
        """``hidden`` plus what is kept of the gated branch, [L, B, C]; ``half`` is "attention" or "feed_forward"."""
        branch = dropout(branch, context, stream=f"dropout/{half}", block=self.number, rate=self.rate)
        return _added(hidden, branch, gate)
