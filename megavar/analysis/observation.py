"""A trained generator at work on images, teacher-forced: what its routers chose, its hidden states, its loss.

Nothing here knows a family: the recipe prepares the inputs and runs its first pass, and hooks on routers and blocks see
what passes by. B images of a batch, L tokens, C width, E experts.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megavar.assembly import Assembly, require_generator_recipe
from megavar.config.parallel import ParallelConfig
from megavar.config.recipes.base import GENERATOR_MODULE
from megavar.config.root import Config
from megavar.data.batch import Batch
from megavar.data.build import build_source, build_transform, of_images
from megavar.data.pixels import to_float
from megavar.data.reading import stored_images
from megavar.data.source import Source
from megavar.errors import ConfigError
from megavar.parallel import topology
from megavar.parallel.environment import environment
from megavar.training.checkpoint.weights import load_weights
from megavar.transformer.moe.router import Router
from megavar.transformer.sequence import SequenceLayout


@dataclass
class Observation:
    """What happened to a batch. Tensors are on the CPU."""

    layout: SequenceLayout
    """Segments of the sequence."""
    labels: Tensor
    """int64 [B]."""
    routing: dict[int, Tensor] = field(default_factory=dict)
    """By block with experts: bool [B, L, E], whether a token went to an expert."""
    hidden: dict[int, Tensor] = field(default_factory=dict)
    """By block that was asked for: its output, float32 [B, L, C]."""
    loss: float = 0.0
    """The recipe's own, summed over the valid items."""
    valid: int = 0
    """Their number."""

    def segments(self, rows: Tensor) -> list[Tensor]:
        """[B, L, ...] cut into the segments of the sequence."""
        return list(rows.split(list(self.layout.sizes), 1))


class Observer:
    """A generator with trained weights, without the terms of its recipe (their heads and teachers are not needed)."""

    def __init__(self, config: Config, device: torch.device, checkpoint: Path) -> None:
        """Build it and load the weights.

        Args:
            checkpoint: a checkpoint or a run directory, of which the newest counts.

        Raises:
            ConfigError: the run trains no generator.
            CheckpointError: there are no weights, or those of another model.
        """
        recipe = require_generator_recipe(config).model_copy(update={"terms": ()})
        self.config = config.model_copy(update={"recipe": recipe, "parallel": ParallelConfig()})
        self.device = device
        self.source, self.split = _unseen(self.config)
        mesh = topology.initialize(ParallelConfig(), environment())
        self.recipe = Assembly(self.config, self.source, device, mesh).recipe()
        self.generator: Any = self.recipe.modules()[GENERATOR_MODULE]
        load_weights(self.generator, checkpoint, GENERATOR_MODULE, ema=config.sampling.weights == "ema")
        self.generator.eval()

    @property
    def blocks(self) -> list[int]:
        """Numbers of the blocks, from 0."""
        return sorted(map(int, self.generator.blocks))

    @torch.no_grad()
    def watch(self, images: int, batch: int, hidden: Sequence[int] = ()) -> Iterator[Observation]:
        """Show the first ``images`` images, ``batch`` at a time; labels are dropped as often as in training.

        Args:
            hidden: blocks whose output is kept.
        """
        transform = build_transform(self.config.data, "test")
        count = min(images, len(self.source))
        for first in range(0, count, batch):
            places = range(first, min(first + batch, count))
            pixels, labels = stored_images(self.source, transform, places, self.config.data.damaged_samples)
            ids = torch.tensor(places)
            yield self._pass(Batch(to_float(pixels), labels, ids, torch.zeros_like(ids)).to(self.device), hidden)

    def _pass(self, batch: Batch, hidden: Sequence[int]) -> Observation:
        inputs = self.recipe.prepare(batch, 0)
        first = self.recipe.passes(GENERATOR_MODULE, 0)[0]
        seen: dict[str, Any] = {}
        routing: dict[int, Tensor] = {}
        states: dict[int, Tensor] = {}

        def enter(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            seen["layout"] = self.generator.sequence(arguments[0]).layout

        def route(module: Router, arguments: tuple[Any, ...], output: Any) -> None:
            rows, samples = arguments[0].shape[:2]
            routing[module.block] = output.assignment.view(rows, samples, -1).transpose(0, 1).cpu()

        def keep(number: int, output: Tensor) -> None:
            states[number] = output.transpose(0, 1).float().cpu()

        with ExitStack() as hooks:
            hooks.callback(self.generator.register_forward_pre_hook(enter).remove)
            for module in self.generator.modules():
                if isinstance(module, Router):
                    hooks.callback(module.register_forward_hook(route).remove)
            for number in hidden:
                block = self.generator.blocks[str(number)]
                handle = block.register_forward_hook(lambda _, given, output, number=number: keep(number, output))
                hooks.callback(handle.remove)
            output = first.forward(self.generator, inputs)
        observed = Observation(
            seen["layout"], batch.labels.cpu(), routing, states, valid=int(self.recipe.valid(batch, 0))
        )
        if first.loss is not None:
            observed.loss = float(first.loss(output, inputs).named["loss"])
        return observed


def _unseen(config: Config) -> tuple[Source, str]:
    """Test images, or training images where no place of others is configured."""
    try:
        return build_source(config.data, "test"), "test"
    except ConfigError:
        return build_source(of_images(config.data)), "train"


def require_experts(observed: Observation, name: str) -> None:
    """Refuse dense models.

    Raises:
        ConfigError: no router chose anything.
    """
    if not observed.routing:
        raise ConfigError(
            f"The run {name} has no experts: this analysis is of mixtures of experts (generator.experts)."
        )
