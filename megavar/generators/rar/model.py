"""RAR: p(tokens | class), one token after the other in any order (arXiv:2411.00776, ``modeling/rar.py``).

    row 0 start, row 1 class, row 2 + i token of step i
    hidden    = embedding + position of the token in the image + position of the token that is to be predicted
    condition = class + step, per row: modulates every block and the head
    row 1 + i predicts the token of step i

Shapes: B samples, rows of the sequence, C width, V codebook size.
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megavar.config.generators.rar import RARConfig
from megavar.config.parallel import ParallelConfig
from megavar.config.token_space import TokenSpace
from megavar.generators.base import Embedded, Generator, TokenSequence
from megavar.generators.inputs import RasterInputs
from megavar.parallel.parameter_rule import ParameterRule
from megavar.transformer.megatron_config import transformer_config
from megavar.transformer.modulation import ModulationNetwork
from megavar.transformer.norms import normalize
from megavar.transformer.sequence import SequenceLayout
from megavar.transformer.spec import BlockSpec, rar_block

PREFIX = 2
"""Rows before the first token: start and class."""


class TiedCodes(nn.Module):
    """Token ids to the tokenizer's code vectors, which are not trained, to hidden states."""

    def __init__(self, vocabulary: int, channels: int, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.vectors = nn.Parameter(torch.empty(vocabulary, channels, dtype=dtype))
        self.projection = nn.Linear(channels, width, dtype=dtype)

    def forward(self, ids: Tensor) -> Tensor:
        """int64 [B, n] -> [B, n, C]."""
        return self.projection(self.vectors[ids])


class Embedding(nn.Module):
    """Classes and tokens to hidden states and to the condition of each row."""

    def __init__(self, choice: RARConfig, space: TokenSpace, dtype: torch.dtype) -> None:
        super().__init__()
        assert space.vocabulary is not None
        self.length = space.length
        width, rows = choice.width, space.length + choice.spare_positions
        tied = choice.tied_codebook in ("embedding", "both")
        self.codes = TiedCodes(space.vocabulary, space.channels, width, dtype) if tied else None
        self.before_classes = 1 if tied else space.vocabulary + 1
        # Codes, a mask that only MaskGIT would use, classes, no class.
        self.table = nn.Embedding(self.before_classes + choice.classes + 1, width, dtype=dtype)
        self.begin = nn.Parameter(torch.empty(width, dtype=dtype))
        self.position = nn.Parameter(torch.empty(rows, width, dtype=dtype))
        self.target = nn.Parameter(torch.empty(rows, width, dtype=dtype))
        self.step = nn.Parameter(torch.empty(space.length + choice.spare_steps, width, dtype=dtype))

    def forward(self, inputs: RasterInputs) -> tuple[Tensor, Tensor]:
        """Hidden states [B, rows, C] and conditions [B, rows, C] of the rows from ``inputs.start`` on."""
        condition = self.table(self.before_classes + inputs.labels)
        hidden = self.table(inputs.ids) if self.codes is None else self.codes(inputs.ids)
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


class Head(nn.Module):
    """Layer norm modulated per row, and a projection to the codebook, where it is tied on its own code vectors."""

    def __init__(self, config: TransformerConfig, vocabulary: int, channels: int | None) -> None:
        """Predict one of ``vocabulary`` tokens; ``channels`` of their vectors, or None where they are not tied."""
        super().__init__()
        width, dtype = config.hidden_size, config.params_dtype
        self.modulation = ModulationNetwork(config, 2)
        self.to_codes = None if channels is None else nn.Linear(width, channels, bias=False, dtype=dtype)
        self.projection = ColumnParallelLinear(
            channels or width, vocabulary, config=config, init_method=lambda weight: weight, bias=channels is None
        )  # with a frozen weight, Megatron-core's bias would get no gradient

    def forward(self, hidden: Tensor, condition: Tensor) -> Tensor:
        """[rows, B, C] twice -> float32 [rows, B, V / tensor-parallel size]."""
        scale, shift = self.modulation(condition).unbind(-2)
        hidden = normalize(hidden) * (1 + scale) + shift
        return self.projection(hidden if self.to_codes is None else self.to_codes(hidden))[0].float()


class RAR(Generator):
    """A stage of RAR. The prediction is its logits for the rows after the start row: float32 [B, rows, V / tp]."""

    class_table: ClassVar[str] = "embedding.table.weight"

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
        assert self.space.vocabulary is not None
        tied = self.choice.tied_codebook in ("head", "both")
        self.head = Head(self.unsharded, self.space.vocabulary, self.space.channels if tied else None)

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
        return self.head(hidden[first:], conditions["row"][first:]).transpose(0, 1)

    def initial_value(self, name: str, value: Tensor, generator: torch.Generator) -> None:
        """The reference's: modulation and start row zero, everything else normal with 0.02, cut off at two."""
        if self._is_code_vectors(name):
            value.zero_() if self.codebook is None else value.copy_(self.codebook)
        elif name.endswith("bias") or ".modulation." in name or name == "embedding.begin":
            value.zero_()
        elif "norm" in name:
            value.fill_(1.0)
        else:
            nn.init.trunc_normal_(value, std=0.02, generator=generator)

    def own_rule(self, name: str) -> ParameterRule:
        """Weight decay on matrices that are no tables, and on the start row, which RAR keeps as a tensor of three.

        The head's modulation has none: RAR leaves out names that contain "ln", and ``adaln_before_head`` does. Code
        vectors are the tokenizer's and stay what they are.
        """
        if self._is_code_vectors(name):
            return ParameterRule(frozen=True)
        free = "norm" in name or name.endswith("bias") or name.startswith("head.modulation")
        table = name.startswith("embedding.") and name not in ("embedding.begin", "embedding.codes.projection.weight")
        return ParameterRule(decays=not (free or table))

    def _is_code_vectors(self, name: str) -> bool:
        tied = self.choice.tied_codebook
        return name == "embedding.codes.vectors" or (name == "head.projection.weight" and tied in ("head", "both"))

    def example(self, images: int) -> RasterInputs:
        """Class 0, 1, ... and zeros for all tokens but the last."""
        ids = torch.zeros(images, self.space.length - 1, dtype=torch.int64)
        return RasterInputs(torch.arange(images) % self.choice.classes, ids, sample_keys=torch.arange(images))
