"""FlowAR's flow head: from noisy tokens, their time and the transformer's output to the velocity (``flowmodel.py``).

It sees one scale at a time. Here all scales are one sequence in which each token sees its own scale, so that training
needs one call; drawing hands in a single scale. Blocks are shared by tensor-parallel ranks as the transformer's are.

Shapes: L tokens of K scales, B samples, W width of the head, Z of the transformer, C channels of a token.
"""

import torch.nn.functional as F
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megavar.config.generators.flowar import HEAD_SIZE, FlowARConfig
from megavar.config.parallel import ParallelConfig
from megavar.generators import denoising_mlp
from megavar.generators.flowar.positions import rotary_table
from megavar.transformer.attention import AttentionCore
from megavar.transformer.block import Block
from megavar.transformer.context import ForwardContext
from megavar.transformer.dropout import Dropout
from megavar.transformer.feed_forward import FeedForward
from megavar.transformer.linear import ColumnLinear, OutputLinear
from megavar.transformer.megatron_config import transformer_config
from megavar.transformer.modulation import VAR_ORDER, ModulationNetwork, PositionModulation
from megavar.transformer.norms import PlainRMSNorm, RMSNorm
from megavar.transformer.sequence import SequenceLayout
from megavar.transformer.spec import BlockSpec, attention, feed_forward


def integer_times(times: Tensor) -> Tensor:
    """1000 t without its fraction, computed in float32 as released: in float64 some times fall to the next integer."""
    return (times.float() * 1000).long()


class TimeEmbedding(denoising_mlp.TimeEmbedding):
    """Sinusoids of the integer time, and a network of two layers."""

    @staticmethod
    def sinusoids(times: Tensor) -> Tensor:
        """float [...] -> cosines, then sines, float32 [..., 256]."""
        return denoising_mlp.TimeEmbedding.sinusoids(integer_times(times))


class ColumnLinearWithoutBias(ColumnLinear):
    """A column-parallel layer without bias, although others have one (``add_bias_linear``)."""

    def __init__(self, *args: object, **options: object) -> None:
        super().__init__(*args, **(options | {"bias": False}))


def _attention() -> ModuleSpec:
    return attention("auto", linear_qkv=ColumnLinearWithoutBias, pairs="interleaved")


SPATIAL = BlockSpec(
    norm=ModuleSpec(module=PlainRMSNorm),
    modulation=ModuleSpec(module=PositionModulation, params={"order": VAR_ORDER}),
    attention=_attention(),
    feed_forward=feed_forward(),
    residual=ModuleSpec(module=Dropout),
)
"""``Block_v1`` (S): both halves modulated token by token."""


class CrossAttention(nn.Module):
    """From the head's tokens to the transformer's output of the same scale; rotary positions on both."""

    def __init__(self, config: TransformerConfig, number: int, source: int) -> None:
        """``source``: channels Z of what is attended to."""
        super().__init__()
        width = config.hidden_size
        options = {"config": config, "init_method": lambda weight: weight, "gather_output": False}
        self.query = ColumnLinearWithoutBias(width, width, **options)
        # head x (key, value), so that heads shard
        self.key_value = ColumnLinearWithoutBias(source, 2 * width, **options)
        self.core = AttentionCore(config, number + 1, kernel="auto", pairs="interleaved")
        self.output = OutputLinear(
            width, width, config=config, init_method=lambda weight: weight, bias=True, input_is_parallel=True
        )

    def forward(self, hidden: Tensor, source: Tensor, context: ForwardContext) -> Tensor:
        """[L, B, W], [L, B, Z] -> [L, B, W]."""
        query = self.query(hidden)[0].unflatten(-1, (-1, HEAD_SIZE))
        key, value = self.key_value(source)[0].unflatten(-1, (-1, 2, HEAD_SIZE)).unbind(-2)
        return self.output(self.core(query, key, value, context))[0]


