"""Adaptive normalization: a condition decides scale, shift and gate around each half of a block.

A modulation answers by *name* and alone knows in which order its vectors are stored.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megavar.transformer.linear import LinearFloat32
from megavar.transformer.megatron_config import without_sequence_parallel

VAR_ORDER = (
    "gate attention", "gate feed_forward", "scale attention", "scale feed_forward",
    "shift attention", "shift feed_forward",
)  # fmt: skip
"""Order in which VAR stores the vectors (``basic_var.py:154``)."""
DIT_ORDER = (
    "shift attention", "scale attention", "gate attention",
    "shift feed_forward", "scale feed_forward", "gate feed_forward",
)  # fmt: skip
"""The order of DiT and of RAR (``rar.py:153-183``)."""


class Modulated(NamedTuple):
    """What modulates one half of a block; each broadcasts to its hidden states [L, B, C]."""

    scale: Tensor
    shift: Tensor
    gate: Tensor


class _Network(nn.Module):
    """SiLU, then a linear layer: condition [..., C] to ``vectors`` modulation vectors [..., vectors, C].

    The weights are sharded over the tensor-parallel ranks and the result is gathered: they are a third of a VAR's
    parameters, applied once per image.
    """

    def __init__(self, config: TransformerConfig, vectors: int, *, float32: bool = False) -> None:
        super().__init__()
        self.vectors = vectors
        self.sequence_parallel = config.sequence_parallel
        linear = LinearFloat32 if float32 else ColumnParallelLinear
        self.linear = linear(
            config.hidden_size,
            vectors * config.hidden_size,
            config=without_sequence_parallel(config),
            init_method=lambda weight: weight,
            gather_output=True,
            bias=True,
            skip_bias_add=float32,
        )

    def compute(self, condition: Tensor) -> Tensor:
        """[..., C] -> [..., vectors, C], complete on every rank."""
        output, _ = self.linear(F.silu(condition))
        return output.unflatten(-1, (self.vectors, -1))


class ModulationNetwork(_Network):
    """The network alone: before a head, or shared by all blocks."""

    def forward(self, condition: Tensor) -> Tensor:
        """[..., C] -> [..., vectors, C], complete on every rank."""
        return self.compute(condition)


def _by_name(vectors: Tensor, order: tuple[str, ...]) -> dict[str, Modulated]:
    """[..., 6, C] to what modulates ``attention`` and ``feed_forward``."""
    named = dict(zip(order, vectors.unbind(-2), strict=True))
    return {
        half: Modulated(*(named[f"{what} {half}"] for what in Modulated._fields))
        for half in ("attention", "feed_forward")
    }


def _for_own_rows(vectors: Tensor, sequence_parallel: bool) -> Tensor:
    """Make the gradient of a replicated tensor complete where each rank applies it to its own rows only."""
    return tensor_parallel.copy_to_tensor_model_parallel_region(vectors) if sequence_parallel else vectors


class ImageModulation(_Network):
    """A block's own network from the condition of each image (VAR)."""

    def __init__(self, config: TransformerConfig, *, order: tuple[str, ...] = VAR_ORDER) -> None:
        super().__init__(config, len(order))
        self.order = order

    def forward(self, condition: Tensor) -> dict[str, Modulated]:
        """Condition [B, C] to vectors [B, C]."""
        return _by_name(_for_own_rows(self.compute(condition), self.sequence_parallel), self.order)


class SharedModulation(nn.Module):
    """What all blocks share, from outside, plus an offset of the block's own (VAR's ``ada_gss``)."""

    def __init__(self, config: TransformerConfig, *, order: tuple[str, ...] = VAR_ORDER) -> None:
        super().__init__()
        self.order = order
        self.sequence_parallel = config.sequence_parallel
        self.offset = nn.Parameter(torch.empty(len(order), config.hidden_size, dtype=config.params_dtype))

    def forward(self, shared: Tensor) -> dict[str, Modulated]:
        """Shared vectors [B, 6, C] to vectors [B, C]."""
        return _by_name(_for_own_rows(self.offset + shared, self.sequence_parallel), self.order)


class PositionModulation(_Network):
    """A block's own network from a condition of each position (RAR's target-aware condition)."""

    def __init__(self, config: TransformerConfig, *, order: tuple[str, ...] = DIT_ORDER) -> None:
        super().__init__(config, len(order))
        self.order = order

    def forward(self, condition: Tensor) -> dict[str, Modulated]:
        """Condition [L, B, C] to vectors [L, B, C], both of this rank's rows."""
        if not self.sequence_parallel:
            return _by_name(self.compute(condition), self.order)
        # The network computes a share of the channels for all rows, and its input's gradient is complete on all ranks.
        complete = tensor_parallel.gather_from_sequence_parallel_region(condition, tensor_parallel_output_grad=False)
        return _by_name(tensor_parallel.scatter_to_sequence_parallel_region(self.compute(complete)), self.order)
