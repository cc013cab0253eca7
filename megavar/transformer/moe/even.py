"""A mixture whose experts get equal loads, whatever its router says: what the planner measures.

Where a token goes depends on its values, and tensors without memory have none. What a mixture costs depends on how many
copies of tokens its experts compute, so one expert computes them all.
"""

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megavar.config.experts.base import ExpertsChoice
from megavar.transformer.moe.router import Router, Routing


class EvenMixture(nn.Module):
    """A mixture's router beside one expert, which computes as many rows as all of this rank's experts do together."""

    def __init__(self, router: Router, config: TransformerConfig, experts: ExpertsChoice) -> None:
        super().__init__()
        self.router, self.choice = router, experts
        self.experts = EvenExperts(config)

    def forward(self, hidden: Tensor, routing: Routing) -> tuple[Tensor, None]:
        """[L, B, C] -> [L, B, C] and None."""
        tokens = hidden.flatten(0, 1)
        assert self.router.context is not None
        rows = round(tokens.shape[0] * self.choice.copies(self.router.context.sequence.sizes))
        source = torch.arange(rows, device=tokens.device) % tokens.shape[0]
        computed = self.experts(tokens[source], routing.gates.flatten()[:rows])
        combined = torch.zeros_like(tokens).scatter_add(0, source[:, None].expand_as(computed), computed)
        return combined.view(hidden.shape), None


class EvenExperts(nn.Module):
    """One expert's feed-forward network, weighted by gates."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        width, hidden, dtype = config.hidden_size, config.moe_ffn_hidden_size, config.params_dtype
        assert hidden is not None
        self.activation, self.gated = config.activation_func, config.gated_linear_unit
        self.first = nn.Linear(width, hidden * (2 if self.gated else 1), config.add_bias_linear, dtype=dtype)
        self.second = nn.Linear(hidden, width, config.add_bias_linear, dtype=dtype)

    def forward(self, tokens: Tensor, gates: Tensor) -> Tensor:
        """[T, C], [T] -> [T, C]."""
        hidden = self.first(tokens)
        if self.gated:
            gate, hidden = hidden.chunk(2, -1)
            hidden = self.activation(gate) * hidden
        else:
            hidden = self.activation(hidden)
        output = F.linear(hidden * gates[:, None], self.second.weight)
        return output if self.second.bias is None else output + self.second.bias * gates[:, None]
