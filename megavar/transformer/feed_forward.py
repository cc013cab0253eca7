"""The dense feed-forward network."""

import torch
from megatron.core import parallel_state
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megavar.transformer.context import ForwardContext
from megavar.transformer.dropout import dropout, prepare_dropout
from megavar.transformer.linear import ColumnLinear, OutputLinear


def activate(inner: Tensor, config: TransformerConfig) -> Tensor:
    """The activation of a first layer's output, [..., F] -> [..., F]; gated: [..., 2 F] (gate, then up) -> [..., F]."""
    assert config.activation_func is not None
    if not config.gated_linear_unit:
        return config.activation_func(inner)
    gate, up = inner.chunk(2, -1)
    return config.activation_func(gate) * up


class FeedForward(nn.Module):
    """C -> F -> C on the layers of Megatron-core's MLP, plain or gated, with dropout of the F inner channels."""

    def __init__(self, config: TransformerConfig, number: int = 0, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.config, self.number, self.dropout = config, number, dropout
        shared = config.tensor_model_parallel_size > 1
        self.tensor_rank = parallel_state.get_tensor_model_parallel_rank() if shared else 0
        submodules = MLPSubmodules(linear_fc1=ColumnLinear, linear_fc2=OutputLinear)
        self.mlp = MLP(config, submodules, ffn_hidden_size=config.ffn_hidden_size)

    def prepare(self, context: ForwardContext, device: torch.device) -> None:
        """Start the draws of the inner channels."""
        prepare_dropout(context, "dropout/inner", self.number, self.config.num_layers, self.dropout)

    def forward(self, hidden: Tensor, context: ForwardContext) -> Tensor:
        """[L, B, C] -> [L, B, C]."""
        inner = activate(self.mlp.linear_fc1(hidden)[0], self.config)
        if self.dropout:
            # The first layer gathers the rows: here every rank has all of them and some of the channels.
            first = self.tensor_rank * inner.shape[-1]
            inner = dropout(inner, context, stream="dropout/inner", rate=self.dropout, first_channel=first)
        output, _ = self.mlp.linear_fc2(inner)
        return output
