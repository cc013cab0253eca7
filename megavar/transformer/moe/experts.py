"""Experts with stacked weights: all experts of a rank in four tensors.

Each expert is the dense block's feed-forward network, C -> F -> C, plain or gated, with or without biases. T tokens of
this rank's experts, E experts of this rank, C width, F hidden size.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megavar.transformer.feed_forward import activate

_grouped_mm = getattr(F, "grouped_mm", None) or torch._grouped_mm  # public since torch 2.10


def first_layer_rows(config: TransformerConfig) -> int:
    """Outputs of an expert's first layer: F, or 2 F where a gated one holds both parts."""
    assert config.moe_ffn_hidden_size is not None
    return config.moe_ffn_hidden_size * (2 if config.gated_linear_unit else 1)


class StackedExperts(nn.Module):
    """Weights of E experts. ``parallel/logical.py`` knows the names: each row is one expert's tensor."""

    linear_fc1_bias: nn.Parameter | None
    linear_fc2_bias: nn.Parameter | None

    def __init__(self, experts: int, config: TransformerConfig) -> None:
        super().__init__()
        assert config.moe_ffn_hidden_size is not None
        self.config = config
        dtype, width, rows = config.params_dtype, config.hidden_size, first_layer_rows(config)
        self.linear_fc1_weight = nn.Parameter(torch.empty(experts, rows, width, dtype=dtype))
        self.linear_fc2_weight = nn.Parameter(torch.empty(experts, width, config.moe_ffn_hidden_size, dtype=dtype))
        for name, size in (("linear_fc1_bias", rows), ("linear_fc2_bias", width)):
            bias = nn.Parameter(torch.empty(experts, size, dtype=dtype)) if config.add_bias_linear else None
            self.register_parameter(name, bias)


class GroupedExperts(StackedExperts):
    """One grouped matrix product per layer over tokens sorted by expert; no padding, no loop over experts.

    Takes the place of Megatron-core's ``SequentialMLP`` behind its token dispatchers.
    """

    def __init__(self, experts: int, config: TransformerConfig, submodules: Any = None, **unused: Any) -> None:
        super().__init__(experts, config)

    def forward(self, tokens: Tensor, tokens_per_expert: Tensor, gates: Tensor) -> tuple[Tensor, None]:
        """Apply each expert to its segment and weight the result by the gates.

        Args:
            tokens: [T, C], those of the first expert first.
            tokens_per_expert: int64 [E]; on the CPU or on the device.
            gates: [T].

        Returns:
            [T, C] and None (biases are in it).
        """
        if tokens.shape[0] == 0:
            # grouped_mm has no kernel for it. Parameters still need a (zero) gradient, and both inputs must be part of
            # the graph: their backward exchanges gradients with ranks that have tokens, which would wait for ever.
            return tokens * gates[:, None] + sum(parameter.sum() * 0 for parameter in self.parameters()), None
        ends = tokens_per_expert.to(tokens.device, non_blocking=True).cumsum(0)
        rows = torch.arange(tokens.shape[0], device=tokens.device)
        own = torch.searchsorted(ends, rows, right=True)
        # Biases by a product with a [T, E] matrix: its backward is a product again, fast and deterministic.
        membership = (own[:, None] == torch.arange(ends.shape[0], device=own.device)).to(tokens.dtype)
        ends = ends.to(torch.int32)
        inner = _grouped_mm(tokens, self.linear_fc1_weight.transpose(1, 2), offs=ends)
        if self.linear_fc1_bias is not None:
            inner = torch.addmm(inner, membership, self.linear_fc1_bias)
        inner = activate(inner, self.config) * gates[:, None]
        output = _grouped_mm(inner, self.linear_fc2_weight.transpose(1, 2), offs=ends)
        if self.linear_fc2_bias is not None:
            output = torch.addmm(output, membership * gates[:, None], self.linear_fc2_bias)
        return output, None


class PaddedExperts(StackedExperts):
    """Batched matrix products over a buffer with the same number of slots for every expert."""

    def forward(self, slots: Tensor) -> Tensor:
        """[E, slots, C] -> [E, slots, C]; empty slots give values that nobody reads."""
        inner = _layer(slots, self.linear_fc1_weight, self.linear_fc1_bias)
        return _layer(activate(inner, self.config), self.linear_fc2_weight, self.linear_fc2_bias)


def _layer(slots: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    product = weight.transpose(1, 2)
    return torch.bmm(slots, product) if bias is None else torch.baddbmm(bias[:, None], slots, product)
