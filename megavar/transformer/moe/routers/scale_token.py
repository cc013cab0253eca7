"""STMoE (MEPA Eq. 9): the token, in whose embedding its scale is, chooses the experts."""

import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megavar.config.experts.scale_aware import ScaleTokenExperts
from megavar.parallel.parameter_rule import ParameterRule
from megavar.transformer.moe.router import Router


class ScaleTokenRouter(Router):
    """softmax(W (x + SE)), the scale embedding SE only where the choice asks for it."""

    def __init__(self, config: TransformerConfig, experts: ScaleTokenExperts, *, block: int, kinds: int) -> None:
        super().__init__(config, experts, block=block, kinds=kinds)
        self.weight = self.parameter(experts.number, config.hidden_size)
        self.scale_embedding: nn.Parameter | None = None
        if experts.scale_embedding_in_router:
            self.scale_embedding = self.parameter(kinds, config.hidden_size)

    @classmethod
    def rule(cls, name: str) -> ParameterRule | None:
        """The scale embedding does not decay, as the generator's does not."""
        return ParameterRule(decays=False) if name == "scale_embedding" else None

    def scores(self, hidden: Tensor, kinds: Tensor) -> Tensor:
        """[L, B, C] -> float32 [L, B, M]."""
        tokens = hidden.float()
        if self.scale_embedding is not None:
            tokens = tokens + self.scale_embedding.float()[kinds].unsqueeze(1)
        return F.linear(tokens, self.weight.float()).softmax(-1)
