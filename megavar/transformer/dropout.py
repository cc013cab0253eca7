"""Dropout and drop path as functions of (seed, what for, block, sample, position, channel).

The same elements are dropped under every layout, in every split into micro-batches and when a block is computed again.
Both are off where a pass names no samples (``sample_keys``): in evaluation and decoding.
"""

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megavar.parallel import seeds
from megavar.transformer.context import ForwardContext


def prepare_dropout(context: ForwardContext, stream: str, block: int, depth: int, rate: float) -> None:
    """Start the draws of one place of block ``block``; the first block starts those of all ``depth``.

    Args:
        stream: what is dropped, different for every place of a block.
    """
    if context.sample_keys is None or rate == 0.0:
        return
    keys = context.sample_keys
    blocks = context.once(f"{depth} blocks", lambda: torch.arange(depth, device=keys.device)[:, None])
    started = context.once(stream, lambda: seeds.begin(context.seed, stream, blocks, keys))
    context.prepared[stream] = started[block]


def dropout(hidden: Tensor, context: ForwardContext, *, stream: str, rate: float, first_channel: int = 0) -> Tensor:
    """Set elements to zero with probability ``rate`` (to 1/65536) and divide the others by the probability to stay.

    Args:
        hidden: [rows, B, C]: all rows of the sequence, or this rank's part under sequence parallelism.
        stream: see :func:`prepare_dropout`; where nothing was prepared, nothing is dropped.
        first_channel: number of the first channel where tensor-parallel ranks share them.
    """
    started = context.prepared.get(stream)
    if started is None:
        return hidden
    dropped = min(round(rate * 65536), 65535)
    first = context.first_row(hidden.shape[0])
    position = torch.arange(first, first + hidden.shape[0], device=hidden.device)
    bits = seeds.go_on(started[None, :], position[:, None])
    kept = seeds.lanes(bits, first_channel, hidden.shape[-1]) >= dropped - 32768
    return torch.where(kept, hidden * (65536 / (65536 - dropped)), 0.0)


def keep_mask(context: ForwardContext, stream: str, block: int, depth: int, rate: float) -> Tensor | None:
    """Drop-path multipliers [B] (0 or 1/keep), a function of (seed, sample, block); None where a pass keeps all.

    The first block draws for all ``depth`` of them: some seventy kernels on [depth, B] numbers instead of on [B].
    """
    keys = context.sample_keys
    if keys is None:
        return None
    blocks = context.once(f"{depth} blocks", lambda: torch.arange(depth, device=keys.device)[:, None])
    drawn = context.once(stream, lambda: seeds.uniform(context.seed, stream, blocks, keys))
    return (drawn[block] >= rate).to(torch.float32) / (1.0 - rate)


def _added(hidden: Tensor, branch: Tensor, gate: Tensor | None) -> Tensor:
    """The residual connection, in one pass over memory."""
    return hidden + branch if gate is None else torch.addcmul(hidden, branch, gate)


class DropPath(nn.Module):
    """Drops the branch of a whole sample, with a rate that rises linearly over the blocks from 0 to ``rate``."""

    def __init__(self, config: TransformerConfig, number: int, depth: int, *, rate: float = 0.0) -> None:
        super().__init__()
        self.number, self.depth, self.highest = number, depth, rate
        self.rate = rate * number / max(depth - 1, 1)

    def prepare(self, context: ForwardContext, device: torch.device) -> None:
        """Draw for both halves. The first block gets a mask of ones, so that one compiled graph serves all."""
        for stream in ("drop_path/attention", "drop_path/feed_forward") if self.highest else ():
            keep = keep_mask(context, stream, self.number, self.depth, self.rate)
            if keep is not None:
                context.prepared[stream] = keep

    def forward(
        self, hidden: Tensor, branch: Tensor, gate: Tensor | None, half: str, context: ForwardContext
    ) -> Tensor:
        """``hidden`` plus what is kept of the gated branch, [L, B, C]; ``half`` is "attention" or "feed_forward"."""
        keep = context.prepared.get(f"drop_path/{half}")
        if keep is not None:
            keep = keep.to(branch.dtype)[:, None]
            gate = keep if gate is None else gate * keep
        return _added(hidden, branch, gate)


class Dropout(nn.Module):
    """Drops single elements of a branch."""

    def __init__(self, config: TransformerConfig, number: int, depth: int, *, rate: float = 0.0) -> None:
        super().__init__()
        self.number, self.depth, self.rate = number, depth, rate

    def prepare(self, context: ForwardContext, device: torch.device) -> None:
        """Start the draws of both halves."""
        for half in ("attention", "feed_forward"):
            prepare_dropout(context, f"dropout/{half}", self.number, self.depth, self.rate)

    def forward(
        self, hidden: Tensor, branch: Tensor, gate: Tensor | None, half: str, context: ForwardContext
    ) -> Tensor:
        """``hidden`` plus what is kept of the gated branch, [L, B, C]; ``half`` is "attention" or "feed_forward"."""
        branch = dropout(branch, context, stream=f"dropout/{half}", rate=self.rate)
        return _added(hidden, branch, gate)
