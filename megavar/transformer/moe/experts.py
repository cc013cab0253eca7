"""Experts with stacked weights: all experts of a rank in four tensors.

Each expert is the dense block's feed-forward network, C -> F -> C with biases and GELU (tanh). T tokens of this rank's
experts, E experts of this rank, C width, F hidden size.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

_grouped_mm = getattr(F, "grouped_mm", None) or torch._grouped_mm  # public since torch 2.10


class StackedExperts(nn.Module):
    """Weights of E experts. ``parallel/logical.py`` knows the names: each row is one expert's tensor."""

    def __init__(self, experts: int, config: TransformerConfig) -> None:
        super().__init__()
        hidden = config.moe_ffn_hidden_size
        assert hidden is not None
        self.activation = config.activation_func
        dtype, width = config.params_dtype, config.hidden_size
        self.linear_fc1_weight = nn.Parameter(torch.empty(experts, hidden, width, dtype=dtype))
        self.linear_fc1_bias = nn.Parameter(torch.empty(experts, hidden, dtype=dtype))
        self.linear_fc2_weight = nn.Parameter(torch.empty(experts, width, hidden, dtype=dtype))
        self.linear_fc2_bias = nn.Parameter(torch.empty(experts, width, dtype=dtype))


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
        if tokens.shape[0] == 0:  # grouped_mm has no kernel for it; parameters still need a (zero) gradient
            return tokens + sum(parameter.sum() * 0 for parameter in self.parameters()), None
        ends = tokens_per_expert.to(tokens.device, non_blocking=True).cumsum(0)
        rows = torch.arange(tokens.shape[0], device=tokens.device)
        own = torch.searchsorted(ends, rows, right=True)
        # Biases by a product with a [T, E] matrix: its backward is a product again, fast and deterministic.
        membership = F.one_hot(own, ends.shape[0]).to(tokens.dtype)
        ends = ends.to(torch.int32)
        hidden = _grouped_mm(tokens, self.linear_fc1_weight.transpose(1, 2), offs=ends)
        hidden = self.activation(torch.addmm(hidden, membership, self.linear_fc1_bias)) * gates[:, None]
        output = _grouped_mm(hidden, self.linear_fc2_weight.transpose(1, 2), offs=ends)
        return torch.addmm(output, membership * gates[:, None], self.linear_fc2_bias), None


class PaddedExperts(StackedExperts):
    """Batched matrix products over a buffer with the same number of slots for every expert."""

    def forward(self, slots: Tensor) -> Tensor:
        """[E, slots, C] -> [E, slots, C]; empty slots give values that nobody reads."""
        hidden = torch.baddbmm(self.linear_fc1_bias[:, None], slots, self.linear_fc1_weight.transpose(1, 2))
        return torch.baddbmm(
            self.linear_fc2_bias[:, None], self.activation(hidden), self.linear_fc2_weight.transpose(1, 2)
        )
