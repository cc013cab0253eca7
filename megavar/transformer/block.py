"""The transformer block: Megatron-core attention and feed-forward network under VAR's adaptive norm.

Hidden states are Megatron's [L, B, C] (sequence first, so that sequence parallelism shards L).
"""

from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megavar.config.generators.var import VARConfig
from megavar.transformer.adaptive_norm import Modulation, ModulationOffset, for_sharded_tokens, normalize
from megavar.transformer.attention import build_self_attention
from megavar.transformer.context import ForwardContext
from megavar.transformer.moe.layer import ExpertFeedForward


class FeedForward(nn.Module):
    """Megatron-core's MLP with its output bias added: C -> 4C -> C, GELU (tanh)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        submodules = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
        self.mlp = MLP(config, submodules, ffn_hidden_size=config.ffn_hidden_size)

    def forward(self, hidden: Tensor, context: ForwardContext) -> Tensor:
        """[L, B, C] -> [L, B, C]."""
        output, bias = self.mlp(hidden)
        return output + bias


class Block(nn.Module):
    """x += gate_1 attention(norm(x) (1 + scale_1) + shift_1), then the same around the feed-forward network."""

    def __init__(
        self, config: TransformerConfig, generator: VARConfig, number: int, scales: int, *, recompute: str
    ) -> None:
        super().__init__()
        self.config = config
        self.number = number
        self.drop_path_rate = generator.drop_path_rate * number / max(generator.depth - 1, 1)
        self.modulation = ModulationOffset(config) if generator.shared_adaptive_norm else Modulation(config, 6)
        self.attention = build_self_attention(
            config,
            number,
            kernel=generator.attention_kernel,
            qk_l2_norm=generator.qk_l2_norm,
            recompute=recompute == "selective",
        )
        self.feed_forward: nn.Module
        if generator.experts is None:
            self.feed_forward = FeedForward(config)
        else:
            self.feed_forward = ExpertFeedForward(config, generator.experts, number, scales)

    def forward(self, hidden: Tensor, condition: Tensor, context: ForwardContext) -> Tensor:
        """One block.

        Args:
            hidden: [L, B, C] (under sequence parallelism L / tensor-parallel size rows).
            condition: [B, C], or [B, 6, C] where all blocks share one modulation network.
            context: see :class:`ForwardContext`.

        Returns:
            [L, B, C].
        """
        modulation = for_sharded_tokens(self.modulation(condition), self.config)
        gate_1, gate_2, scale_1, scale_2, shift_1, shift_2 = modulation.unbind(1)  # VAR's order, not DiT's
        attended, bias = self.attention(normalize(hidden) * (1 + scale_1) + shift_1, context)
        hidden = hidden + self._drop((attended + bias) * gate_1, "drop_path/attention", context)
        transformed = self.feed_forward(normalize(hidden) * (1 + scale_2) + shift_2, context)
        return hidden + self._drop(transformed * gate_2, "drop_path/feed_forward", context)

    def _drop(self, branch: Tensor, stream: str, context: ForwardContext) -> Tensor:
        keep = context.keep_mask(stream, self.number, self.drop_path_rate)
        return branch if keep is None else branch * keep.to(branch.dtype)[:, None]
