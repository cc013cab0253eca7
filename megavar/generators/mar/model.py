"""MAR: p(masked tokens | known tokens, class or text), each by diffusion (arXiv:2406.11838, ``models/mar.py``).

    rows      = buffer of the condition, tokens
    encoder   = blocks(norm(rows + position)), seeing buffer and known tokens
    decoder   = blocks(linear(norm(encoder)), a mask token where a token is masked, + position), seeing all
    condition = norm(decoder) + position, per token
    output    = head(x_i, i, condition)                                   noise and variance

The authors leave masked rows out of the encoder; here they are there and nobody sees them, which is the same for all
others and lets samples mask different numbers. Shapes: B samples, P rows of buffer, L tokens, C width.
"""

from collections.abc import Mapping
from copy import copy
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megavar.config.generators.mar import MARConfig
from megavar.config.parallel import ParallelConfig
from megavar.config.token_space import TokenSpace
from megavar.generators import denoising_mlp
from megavar.generators.base import Embedded, Generator, TokenSequence
from megavar.generators.denoising_mlp import DenoisingMLP
from megavar.generators.inputs import MaskedInputs
from megavar.parallel.parameter_rule import ParameterRule
from megavar.transformer.block import Block
from megavar.transformer.context import ForwardContext
from megavar.transformer.dropout import Dropout
from megavar.transformer.megatron_config import transformer_config
from megavar.transformer.norms import AffineLayerNorm
from megavar.transformer.sequence import SequenceLayout
from megavar.transformer.spec import BlockSpec, attention, feed_forward


class Embedding(nn.Module):
    """Condition and tokens with positions."""

    def __init__(self, choice: MARConfig, space: TokenSpace, config: TransformerConfig) -> None:
        super().__init__()
        width, dtype = choice.width, config.params_dtype
        self.buffer, self.nothing = choice.buffer, None
        self.condition = nn.Embedding(choice.classes or choice.text_vocabulary or 0, width, dtype=dtype)
        if choice.classes is not None:
            self.nothing = nn.Parameter(torch.empty(width, dtype=dtype))
        self.projection = nn.Linear(space.channels, width, dtype=dtype)
        self.position = nn.Parameter(torch.empty(choice.buffer + space.length, width, dtype=dtype))
        self.norm = AffineLayerNorm(width, config, config.layernorm_epsilon)

    def forward(self, inputs: MaskedInputs) -> Tensor:
        """[B, P + L, C]."""
        tokens = self.projection(inputs.tokens.to(self.projection.weight.dtype))
        return self.norm(torch.cat([self._buffer(inputs), tokens], 1) + self.position)

    def _buffer(self, inputs: MaskedInputs) -> Tensor:
        if self.nothing is None:
            assert inputs.text is not None
            return self.condition(inputs.text)
        classes, none = self.condition.num_embeddings, inputs.labels >= self.condition.num_embeddings
        vector = torch.where(none[:, None], self.nothing, self.condition(inputs.labels.clamp(max=classes - 1)))
        return vector[:, None].expand(-1, self.buffer, -1)


class Junction(nn.Module):
    """Between encoder and decoder."""

    def __init__(self, choice: MARConfig, config: TransformerConfig, rows: int) -> None:
        super().__init__()
        width, dtype = choice.width, config.params_dtype
        self.norm = AffineLayerNorm(width, config, config.layernorm_epsilon)
        self.projection = nn.Linear(width, width, dtype=dtype)
        self.mask_token = nn.Parameter(torch.empty(width, dtype=dtype))
        self.position = nn.Parameter(torch.empty(rows, width, dtype=dtype))
        for parameter in (*self.projection.parameters(), self.mask_token, self.position):
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: Tensor, context: ForwardContext) -> Tensor:
        """This rank's rows [rows, B, C] -> [rows, B, C]."""
        assert context.valid is not None
        first = context.first_row(hidden.shape[0])
        own = slice(first, first + hidden.shape[0])
        known = context.valid.t()[own, :, None]
        position = F.pad(self.position, (0, 0, 0, context.sequence.padding))[own, None]
        return torch.where(known, self.projection(self.norm(hidden)), self.mask_token) + position


class DecoderBlock(Block):
    """Sees all places; the first one joins the decoder to the encoder."""

    def __init__(self, *args: Any, junction: Junction | None = None, **options: Any) -> None:
        super().__init__(*args, **options)
        self.junction = junction

    def forward(self, hidden: Tensor, condition: Tensor | None, context: ForwardContext) -> Tensor:
        """Rows [rows, B, C] -> [rows, B, C]."""
        if self.junction is not None:
            hidden = self.junction(hidden, context)
        everything = copy(context)
        everything.valid, everything._visibility = None, None
        return super().forward(hidden, condition, everything)


class Conditioning(nn.Module):
    """From the last hidden states to what the head is told."""

    def __init__(self, choice: MARConfig, space: TokenSpace, config: TransformerConfig) -> None:
        super().__init__()
        self.norm = AffineLayerNorm(choice.width, config, config.layernorm_epsilon)
        self.position = nn.Parameter(torch.empty(space.length, choice.width, dtype=config.params_dtype))

    def forward(self, hidden: Tensor) -> Tensor:
        """[L, B, C] -> [B, L, C]."""
        return self.norm(hidden).transpose(0, 1) + self.position