class CrossBlock(nn.Module):
    """``Block_v2`` (L, H): attention modulated by the time alone, cross attention, a network modulated per token."""

    def __init__(self, config: TransformerConfig, trunk: TransformerConfig, number: int) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.layernorm_epsilon
        self.norm = PlainRMSNorm(width, config, eps)
        self.attention_modulation = ModulationNetwork(config, 3)
        self.attention = build_module(_attention(), config=config, layer_number=number + 1)
        self.query_norm = RMSNorm(width, config, eps)
        self.source_norm = RMSNorm(trunk.hidden_size, trunk, eps)
        self.cross_attention = CrossAttention(config, number, trunk.hidden_size)
        self.feed_forward_modulation = ModulationNetwork(config, 3)
        self.feed_forward = FeedForward(config, number)

    def forward(
        self, hidden: Tensor, condition: Tensor, time: Tensor, source: Tensor, context: ForwardContext
    ) -> Tensor:
        """[L, B, W], the same per token, per scale [K, B, W], and [L, B, Z] -> [L, B, W]."""
        context = context.of_block()
        for core in self.modules():
            if isinstance(core, AttentionCore):
                core.prepare(context, hidden.device)
        scale_of_row = context.sequence.segment_index(hidden.device)
        gate, scale, shift = self.attention_modulation(time)[scale_of_row].unbind(-2)
        hidden = hidden + gate * self.attention(self.norm(hidden) * (1 + scale) + shift, context)
        hidden = hidden + self.cross_attention(self.query_norm(hidden), self.source_norm(source), context)
        gate, scale, shift = self.feed_forward_modulation(condition).unbind(-2)
        return hidden + gate * self.feed_forward(self.norm(hidden) * (1 + scale) + shift, context)


class FlowHead(nn.Module):
    """Velocity of noisy tokens."""

    def __init__(self, choice: FlowARConfig, trunk: TransformerConfig, channels: int) -> None:
        """Build it.

        Args:
            trunk: of the transformer, without sequence parallelism: the head has all tokens.
            channels: C.
        """
        super().__init__()
        dtype, width = trunk.params_dtype, choice.head_width
        config = transformer_config(
            ParallelConfig(tensor=trunk.tensor_model_parallel_size), dtype, depth=choice.head_depth, width=width,
            heads=width // HEAD_SIZE, feed_forward=choice.head_feed_forward_size, activation_func=F.gelu,
            gated_linear_unit=True,
        )  # fmt: skip
        self.span, self.cross = choice.rope_side, choice.head_cross_attention
        self.time = TimeEmbedding(width, dtype)
        self.condition = nn.Linear(choice.width, width, dtype=dtype)
        self.input = nn.Linear(channels, width, dtype=dtype)
        self.blocks = nn.ModuleList(
            CrossBlock(config, trunk, number) if self.cross else Block(config, SPATIAL, number, choice.head_depth)
            for number in range(choice.head_depth)
        )
        self.norm = PlainRMSNorm(width, config, config.layernorm_epsilon)
        self.modulation = ModulationNetwork(config, 2)
        self.projection = nn.Linear(width, channels, dtype=dtype)

    def forward(self, noisy: Tensor, times: Tensor, output: Tensor, sides: tuple[int, ...]) -> Tensor:
        """Velocity.

        Args:
            noisy: x_t of square maps of these sides, float32 [B, L, C].
            times: of each map, float32 [B, K].
            output: of the transformer, [B, L, Z].

        Returns:
            float32 [B, L, C].
        """
        layout = SequenceLayout.of_scales(sides, rule="block_diagonal")
        context = ForwardContext(layout, rotary=rotary_table(sides, self.span, HEAD_SIZE, noisy.device))
        time, source = self.time(times.t()), output.transpose(0, 1)
        condition = self.condition(source) + time[layout.segment_index(noisy.device)]
        hidden = self.input(noisy.to(source.dtype).transpose(0, 1))
        for block in self.blocks:
            given = (condition, time, source) if self.cross else (condition,)
            hidden = block(hidden, *given, context)
        shift, scale = self.modulation(condition).unbind(-2)
        return self.projection(self.norm(hidden) * (1 + scale) + shift).float().transpose(0, 1)
