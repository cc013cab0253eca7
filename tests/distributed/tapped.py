"""Trains a small VAR whose loss also reads taps, directly and through a head, on another list of scales every step."""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megavar.config.parallel import ParallelConfig
from megavar.config.token_space import TokenSpace
from megavar.generators.base import Head, Stage
from megavar.generators.inputs import ScaleInputs
from megavar.generators.var import VAR
from megavar.parallel import topology
from megavar.parallel.environment import environment
from megavar.parallel.vocabulary import vocabulary_cross_entropy
from megavar.transformer.interface import TokenSequence
from megavar.transformer.sequence import SequenceLayout
from tests.distributed import curves
from tests.distributed.curves import BATCH, CLIPPING, CODE, LEARNING_RATE, VOCABULARY, WEIGHT_DECAY, Setup

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


@dataclass
class Item:
    """A micro-batch."""

    model: ScaleInputs
    targets: Tensor
    heading: Tensor


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
    return Item(ScaleInputs(samples % curves.CLASSES, features, samples, sides=sides), targets, heading)


def loss_of(output: Any, item: Item) -> Tensor:
    """Prediction, head and a tap of the last pipeline stage but one, all with gradient."""
    loss = vocabulary_cross_entropy(output.prediction, item.targets).mean()
    loss = loss + 3 * F.mse_loss(output.heads["reader"], item.heading)
    return loss + 0.1 * output.taps["block.0"].square().mean() + 0.1 * output.taps["embedding"].square().mean()


def build(setup: Setup, mesh: topology.Topology) -> nn.Module:
    chunks = [
        AnyScales(
            curves.generator_config(setup),
            TokenSpace.of_scales((1, 2, 3), VOCABULARY, CODE, image_side=6),
            parallel=mesh.config,
            stage=Stage.split(4, mesh.config, mesh.pipeline_rank, chunk),
            seed=11,
            taps=TAPS,
            heads={"reader": Head(("embedding", "block.2"), Reader)},
        )
        for chunk in range(mesh.config.virtual_pipeline)
    ]
    return chunks[0] if len(chunks) == 1 else nn.ModuleList(chunks)


def engine_steps(setup: Setup) -> list[dict[str, Any]]:
    """Runs on every rank: losses, gradient norms and (on the last stage) taps of each step."""
    mesh = topology.initialize(ParallelConfig(**setup.parallel), environment())
    module = build(setup, mesh)
    several = isinstance(module, nn.ModuleList)  # whose parameters are called 0.blocks.1...
    first: Any = module[0] if several else module  # type: ignore[index]
    rule = lambda name, value: first.rule(name.split(".", 1)[1] if several else name).decays  # noqa: E731
    engine = curves.engine_of(setup, module, rule, mesh)
    share, size = BATCH // mesh.data, setup.micro_batch_size or BATCH // mesh.data
    result = []
    for step in range(len(LISTS)):
        losses: list[float] = []
        taps: list[dict[str, Tensor]] = []
        samples = torch.arange(mesh.data_rank * share, (mesh.data_rank + 1) * share)

        def loss(
            output: Any, item: Item, losses: list[float] = losses, taps: list[dict[str, Tensor]] = taps
        ) -> Tensor:
            value = loss_of(output, item)
            losses.append(value.item())
            taps.append({name: tap.detach().clone() for name, tap in output.taps.items()})
            return value

        items = [item_of(step, part) for part in samples.split(size)]
        engine.forward_backward(items, lambda model, item: model(item.model), loss)
        norm = engine.step(LEARNING_RATE, WEIGHT_DECAY).gradient_norm
        whole = {name: torch.cat([part[name] for part in taps]) for name in TAPS} if taps else {}
        result.append({"loss": losses, "norm": float(norm), "taps": whole, "first": int(samples[0])})
    return result


def bare_steps(setup: Setup) -> list[dict[str, Any]]:
    """The reference: one process, no engine."""
    mesh = topology.initialize(ParallelConfig(), environment())
    model = build(setup, mesh)
    assert isinstance(model, VAR)
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        groups[model.rule(name).decays].append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": groups[True], "weight_decay": WEIGHT_DECAY}, {"params": groups[False], "weight_decay": 0.0}],
        lr=LEARNING_RATE, betas=(0.9, 0.95), eps=1e-8,
    )  # fmt: skip
    result = []
    for step in range(len(LISTS)):
        item = item_of(step, torch.arange(BATCH))
        output = model(item.model)
        loss = loss_of(output, item)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIPPING)
        optimizer.step()
        taps = {name: tap.detach().clone() for name, tap in output.taps.items()}
        result.append({"loss": loss.item(), "norm": float(norm), "taps": taps})
    return result
