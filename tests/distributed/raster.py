"""A small raster generator with what VAR has not: conditions per position or rotary positions, elementwise dropout.

It is written as ``generators/base.py`` says, and trains by the loop of ``steps.py``.
"""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from torch import Tensor, nn
from torch.nn import functional as F

from megavar.config.generators.base import Limits
from megavar.config.parallel import ParallelConfig
from megavar.config.token_space import TokenSpace
from megavar.generators.base import Embedded, Generator, GeneratorOutput, Stage, TokenSequence
from megavar.parallel import seeds
from megavar.parallel.vocabulary import vocabulary_cross_entropy
from megavar.transformer.megatron_config import transformer_config
from megavar.transformer.norms import AffineLayerNorm
from megavar.transformer.rotary import line_table
from megavar.transformer.sequence import SequenceLayout
from megavar.transformer.spec import BlockSpec, llama_block, rar_block
from tests.distributed.curves import Setup
from tests.distributed.steps import Case, Item

WIDTH, HEADS, DEPTH, CLASSES, VOCABULARY = 32, 4, 4, 5, 24
SPACE = TokenSpace("grid", (3,), 9, VOCABULARY, 4, image_side=12)


@dataclass
class RasterInputs:
    """Each token is predicted from earlier ones. While decoding, ``ids`` are the newest and ``start`` their place."""

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
            parallel, dtype, depth=DEPTH, width=WIDTH, heads=HEADS, feed_forward=48,
            num_query_groups=None if per_position else 2, activation_func=F.gelu if per_position else F.silu,
            gated_linear_unit=not per_position, add_bias_linear=per_position,
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


def item_of(step: int, samples: Tensor) -> Item:
    """Nine tokens in odd steps, seven in even ones."""
    length = SPACE.length if step % 2 else 7
    bits = seeds.random_bits(step, "raster", samples[:, None], torch.arange(length + 1))
    ids = bits % VOCABULARY
    return Item(RasterInputs(samples % CLASSES, ids[:, :-1], samples), ids[:, 1:])


def loss_of(output: GeneratorOutput, item: Item) -> Tensor:
    """Next-token prediction."""
    return vocabulary_cross_entropy(output.prediction, item.targets).mean()


def case_of(kind: str) -> Case:
    """Four steps of one of the two kinds."""

    def build(setup: Setup, parallel: ParallelConfig, stage: Stage) -> Raster:
        return Raster(sizes(kind), SPACE, parallel=parallel, stage=stage, seed=3, taps=("block.1",))

    return Case(build, item_of, loss_of, steps=4)
