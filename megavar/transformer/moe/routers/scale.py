"""SMoE (MEPA Eq. 8): the scale alone chooses the experts."""

import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megavar.config.experts.scale_aware import ScaleExperts
from megavar.parallel.parameter_rule import ParameterRule
from megavar.transformer.moe.router import Router


class ScaleRouter(Router):
    """softmax(W SE): all tokens of a scale take the same experts."""

    def __init__(self, config: TransformerConfig, experts: ScaleExperts, *, block: int, kinds: int) -> None:
        super().__init__(config, experts, block=block, kinds=kinds)
        self.weight = self.parameter(experts.number, config.hidden_size)
        self.scale_embedding = self.parameter(kinds, config.hidden_size)

    @classmethod
    def rule(cls, name: str) -> ParameterRule | None:
        """The scale embedding does not decay, as the generator's does not."""
        return ParameterRule(decays=False) if name == "scale_embedding" else None

    def scores(self, hidden: Tensor, kinds: Tensor) -> Tensor:
        """[L, B, C] -> float32 [L, B, M]."""
        tokens = self.scale_embedding.float()[kinds].unsqueeze(1).expand(-1, hidden.shape[1], -1)
        return F.linear(tokens, self.weight.float()).softmax(-1)
