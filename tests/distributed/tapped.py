"""Trains a small VAR whose loss also reads taps, directly and through a head, on another list of scales every step."""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megavar.config.parallel import ParallelConfig
from megavar.config.token_space import TokenSpace
from megavar.generators.base import GeneratorOutput, Head, Stage
from megavar.generators.inputs import ScaleInputs
from megavar.generators.var import VAR
from megavar.parallel.vocabulary import vocabulary_cross_entropy
from megavar.transformer.interface import TokenSequence
from megavar.transformer.sequence import SequenceLayout
from tests.distributed import curves
from tests.distributed.curves import CODE, VOCABULARY, Setup
from tests.distributed.steps import Case, Item

TAPS = ("embedding", "block.0", "block.2")
LISTS = ((1, 2, 3), (1, 3), (1, 2, 3), (2, 3))
"""Scales of each step: 14, 10, 14 and 13 tokens."""


class AnyScales(VAR):
    """A VAR that takes its scales from the inputs, as FlexVAR does."""

    def sequence(self, inputs: ScaleInputs) -> TokenSequence:
        assert inputs.sides is not None
        return TokenSequence(SequenceLayout.of_scales(inputs.sides), sample_keys=inputs.sample_keys)

    def embed(self, inputs: ScaleInputs) -> Any:
        assert inputs.sides is not None
        rows = inputs.sides[0] ** 2 - self.space.sides[0] ** 2  # more start tokens than the table has
        start = torch.zeros(len(inputs.labels), rows, CODE)
        assert inputs.features is not None
        return super().embed(replace(inputs, features=torch.cat([start, inputs.features], 1)))


class Reader(nn.Module):
    """A head with parameters of every shape, on two taps."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(2 * width, 3)

    def forward(self, early: Tensor, late: Tensor) -> Tensor:
        return self.linear(torch.cat([self.norm(early), late], -1))


def item_of(step: int, samples: Tensor) -> Item:
    sides = LISTS[step]
    length, first = sum(side * side for side in sides), sides[0] ** 2
    drawn = []
    for sample in samples.tolist():
        generator = torch.Generator().manual_seed(100 * step + sample)
        drawn.append(
            (
                torch.randn(length - first, CODE, generator=generator),
                torch.randint(VOCABULARY, (length,), generator=generator),
                torch.randn(length, 3, generator=generator),
            )
        )
    features, targets, heading = (torch.stack(parts) for parts in zip(*drawn))
    return Item(ScaleInputs(samples % curves.CLASSES, features, samples, sides=sides), (targets, heading))


def loss_of(output: GeneratorOutput, item: Item) -> Tensor:
    """Prediction, head and taps, all with gradient."""
    targets, heading = item.targets
    loss = vocabulary_cross_entropy(output.prediction, targets).mean() + 3 * F.mse_loss(output.heads["reader"], heading)
    return loss + 0.1 * output.taps["block.0"].square().mean() + 0.1 * output.taps["embedding"].square().mean()


def build(setup: Setup, parallel: ParallelConfig, stage: Stage) -> AnyScales:
    return AnyScales(
        curves.generator_config(setup),
        TokenSpace.of_scales((1, 2, 3), VOCABULARY, CODE, image_side=6),
        parallel=parallel,
        stage=stage,
        seed=11,
        taps=TAPS,
        heads={"reader": Head(("embedding", "block.2"), Reader)},
    )


CASE = Case(build, item_of, loss_of, steps=len(LISTS))
