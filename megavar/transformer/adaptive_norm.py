"""Adaptive layer normalization: a condition decides shift, scale and gate of every block (VAR ``basic_var.py``)."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn


class LinearFloat32(ColumnParallelLinear):
    """A column-parallel linear layer that computes in float32 whatever the parameters' type."""

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """[..., in] -> float32 [..., out of this rank, or out when gathered]."""
        output, _ = super().forward(input_.float(), weight=self.weight.float())
        bias = self.bias.float()
        if self.gather_output and bias.shape[0] != output.shape[-1]:
            bias = tensor_parallel.gather_from_tensor_model_parallel_region(bias)
        return output + bias, None


class Modulation(nn.Module):
    """SiLU, then a linear layer: condition [B, C] to ``vectors`` modulation vectors [B, vectors, C].

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
            config=_without_sequence_parallel(config),
            init_method=lambda weight: weight,
            gather_output=True,
            bias=True,
            skip_bias_add=float32,
        )

    def forward(self, condition: Tensor) -> Tensor:
        """[B, C] -> [B, vectors, C]."""
        output, _ = self.linear(F.silu(condition))
        return output.unflatten(-1, (self.vectors, -1))


class ModulationOffset(nn.Module):
    """What a block adds to the modulation that all blocks share (VAR's ``ada_gss``): 6 vectors of its own."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.empty(6, config.hidden_size, dtype=config.params_dtype))

    def forward(self, shared: Tensor) -> Tensor:
        """[B, 6, C] -> [B, 6, C]."""
        return self.offset + shared


def _without_sequence_parallel(config: TransformerConfig) -> TransformerConfig:
    """Conditions are replicated over tensor-parallel ranks even where hidden states are sharded."""
    if not config.sequence_parallel:
        return config
    from copy import copy

    config = copy(config)
    config.sequence_parallel = False
    return config


def for_sharded_tokens(modulation: Tensor, config: TransformerConfig) -> Tensor:
    """Make the gradient of a replicated tensor complete where each rank applies it to its own tokens only."""
    if config.sequence_parallel:
        return tensor_parallel.copy_to_tensor_model_parallel_region(modulation)
    return modulation


def normalize(hidden: Tensor) -> Tensor:
    """Layer normalization over the last dimension without learned scale and shift, eps 1e-6."""
    return F.layer_norm(hidden, hidden.shape[-1:], eps=1e-6)

