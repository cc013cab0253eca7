"""FlowAR: p(latent | class), one token map after the other, each by flow matching (arXiv:2412.15205, ``flowar.py``).

    sequence  = [class] ++ projection(inputs of scales 2 to K), scale-causal      inputs: the coarser map, resized
    encoder   = blocks(norm(sequence + position))
    decoder   = blocks(linear(norm(encoder)) + position)                          all modulated by the class
    condition = norm(decoder) + position                                          per token of all scales
    velocity  = head(x_t, t, condition)                                           within each scale

Encoder and decoder are one stack of blocks: what stands between them belongs to the decoder's first block.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megavar.config.generators.flowar import FlowARConfig
from megavar.config.parallel import ParallelConfig
from megavar.config.token_space import TokenSpace
from megavar.generators.base import Embedded, Generator, TokenSequence
from megavar.generators.flowar.head import FlowHead
from megavar.generators.flowar.positions import LearnedPositions, rotary_table
from megavar.generators.inputs import FlowScaleInputs
from megavar.parallel.parameter_rule import ParameterRule
from megavar.transformer.block import Block
from megavar.transformer.context import ForwardContext
from megavar.transformer.dropout import Dropout
from megavar.transformer.megatron_config import transformer_config
from megavar.transformer.modulation import ImageModulation
from megavar.transformer.norms import PlainRMSNorm, RMSNorm
from megavar.transformer.sequence import SequenceLayout
from megavar.transformer.spec import BlockSpec, attention, feed_forward


class Embedding(nn.Module):
    """The class, and projected maps, with positions."""

    def __init__(self, choice: FlowARConfig, config: TransformerConfig, channels: int) -> None:
        super().__init__()
        width, dtype = choice.width, config.params_dtype
        self.classes = nn.Embedding(choice.classes + 1, width, dtype=dtype)
        self.projection = nn.Linear(channels, width, dtype=dtype)
        self.position = LearnedPositions(choice.scales, width, dtype)
        self.norm = RMSNorm(width, config, config.layernorm_epsilon)

    def forward(self, inputs: FlowScaleInputs, scales: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Hidden states [B, L, C] and the class's vector [B, C]."""
        condition = self.classes(inputs.labels)
        rows = [condition[:, None]] if 0 in scales else []
        if inputs.features is not None:
            rows.append(self.projection(inputs.features.to(condition.dtype)))
        return self.norm(torch.cat(rows, 1) + self.position(scales)), condition


class Junction(nn.Module):
    """Between encoder and decoder."""

    def __init__(self, choice: FlowARConfig, config: TransformerConfig) -> None:
        super().__init__()
        width, dtype, partial = choice.width, config.params_dtype, config.sequence_parallel
        self.norm = RMSNorm(width, config, config.layernorm_epsilon)
        self.projection = nn.Linear(width, width, dtype=dtype)
        for parameter in self.projection.parameters():
            parameter.sequence_parallel = partial  # type: ignore[attr-defined]
        self.position = LearnedPositions(choice.scales, width, dtype, partial=partial)

    def forward(self, hidden: Tensor, context: ForwardContext) -> Tensor:
        """This rank's rows [L, B, C] -> [L, B, C]."""
        assert context.sequence.kinds is not None
        position = F.pad(self.position(context.sequence.kinds), (0, 0, 0, context.sequence.padding))
        first = context.first_row(hidden.shape[0])
        return self.projection(self.norm(hidden)) + position[first : first + hidden.shape[0], None]


class JoiningBlock(Block):
    """The decoder's first block."""

    def __init__(self, choice: FlowARConfig, config: TransformerConfig, *args: object, **options: object) -> None:
        super().__init__(config, *args, **options)  # type: ignore[arg-type]
        self.junction = Junction(choice, config)

    def forward(self, hidden: Tensor, condition: Tensor | None, context: ForwardContext) -> Tensor:
        """Join, then as every block."""
        return super().forward(self.junction(hidden, context), condition, context)


