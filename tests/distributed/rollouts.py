"""Recipes of several passes, and one whose micro-batches have very different numbers of valid tokens."""

import functools
import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megavar.config.parallel import ParallelConfig
from megavar.config.token_space import TokenSpace
from megavar.data.batch import Batch
from megavar.generators.base import GeneratorOutput, Head
from megavar.parallel import seeds, topology
from megavar.parallel.environment import environment
from megavar.parallel.vocabulary import vocabulary_best, vocabulary_cross_entropy
from megavar.recipes.base import Losses, Pass
from megavar.recipes.next_scale import NextScale, NextScaleInputs
from tests.distributed import curves
from tests.distributed.curves import Setup

STEPS, STUDENT = 4, 0.3


class TwoPasses(NextScale):
    """As SAR: teacher forcing, then a second pass on inputs made of the ids that the first pass found most likely."""

    def passes(self, module: str, step: int) -> Sequence[Pass]:
        call = _call
        return [
            Pass(call, self.loss, carry=_best, following=self.student_inputs),
            Pass(call, functools.partial(self.student_loss, weight=STUDENT), balance=STUDENT),
        ]

    def student_inputs(self, inputs: NextScaleInputs, ids: Tensor) -> NextScaleInputs:
        return replace(inputs, model=replace(inputs.model, features=self.tokenizer.inputs(ids)))

    def student_loss(self, output: GeneratorOutput, inputs: NextScaleInputs, weight: float) -> Losses:
        total = self.loss(output, inputs).total
        return Losses(weight * total, {"loss/student": total.detach()})


class Rollout(TwoPasses):
    """Naive student forcing: two passes without graph, each on what the one before found, then one that learns."""

    def passes(self, module: str, step: int) -> Sequence[Pass]:
        free = Pass(_call, None, carry=_best_without_graph, following=self.student_inputs)
        return [free, free, Pass(_call, self.loss)]


class Masked(NextScale):
    """Only some tokens count: hardly any of a step's first four samples, most of the others. Terms count by image."""

    def mask(self, batch: Batch) -> Tensor:
        """bool [B, L]."""
        share = torch.where(batch.sample_ids % 8 < 4, 0.1, 0.9)
        position = torch.arange(self.tokenizer.space.length)
        return seeds.uniform(3, "mask", batch.sample_ids[:, None], position) < share[:, None]

    def prepare(self, batch: Batch, step: int) -> NextScaleInputs:
        inputs = super().prepare(batch, step)
        return replace(inputs, terms=inputs.terms | {"mask": self.mask(batch)})

    def valid(self, batch: Batch, step: int) -> Tensor:  # type: ignore[override]
        return self.mask(batch).sum()

    def loss(self, output: GeneratorOutput, inputs: NextScaleInputs) -> Losses:
        losses = super().loss(output, inputs)
        per_token = vocabulary_cross_entropy(output.prediction, inputs.targets) * inputs.terms["mask"]
        return replace(losses, total=per_token.sum(), named={"loss": per_token.sum().detach()})


class Reading:
    """A term: a head on two taps finds the tokens' parity; a tap is kept small."""

    name, weight, taps = "reading", 0.7, ("block.1",)

    def head(self, space: TokenSpace) -> Head:
        return Head(("embedding", "block.2"), _Reader)

    def prepare(self, batch: Batch, inputs: NextScaleInputs) -> Tensor:
        return (inputs.targets % 2).float()

    def loss(self, tapped: dict[str, Tensor], output: Tensor, targets: Tensor) -> Losses:
        parity = F.binary_cross_entropy_with_logits(output, targets, reduction="none").mean(1)
        size = tapped["block.1"].square().mean((1, 2))
        return Losses((parity + 0.1 * size).sum(), {"parity": parity.detach().sum()})


class _Reader(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(2 * width, 1)

    def forward(self, early: Tensor, late: Tensor) -> Tensor:
        return self.linear(torch.cat([early, late], -1))[..., 0]


def _call(model: Any, inputs: NextScaleInputs) -> Any:
    return model(inputs.model)


def _best(output: GeneratorOutput, inputs: NextScaleInputs) -> Tensor:
    return vocabulary_best(output.prediction)


def _best_without_graph(output: GeneratorOutput, inputs: NextScaleInputs) -> Tensor:
    assert not output.prediction.requires_grad, "a pass without loss keeps nothing for a backward pass"
    return _best(output, inputs)


KINDS: dict[str, tuple[type[NextScale], tuple[Any, ...]]] = {
    "two passes": (TwoPasses, ()),
    "rollout": (Rollout, ()),
    "masked, with a term": (Masked, (Reading(),)),
}


def engine_values(setup: Setup) -> dict[str, list[dict[str, Any]]]:
    """Runs on every rank: metrics of every step, for each of the recipes."""
    mesh = topology.initialize(ParallelConfig(**setup.parallel), environment())
    result = {}
    for name, (kind, terms) in KINDS.items():
        loop = curves.engine_loop(setup, curves.build(setup, mesh, kind, terms), mesh)
        result[name] = [loop.step(step) for step in range(STEPS)]
        loop.engines["generator"].destroy()
    return result


def bare_values(setup: Setup) -> dict[str, list[dict[str, Any]]]:
    """The reference: one process, no engine."""
    mesh = topology.initialize(ParallelConfig(), environment())
    return {
        name: curves.bare_values(curves.build(setup, mesh, kind, terms), STEPS) for name, (kind, terms) in KINDS.items()
    }


def losses_by_rank() -> list[tuple[float, int]]:
    """Mean loss of the first step and number of valid tokens of every rank of two, on each of them."""
    mesh = topology.initialize(ParallelConfig(), environment())
    recipe = curves.build(Setup(dense=True), mesh, Masked, KINDS["masked, with a term"][1])
    (batch,) = curves.batches(0, mesh.data_rank, 2, curves.BATCH // 2)
    inputs, valid = recipe.prepare(batch, 0), int(recipe.valid(batch, 0))
    total = recipe.loss(recipe.generator(inputs.model), inputs).total
    found: list[Any] = [None, None]
    torch.distributed.all_gather_object(found, (float(total) / valid, valid))
    return found


def preparations(setup: Setup, passes: int) -> tuple[list[int], int]:
    """The micro-batches that one step prepares, in order, and how many of their inputs were ever in memory at once."""
    mesh = topology.initialize(ParallelConfig(**setup.parallel), environment())
    first = mesh.data_rank * curves.BATCH // mesh.data
    made: list[int] = []
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    most = 0

    class Watched(NextScale if passes == 1 else TwoPasses):  # type: ignore[misc]
        def prepare(self, batch: Batch, step: int) -> NextScaleInputs:
            nonlocal most
            inputs = super().prepare(batch, step)
            made.append(int(batch.sample_ids[0]) - first)
            alive.add(inputs.model.features)
            most = max(most, len(alive))
            return inputs

    curves.engine_loop(setup, curves.build(setup, mesh, Watched), mesh).step(0)
    return made, most
