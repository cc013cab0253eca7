"""RAR: p(tokens | class), one token after the other in any order (arXiv:2411.00776, ``modeling/rar.py``).

    row 0 start, row 1 class, row 2 + i token of step i
    hidden    = embedding + position of the token in the image + position of the token that is to be predicted
    condition = class + step, per row: modulates every block and the head
    row 1 + i predicts the token of step i

Shapes: B samples, rows of the sequence, C width, V codebook size.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megavar.config.generators.rar import RARConfig
from megavar.config.parallel import ParallelConfig
from megavar.config.token_space import TokenSpace
from megavar.generators.base import Embedded, TokenSequence
from megavar.generators.inputs import RasterInputs
from megavar.generators.raster_transformer import RasterTransformer, TokenHead, TokenTable
from megavar.parallel.parameter_rule import ParameterRule
from megavar.transformer.megatron_config import transformer_config
from megavar.transformer.modulation import ModulationNetwork
from megavar.transformer.norms import normalize
from megavar.transformer.sequence import SequenceLayout
from megavar.transformer.spec import BlockSpec, rar_block

PREFIX = 2
"""Rows before the first token: start and class."""


class Embedding(TokenTable):
    """Classes and tokens to hidden states and to the condition of each row."""

    def __init__(self, choice: RARConfig, space: TokenSpace, dtype: torch.dtype) -> None:
        super().__init__(choice, space, dtype)
        self.length = space.length
        width, rows = choice.width, space.length + choice.spare_positions
        self.begin = nn.Parameter(torch.empty(width, dtype=dtype))
        self.position = nn.Parameter(torch.empty(rows, width, dtype=dtype))
        self.target = nn.Parameter(torch.empty(rows, width, dtype=dtype))
        self.step = nn.Parameter(torch.empty(space.length + choice.spare_steps, width, dtype=dtype))

    def forward(self, inputs: RasterInputs) -> tuple[Tensor, Tensor]:
        """Hidden states [B, rows, C] and conditions [B, rows, C] of the rows from ``inputs.start`` on."""
        condition, hidden = self.classes(inputs.labels), self.tokens(inputs.ids)
        first = inputs.start
        if first == 0:
            prefix = torch.stack([self.begin.expand_as(condition), condition], 1)
            hidden = torch.cat([prefix, hidden], 1)
        rows = torch.arange(first, first + hidden.shape[1], device=hidden.device)
        hidden = hidden + self.position[self._places(inputs, rows)] + self._targets(inputs, rows)
        return hidden, condition[:, None] + self.step[rows]

    def _places(self, inputs: RasterInputs, rows: Tensor) -> Tensor:
        """Row of the table of positions for each row of the sequence, int64 [rows] or [B, rows]."""
        if inputs.order is None:
            return rows
        order = inputs.order[:, (rows - PREFIX).clamp(min=0)]
        return torch.where(rows < PREFIX, rows, PREFIX + order)

    def _targets(self, inputs: RasterInputs, rows: Tensor) -> Tensor:
        """Position of what each row predicts: [rows, C] or [B, rows, C]; zero for the start row and after the end."""
        next_step = (rows - 1).clamp(0, self.length - 1)
        places = next_step if inputs.order is None else inputs.order[:, next_step]
        predicts = (rows > 0) & (rows <= self.length)
        return self.target[PREFIX + places] * predicts[:, None]


class Head(TokenHead):
    """Layer norm modulated per row, and a projection to the codebook."""

    def __init__(self, config: TransformerConfig, choice: RARConfig, space: TokenSpace) -> None:
        super().__init__(config, choice, space)
        self.modulation = ModulationNetwork(config, 2)

    def forward(self, hidden: Tensor, condition: Tensor) -> Tensor:  # type: ignore[override]
        """[rows, B, C] twice -> float32 [B, rows, V / tensor-parallel size]."""
        scale, shift = self.modulation(condition).unbind(-2)
        return self.logits(normalize(hidden) * (1 + scale) + shift)


class RAR(RasterTransformer):
    """A stage of RAR. The prediction is its logits for the rows after the start row: float32 [B, rows, V / tp]."""

    choice: RARConfig

    @classmethod
    def layers(cls, choice: RARConfig, parallel: ParallelConfig, dtype: torch.dtype) -> TransformerConfig:
        """Exact GELU, biases everywhere."""
        return transformer_config(
            parallel,
            dtype,
            depth=choice.depth,
            width=choice.width,
            heads=choice.heads,
            feed_forward=choice.feed_forward_size,
            experts=choice.experts,
            activation_func=F.gelu,
        )

    def build_first(self) -> None:
        """Tables."""
        self.embedding = Embedding(self.choice, self.space, self.config.params_dtype)

    def spec(self, number: int) -> BlockSpec:
        """Layer norm with scale and offset, modulation per row, causal attention, dropout."""
        return rar_block(kernel=self.choice.attention_kernel, dropout=self.choice.dropout, experts=self.choice.experts)

    def build_last(self) -> None:
        """The head."""
        self.head = Head(self.unsharded, self.choice, self.space)

    def sequence(self, inputs: RasterInputs) -> TokenSequence:
        """One causal segment."""
        rows = inputs.ids.shape[1] + (PREFIX if inputs.start == 0 else 0)
        return TokenSequence(SequenceLayout((rows,), rule="causal"), sample_keys=inputs.sample_keys)

    def embed(self, inputs: RasterInputs) -> Embedded:
        """Hidden states, and a condition per row."""
        hidden, condition = self.embedding(inputs)
        return Embedded(hidden, {"row": condition})

    def condition_rows(self) -> Mapping[str, int | None]:
        """One per row."""
        return {"row": None}

    def predict(self, hidden: Tensor, conditions: Mapping[str, Tensor], inputs: RasterInputs) -> Tensor:
        """[rows, B, C] -> float32 logits [B, rows without the start row, V / tensor-parallel size]."""
        first = 1 if inputs.start == 0 else 0
        return self.head(hidden[first:], conditions["row"][first:])

    def starts_at_zero(self, name: str) -> bool:
        """Modulation and the start row."""
        return ".modulation." in name or name == "embedding.begin"

    def own_rule(self, name: str) -> ParameterRule:
        """The start row decays, too, which RAR keeps as a tensor of three; the head's modulation does not, because RAR
        leaves out names that contain "ln", and ``adaln_before_head`` does."""
        if name == "embedding.begin" or name.startswith("head.modulation"):
            return ParameterRule(decays=name == "embedding.begin")
        return super().own_rule(name)