class Conditioning(nn.Module):
    """From the last hidden states to what the flow head is told."""

    def __init__(self, choice: FlowARConfig, config: TransformerConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(choice.width, config, config.layernorm_epsilon)
        self.position = LearnedPositions(choice.scales, choice.width, config.params_dtype)

    def forward(self, hidden: Tensor, scales: tuple[int, ...]) -> Tensor:
        """[L, B, C] -> [B, L, C]."""
        return (self.norm(hidden) + self.position(scales)[:, None]).transpose(0, 1)


class FlowAR(Generator):
    """A stage. The prediction is the velocity of the noisy tokens, float32 [B, L, channels]; where the inputs hold
    none, the flow head's condition, [B, L, C], for :meth:`velocity`."""

    choice: FlowARConfig

    @classmethod
    def layers(cls, choice: FlowARConfig, parallel: ParallelConfig, dtype: torch.dtype) -> TransformerConfig:
        """Gated exact GELU, biases everywhere."""
        return transformer_config(
            parallel,
            dtype,
            depth=choice.depth,
            width=choice.width,
            heads=choice.heads,
            feed_forward=choice.feed_forward_size,
            experts=choice.experts,
            activation_func=F.gelu,
            gated_linear_unit=True,
        )

    def kinds_of(self, space: TokenSpace) -> int:  # type: ignore[override]  # scales are the generator's own here
        """One per scale."""
        return len(self.choice.scales)

    def build_first(self) -> None:
        """Classes, projection, positions."""
        self.embedding = Embedding(self.choice, self.unsharded, self.space.channels)

    def spec(self, number: int) -> BlockSpec:
        """Root-mean-square norm without weight, modulation per image in VAR's order, rotary positions, dropout."""
        rate = self.choice.dropout
        return BlockSpec(
            norm=ModuleSpec(module=PlainRMSNorm),
            modulation=ModuleSpec(module=ImageModulation),
            attention=attention(self.choice.attention_kernel, pairs="interleaved"),
            feed_forward=feed_forward(self.choice.experts, self.kinds, rate),
            residual=ModuleSpec(module=Dropout, params={"rate": rate}),
        )

    def block(self, number: int) -> Block:
        """The decoder's first one joins it to the encoder."""
        if number != self.choice.encoder_depth:
            return super().block(number)
        return JoiningBlock(
            self.choice, self.config, self.spec(number), number, self.config.num_layers, recompute=self.recompute
        )

    def build_last(self) -> None:
        """Last norm and positions, and the flow head."""
        self.conditioning = Conditioning(self.choice, self.unsharded)
        self.head = FlowHead(self.choice, self.unsharded, self.space.channels)

    # -- one pass ---------------------------------------------------------------------------------------------------

    def scales_of(self, inputs: FlowScaleInputs) -> tuple[int, ...]:
        """Numbers of the scales that the inputs hold."""
        return tuple(range(len(self.choice.scales))) if inputs.scale is None else (inputs.scale,)

    def sides_of(self, inputs: FlowScaleInputs) -> tuple[int, ...]:
        """Their sides."""
        return tuple(self.choice.scales[number] for number in self.scales_of(inputs))

    def sequence(self, inputs: FlowScaleInputs) -> TokenSequence:
        """Maps, coarse to fine; the first one is the class's row."""
        sides, head_size = self.sides_of(inputs), self.choice.width // self.choice.heads
        layout = SequenceLayout.of_scales(sides, kinds=self.scales_of(inputs))
        table = rotary_table(sides, self.choice.rope_side, head_size, inputs.labels.device)
        return TokenSequence(layout, table, sample_keys=inputs.sample_keys)

    def embed(self, inputs: FlowScaleInputs) -> Embedded:
        """Maps, and the class as condition."""
        hidden, condition = self.embedding(inputs, self.scales_of(inputs))
        return Embedded(hidden, {"image": condition[:, None]})

    def condition_rows(self) -> Mapping[str, int]:
        """The class's row."""
        return {"image": 1}

    def predict(self, hidden: Tensor, conditions: Mapping[str, Tensor], inputs: FlowScaleInputs) -> Tensor:
        """Velocity float32 [B, L, channels], or the head's condition [B, L, C]."""
        condition = self.conditioning(hidden, self.scales_of(inputs))
        if inputs.noisy is None:
            return condition
        assert inputs.times is not None
        return self.head(inputs.noisy, inputs.times, condition, self.sides_of(inputs))

    def gather(self, prediction: Tensor) -> Tensor:
        """Complete on every rank."""
        return prediction

    def velocity(self, noisy: Tensor, times: Tensor, condition: Tensor, scale: int) -> Tensor:
        """Velocity of the tokens of one scale while drawing.

        Args:
            noisy: float32 [B, L_k, channels].
            times: float32 [B].
            condition: what :meth:`step` has predicted for the scale, [B, L_k, C].
        """
        return self.head(noisy, times[:, None], condition, (self.choice.scales[scale],))

    # -- parameters -------------------------------------------------------------------------------------------------

    def initial_value(self, name: str, value: Tensor, generator: torch.Generator) -> None:
        """Xavier's for all matrices, also the flow head's last one and its modulations: the released constructor gives
        them zeros and then overwrites them. Tables: normal with 0.02 (MAR's)."""
        if name.endswith("bias"):
            value.zero_()
        elif value.ndim == 1:
            value.fill_(1.0)
        elif name.endswith(("position.table", "classes.weight")):
            value.normal_(std=0.02, generator=generator)
        else:
            nn.init.xavier_uniform_(value, generator=generator)

    def own_rule(self, name: str) -> ParameterRule:
        """Weight decay on all but biases and norms: on tables and the flow head, too, as released."""
        return ParameterRule(decays=not (name.endswith("bias") or "norm" in name))

    def example(self, images: int) -> FlowScaleInputs:
        """Class 0, 1, ... and zeros."""
        first, channels = self.choice.scales[0] ** 2, self.space.channels
        return FlowScaleInputs(
            labels=torch.arange(images) % self.choice.classes,
            features=torch.zeros(images, self.choice.length - first, channels),
            noisy=torch.zeros(images, self.choice.length, channels),
            times=torch.zeros(images, len(self.choice.scales)),
            sample_keys=torch.arange(images),
        )
