"""A router with a key of its own."""

from typing import Any

from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional as F

from megavar.transformer.moe.router import Router
from tests.boundary.toy.choices import SharpExperts


class SharpRouter(Router):
    """Softmax of sharpened scores of a linear layer."""

    def __init__(self, config: TransformerConfig, experts: SharpExperts, **place: Any) -> None:
        super().__init__(config, experts, **place)
        self.weight = self.parameter(experts.number, config.hidden_size)
        self.sharpness = experts.sharpness

    def scores(self, hidden: Tensor, kinds: Tensor) -> Tensor:
        """float32 [L, B, M]."""
        return (self.sharpness * F.linear(hidden.float(), self.weight.float())).softmax(-1)
