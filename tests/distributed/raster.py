"""A small raster generator with what VAR has not: a condition per position, or rotary positions, and elementwise dropout.

It is written as ``generators/base.py`` says, and trains by the loop of ``tapped.py``.
"""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from torch import Tensor, nn

from megavar.config.generators.base import Limits
from megavar.config.token_space import TokenSpace
from megavar.generators.base import Embedded, Generator, TokenSequence
from megavar.transformer.megatron_config import transformer_config
from megavar.transformer.norms import AffineLayerNorm
from megavar.transformer.rotary import line_table
from megavar.transformer.sequence import SequenceLayout
from megavar.transformer.spec import BlockSpec, llama_block, rar_block

WIDTH, HEADS, DEPTH, CLASSES, VOCABULARY = 32, 4, 4, 5, 24
SPACE = TokenSpace("grid", (3,), 9, VOCABULARY, 4, image_side=12)


@dataclass
class RasterInputs:
    """Predict each token from the earlier ones; while decoding, ``ids`` are the newest tokens and ``start`` their place."""

    labels: Tensor
    ids: Tensor
    sample_keys: Tensor | None = None
    start: int = 0


def sizes(kind: str) -> Any:
    """What the configuration of such a generator would be; not a choice, or other tests would find it."""
    return SimpleNamespace(kind=kind, limits=lambda space: Limits(DEPTH))


class Raster(Generator):
    """Row by row, token by token."""

    @classmethod
    def layers(cls, choice, parallel, dtype):
        per_position = choice.kind == "per_position"
        return transformer_config(
            parallel, dtype, depth=DEPTH, width=WIDTH, heads=HEADS, hidden=48,
            groups=None if per_position else 2,
            activation="gelu" if per_position else "silu", gated=not per_position, bias=per_position,
        )  # fmt: skip

    def build_first(self):
        self.classes = nn.Embedding(CLASSES, WIDTH)
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.position = nn.Parameter(torch.empty(SPACE.length, WIDTH))

    def spec(self, number) -> BlockSpec:
        return rar_block(dropout=0.2) if self.choice.kind == "per_position" else llama_block(dropout=0.2)

    def build_last(self):
        self.norm = AffineLayerNorm(WIDTH, self.unsharded, 1e-6)
        self.head = ColumnParallelLinear(
            WIDTH, VOCABULARY, config=self.unsharded, init_method=lambda weight: weight, bias=False
        )

    def sequence(self, inputs: RasterInputs) -> TokenSequence:
        rows = torch.arange(inputs.start, inputs.start + inputs.ids.shape[1])
        rotary = None if self.choice.kind == "per_position" else line_table(rows, WIDTH // HEADS)
        return TokenSequence(SequenceLayout((len(rows),), rule="causal"), rotary, sample_keys=inputs.sample_keys)

    def embed(self, inputs: RasterInputs) -> Embedded:
        condition = self.classes(inputs.labels)
        position = self.position[inputs.start : inputs.start + inputs.ids.shape[1]]
        hidden = self.tokens(inputs.ids) + position
        if self.choice.kind == "per_position":
            return Embedded(hidden, {"target": condition[:, None] + position})
        return Embedded(hidden + condition[:, None])

    def condition_rows(self):
        return {"target": None} if self.choice.kind == "per_position" else {}

    def predict(self, hidden, conditions, inputs):
        for condition in conditions.values():
            hidden = hidden + condition
        return self.head(self.norm(hidden))[0].float().transpose(0, 1)

    def example(self, images):
        ids = torch.arange(images)[:, None] + torch.arange(SPACE.length)
        return RasterInputs(torch.arange(images) % CLASSES, ids % VOCABULARY, torch.arange(images))
