"""A few training steps of a generator under a layout and in a bare loop, with all that is returned beside the loss."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megavar.config.parallel import ParallelConfig
from megavar.data.batch import Batch
from megavar.generators.base import Generator, GeneratorOutput, Stage
from megavar.parallel import topology
from megavar.parallel.environment import environment
from megavar.recipes.base import BaseRecipe, Losses, Pass
from tests.distributed import curves
from tests.distributed.curves import BATCH, Setup
from tests.loops import bare_loop

TOLERANCE = 1e-5


@dataclass
class Item:
    """A micro-batch."""

    model: Any
    """Inputs of the generator."""
    targets: Any


@dataclass(frozen=True)
class Case:
    """A generator of four blocks and what it learns."""

    build: Callable[[Setup, ParallelConfig, Stage], Generator]
    item: Callable[[int, Tensor], Item]
    """(step, numbers of the samples) -> micro-batch."""
    loss: Callable[[GeneratorOutput, Item], Tensor]
    """Mean over the micro-batch."""
    steps: int


class CaseRecipe(BaseRecipe):
    """Trains the generator of a case and remembers what it tapped."""

    def __init__(self, case: Case, setup: Setup, mesh: topology.Topology) -> None:
        self.case = case
        chunks = [
            case.build(setup, mesh.config, Stage.split(4, mesh.config, mesh.pipeline_rank, chunk))
            for chunk in range(mesh.config.virtual_pipeline)
        ]
        self.generator: nn.Module = nn.ModuleList(chunks) if len(chunks) > 1 else chunks[0]
        self.taps: list[dict[str, Tensor]] = []

    def modules(self) -> dict[str, nn.Module]:
        return {"generator": self.generator}

    def prepare(self, batch: Batch, step: int) -> tuple[Item, int]:
        return self.case.item(step, batch.sample_ids), len(batch)

    def passes(self, module: str, step: int) -> Sequence[Pass]:
        self.taps.clear()
        return [Pass(lambda model, inputs: model(inputs[0].model), self.loss)]

    def loss(self, output: GeneratorOutput, inputs: tuple[Item, int]) -> Losses:
        item, count = inputs
        total = self.case.loss(output, item) * count
        self.taps.append({name: tap.detach().clone() for name, tap in output.taps.items()})
        return Losses(total, {"loss": total.detach()})

    def tapped(self) -> dict[str, Tensor]:
        """Of the whole step; empty before the last stage."""
        return {name: torch.cat([part[name] for part in self.taps]) for name in self.taps[0]} if self.taps else {}


def batch_of(samples: Tensor) -> Batch:
    """A case makes everything of the samples' numbers."""
    return Batch(None, torch.zeros_like(samples), samples, torch.zeros_like(samples))


def engine_steps(setup: Setup, case: Case) -> list[dict[str, Any]]:
    """Runs on every rank: losses, gradient norms and (on the last stage) taps of each step."""
    mesh = topology.initialize(ParallelConfig(**setup.parallel), environment())
    recipe = CaseRecipe(case, setup, mesh)
    share = BATCH // mesh.data
    samples = torch.arange(mesh.data_rank * share, (mesh.data_rank + 1) * share)
    batches = [batch_of(part) for part in samples.split(setup.micro_batch_size or share)]
    loop = curves.engine_loop(setup, recipe, mesh, lambda step: batches)
    place = {"first": int(samples[0])}
    return [loop.step(step) | {"taps": recipe.tapped()} | place for step in range(case.steps)]


def bare_steps(setup: Setup, case: Case) -> list[dict[str, Any]]:
    """The reference: one process, no engine."""
    recipe = CaseRecipe(case, setup, topology.initialize(ParallelConfig(), environment()))
    taps: list[dict[str, Tensor]] = []

    def batches(step: int) -> list[Batch]:
        taps.append(recipe.tapped())  # of the step before
        return [batch_of(torch.arange(BATCH))]

    values = bare_loop(recipe, "generator", batches, case.steps, optimizer=curves.optimizer())
    taps = [*taps[1:], recipe.tapped()]
    return [value | {"taps": tapped} for value, tapped in zip(values, taps, strict=True)]


def assert_same(setup: Setup, ranks: list[list[dict[str, Any]]], expected: list[dict[str, Any]]) -> None:
    """Every rank found the values of one process."""
    for number, step in enumerate(expected):
        seen = 0
        for rank in ranks:
            found = rank[number]
            assert found["gradient_norm"] == pytest.approx(step["gradient_norm"], abs=TOLERANCE)
            assert found["loss"] == pytest.approx(step["loss"], abs=TOLERANCE)
            if not found["taps"]:
                continue  # not on the last stage, or nothing is tapped
            seen += 1
            assert found["taps"].keys() == step["taps"].keys()
            for name, value in found["taps"].items():
                whole = step["taps"][name][found["first"] : found["first"] + len(value)]
                torch.testing.assert_close(value, whole, rtol=1e-4, atol=1e-5, msg=f"step {number}, {name}")
        assert seen == (setup.world_size // setup.parallel.get("pipeline", 1) if step["taps"] else 0)
