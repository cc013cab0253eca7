"""AliTok: p(tokens | class), one token after the other (arXiv:2506.05289, ``modeling/ar.py``).

    row 0 class, row 1 + i token i                     no start row, no absolute positions, no modulation
    queries and keys turn: the class not at all (zeroed), the first P tokens by their place on a line,
                           the others by row and column of a grid, both counted from P
    row i predicts token i                             in any order where rows are told which place they predict

It reads :class:`~megavar.generators.inputs.RasterInputs`, whose rows are one more: start row, class, tokens.

Shapes: B samples, C width, V codebook size, D head size.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megavar.config.generators.alitok import AliTokConfig
from megavar.config.parallel import ParallelConfig
from megavar.config.token_space import TokenSpace
from megavar.errors import ConfigError
from megavar.generators.base import Embedded, TokenSequence
from megavar.generators.inputs import RasterInputs
from megavar.generators.raster_transformer import RasterTransformer, TokenHead, TokenTable
from megavar.transformer.context import ForwardContext
from megavar.transformer.dropout import dropout, prepare_dropout
from megavar.transformer.megatron_config import transformer_config
from megavar.transformer.norms import RMSNorm
from megavar.transformer.rotary import Table, line_table, plane_table
from megavar.transformer.sequence import SequenceLayout
from megavar.transformer.spec import BlockSpec, llama_block

EPSILON = 1e-5
"""Of all norms."""


def rotary_table(prefix: int, grid: int, channels: int, device: torch.device | None = None) -> Table:
    """Cosines and sines of all rows, float32 [1 + prefix + grid * grid, channels / 2]; those of the class are zero."""
    line = line_table(torch.arange(prefix, device=device), channels)
    places = torch.arange(grid * grid, device=device)
    plane = plane_table(prefix + places // grid, prefix + places % grid, channels)
    nothing = torch.zeros(1, channels // 2, device=device)
    return torch.cat([nothing, line[0], plane[0]]), torch.cat([nothing, line[1], plane[1]])


class Embedding(TokenTable):
    """Class and tokens to hidden states, which may know the place of the token that they predict."""

    def __init__(self, choice: AliTokConfig, space: TokenSpace, dtype: torch.dtype) -> None:
        super().__init__(choice, space, dtype)
        told = choice.target_positions
        self.target = nn.Parameter(torch.empty(space.length, choice.width, dtype=dtype)) if told else None

    def forward(self, inputs: RasterInputs) -> Tensor:
        """[B, rows, C] of the rows from ``inputs.start`` on."""
        hidden = self.tokens(inputs.ids)
        if inputs.start == 0:
            hidden = torch.cat([self.classes(inputs.labels)[:, None], hidden], 1)
        if self.target is None:
            return hidden
        first, length = max(inputs.start - 1, 0), len(self.target)
        rows = torch.arange(first, first + hidden.shape[1], device=hidden.device)
        places = rows.clamp(max=length - 1) if inputs.order is None else inputs.order[:, rows.clamp(max=length - 1)]
        return hidden + self.target[places] * (rows < length)[:, None]


class AliTok(RasterTransformer):
    """A stage of AliTok's transformer. The prediction is its logits: float32 [B, rows, V / tensor-parallel size]."""

    choice: AliTokConfig

    @classmethod
    def layers(cls, choice: AliTokConfig, parallel: ParallelConfig, dtype: torch.dtype) -> TransformerConfig:
        """Gated SiLU network without biases; attention's layers have some."""
        return transformer_config(
            parallel,
            dtype,
            depth=choice.depth,
            width=choice.width,
            heads=choice.heads,
            feed_forward=choice.feed_forward_size,
            experts=choice.experts,
            layernorm_epsilon=EPSILON,
            gated_linear_unit=True,
            activation_func=F.silu,
            add_bias_linear=False,
            add_qkv_bias=True,
        )

    def build_first(self) -> None:
        """One table.

        Raises:
            ConfigError: an image has more tokens than the rotary table rows.
        """
        choice, rows = self.choice, self.choice.prefix_tokens + self.choice.grid**2
        if self.space.length > rows:
            raise ConfigError(
                f"The tokenizer's images have {self.space.length} tokens, but generator.prefix_tokens="
                f"{choice.prefix_tokens} and generator.grid={choice.grid} have places for {rows}. For a grid of codes "
                f"set prefix_tokens: 0 and grid to its side; for a line prefix_tokens to its length."
            )
        self.embedding = Embedding(choice, self.space, self.config.params_dtype)

    def spec(self, number: int) -> BlockSpec:
        """RMSNorm of hidden states and heads, rotary positions, dropout."""
        choice = self.choice
        return llama_block(
            kernel=choice.attention_kernel,
            head_norm=True,
            projection_bias=True,
            pairs="interleaved",
            dropout=choice.dropout,
            experts=choice.experts,
        )

    def build_last(self) -> None:
        """Norm and head."""
        self.norm = RMSNorm(self.choice.width, self.unsharded, EPSILON)
        self.head = TokenHead(self.unsharded, self.choice, self.space)

    def sequence(self, inputs: RasterInputs) -> TokenSequence:
        """One causal segment."""
        self._require_raster(inputs)
        rows = inputs.ids.shape[1] + (1 if inputs.start == 0 else 0)
        first, choice = max(inputs.start - 1, 0), self.choice
        cos, sin = rotary_table(choice.prefix_tokens, choice.grid, choice.width // choice.heads, inputs.labels.device)
        rotary = cos[first : first + rows], sin[first : first + rows]
        if inputs.order is not None:
            places = F.pad(1 + inputs.order[:, : rows - 1], (1, 0))  # the class's row stays the first
            rotary = cos[places], sin[places]
        return TokenSequence(SequenceLayout((rows,), rule="causal"), rotary, sample_keys=inputs.sample_keys)

    def embed(self, inputs: RasterInputs) -> Embedded:
        """The class's row, then the tokens'."""
        hidden = self.embedding(inputs)
        rate = self.choice.token_dropout
        if self.training and inputs.sample_keys is not None and rate:
            layout = SequenceLayout((hidden.shape[1],), rule="causal")
            context = ForwardContext(layout, seed=self.seed, sample_keys=inputs.sample_keys)
            prepare_dropout(context, "dropout/tokens", 0, 1, rate)
            hidden = dropout(hidden.transpose(0, 1), context, stream="dropout/tokens", rate=rate).transpose(0, 1)
        return Embedded(hidden)

    def predict(self, hidden: Tensor, conditions: Mapping[str, Tensor], inputs: RasterInputs) -> Tensor:
        """[rows, B, C] -> float32 logits [B, rows, V / tensor-parallel size]."""
        return self.head(self.norm(hidden))

    def starts_at_zero(self, name: str) -> bool:
        """The head, as the reference's; where it is tied, the layer before its code vectors."""
        return name in ("head.projection.weight", "head.to_codes.weight")

    def _require_raster(self, inputs: RasterInputs) -> None:
        if inputs.order is not None and not self.choice.any_order:
            raise ConfigError(
                "recipe.random_order reads images in random order, but rows of the generator 'alitok' do not know "
                "which token they predict. Remove recipe.random_order, or set generator.target_positions=true."
            )