class MAR(Generator):
    """A stage. The prediction is the head's output for the noisy tokens, float32 [B, M, L, 2 channels]; where the
    inputs hold none, its condition [B, L, C], for :meth:`denoise`."""

    choice: MARConfig

    @classmethod
    def layers(cls, choice: MARConfig, parallel: ParallelConfig, dtype: torch.dtype) -> TransformerConfig:
        """Exact GELU, biases everywhere."""
        return transformer_config(
            parallel, dtype, depth=choice.depth, width=choice.width, heads=choice.heads,
            feed_forward=choice.feed_forward_size, activation_func=F.gelu,
        )  # fmt: skip

    def build_first(self) -> None:
        """Condition, tokens, positions."""
        self.embedding = Embedding(self.choice, self.space, self.unsharded)

    def spec(self, number: int) -> BlockSpec:
        """timm's block: layer norm, attention, network, dropout."""
        rate = self.choice.dropout
        return BlockSpec(
            norm=ModuleSpec(module=AffineLayerNorm),
            modulation=None,
            attention=attention(self.choice.attention_kernel),
            feed_forward=feed_forward(dropout=rate),
            residual=ModuleSpec(module=Dropout, params={"rate": rate}),
        )

    def block(self, number: int) -> Block:
        """Of the encoder, or of the decoder."""
        first, rows = self.choice.encoder_depth, self.choice.buffer + self.space.length
        if number < first:
            return super().block(number)
        junction = Junction(self.choice, self.config, rows) if number == first else None
        return DecoderBlock(
            self.config, self.spec(number), number, self.config.num_layers, recompute=self.recompute, junction=junction
        )

    def build_last(self) -> None:
        """Last norm and positions, and the diffusion head."""
        self.conditioning = Conditioning(self.choice, self.space, self.unsharded)
        channels = self.space.channels
        self.head = DenoisingMLP(self.choice.head, self.unsharded, channels, 2 * channels)

    def sequence(self, inputs: MaskedInputs) -> TokenSequence:
        """One segment; the encoder's blocks do not see what is masked."""
        before = inputs.masked.new_ones(len(inputs.masked), self.choice.buffer)
        layout = SequenceLayout((self.choice.buffer + self.space.length,), rule="full")
        return TokenSequence(layout, valid=torch.cat([before, ~inputs.masked], 1), sample_keys=inputs.sample_keys)

    def embed(self, inputs: MaskedInputs) -> Embedded:
        """Buffer and tokens."""
        return Embedded(self.embedding(inputs))

    def predict(self, hidden: Tensor, conditions: Mapping[str, Tensor], inputs: MaskedInputs) -> Tensor:
        """[P + L, B, C] -> float32 [B, M, L, 2 channels], or the head's condition [B, L, C]."""
        condition: Tensor = self.conditioning(hidden[self.choice.buffer :])
        if inputs.noisy is None:
            return condition
        assert inputs.times is not None
        return self.denoise(inputs.noisy, inputs.times, condition[:, None].expand(-1, inputs.noisy.shape[1], -1, -1))

    def denoise(self, noisy: Tensor, times: Tensor, condition: Tensor) -> Tensor:
        """The head's output, float32 [..., 2 channels], of noisy tokens [..., channels] at times int64 [...]."""
        return self.head(noisy, times, condition)

    def gather(self, prediction: Tensor) -> Tensor:
        """Complete on every rank."""
        return prediction

    # -- parameters -------------------------------------------------------------------------------------------------

    def initial_value(self, name: str, value: Tensor, generator: torch.Generator) -> None:
        """The reference's: Xavier's for matrices, normal with 0.02 for tables and vectors; the head's own."""
        if name.startswith("head."):
            denoising_mlp.initial_value(name.removeprefix("head."), value, generator)
        elif name.endswith(("position", "mask_token", "nothing", "condition.weight")):
            value.normal_(std=0.02, generator=generator)
        elif name.endswith("bias"):
            value.zero_()
        elif value.ndim == 1:
            value.fill_(1.0)
        else:
            nn.init.xavier_uniform_(value, generator=generator)

    def own_rule(self, name: str) -> ParameterRule:
        """Weight decay on all but biases, norms and the whole diffusion head, as released."""
        return ParameterRule(decays=not (name.endswith("bias") or "norm" in name or name.startswith("head.")))

    def example(self, images: int) -> MaskedInputs:
        """Zeros, three quarters masked; four draws of noise as in training."""
        length, channels = self.space.length, self.space.channels
        text = None if self.choice.classes else torch.zeros(images, self.choice.buffer, dtype=torch.int64)
        return MaskedInputs(
            labels=torch.zeros(images, dtype=torch.int64),
            tokens=torch.zeros(images, length, channels),
            masked=(torch.arange(length) < 0.75 * length).expand(images, -1),
            text=text,
            noisy=torch.zeros(images, 4, length, channels),
            times=torch.zeros(images, 4, length, dtype=torch.int64),
            sample_keys=torch.arange(images),
        )
