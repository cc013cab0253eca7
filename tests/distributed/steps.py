"""A few training steps of a generator under a layout and in a bare loop, with all that is returned beside the loss."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megavar.config.parallel import ParallelConfig
from megavar.generators.base import Generator, GeneratorOutput, Stage
from megavar.parallel import topology
from megavar.parallel.environment import environment
from megavar.training.engine import Engine
from tests.distributed import curves
from tests.distributed.curves import BATCH, CLIPPING, LEARNING_RATE, WEIGHT_DECAY, Setup
from tests.loops import run_pass

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


def engine_steps(setup: Setup, case: Case) -> list[dict[str, Any]]:
    """Runs on every rank: losses, gradient norms and (on the last stage) taps of each step."""
    mesh = topology.initialize(ParallelConfig(**setup.parallel), environment())
    chunks = [
        case.build(setup, mesh.config, Stage.split(4, mesh.config, mesh.pipeline_rank, chunk))
        for chunk in range(mesh.config.virtual_pipeline)
    ]
    engine = curves.engine_of(setup, nn.ModuleList(chunks) if len(chunks) > 1 else chunks[0], mesh)
    share, size = BATCH // mesh.data, setup.micro_batch_size or BATCH // mesh.data
    samples = torch.arange(mesh.data_rank * share, (mesh.data_rank + 1) * share)
    return [train_step(engine, case, step, samples.split(size)) for step in range(case.steps)]


def train_step(engine: Engine, case: Case, step: int, micro_batches: Sequence[Tensor]) -> dict[str, Any]:
    """One optimizer step."""
    losses: list[float] = []
    taps: list[dict[str, Tensor]] = []

    def loss(output: GeneratorOutput, item: Item) -> Tensor:
        value = case.loss(output, item)
        losses.append(value.item())
        taps.append({name: tap.detach().clone() for name, tap in output.taps.items()})
        return value

    items = [case.item(step, samples) for samples in micro_batches]
    run_pass(engine, items, lambda model, item: model(item.model), loss)
    norm = engine.step(LEARNING_RATE, WEIGHT_DECAY).gradient_norm
    whole = {name: torch.cat([part[name] for part in taps]) for name in taps[0]} if taps else {}
    return {"loss": losses, "norm": float(norm), "taps": whole, "first": int(micro_batches[0][0])}


def bare_steps(setup: Setup, case: Case) -> list[dict[str, Any]]:
    """The reference: one process, no engine."""
    topology.initialize(ParallelConfig(), environment())
    model = case.build(setup, ParallelConfig(), Stage(0, 4, True, True))
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        groups[model.rule(name).decays].append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": groups[True], "weight_decay": WEIGHT_DECAY}, {"params": groups[False], "weight_decay": 0.0}],
        lr=LEARNING_RATE, betas=(0.9, 0.95), eps=1e-8,
    )  # fmt: skip
    result = []
    for step in range(case.steps):
        item = case.item(step, torch.arange(BATCH))
        output = model(item.model)
        loss = case.loss(output, item)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIPPING)
        optimizer.step()
        taps = {name: tap.detach().clone() for name, tap in output.taps.items()}
        result.append({"loss": loss.item(), "norm": float(norm), "taps": taps})
    return result


def assert_same(setup: Setup, ranks: list[list[dict[str, Any]]], expected: list[dict[str, Any]]) -> None:
    """Every rank found the values of one process."""
    for number, step in enumerate(expected):
        replicas, seen = {}, 0
        for rank in ranks:
            found = rank[number]
            assert found["norm"] == pytest.approx(step["norm"], abs=TOLERANCE)
            if not found["loss"]:
                continue  # not on the last stage
            seen += 1
            replicas[found["first"]] = sum(found["loss"]) / len(found["loss"])
            assert found["taps"].keys() == step["taps"].keys()
            for name, value in found["taps"].items():
                whole = step["taps"][name][found["first"] : found["first"] + len(value)]
                torch.testing.assert_close(value, whole, rtol=1e-4, atol=1e-5, msg=f"step {number}, {name}")
        assert seen == setup.world_size // setup.parallel.get("pipeline", 1)
        assert sum(replicas.values()) / len(replicas) == pytest.approx(step["loss"], abs=TOLERANCE)
