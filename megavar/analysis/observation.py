"""A trained generator at work on images, teacher-forced: what its routers chose, its hidden states, its loss.

Nothing here knows a family: the recipe prepares the inputs and runs its first pass, and hooks on routers and blocks see
what passes by. B images of a batch, L tokens, C width, E experts.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megavar.assembly import Assembly, require_generator_recipe
from megavar.config.noise import NoiseConfig
from megavar.config.parallel import ParallelConfig
from megavar.config.recipes.base import GENERATOR_MODULE, GeneratorRecipeChoice
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
    """By block that was asked for: its output, float32 [B, L, C]; -1: what the first one reads."""
    loss: float = 0.0
    """The recipe's own, summed over the valid items."""
    hits: float = 0.0
    """Tokens that were the likeliest ones, summed, where the recipe counts them."""
    valid: int = 0
    """Their number."""

    def segments(self, rows: Tensor) -> list[Tensor]:
        """[B, L, ...] cut into the segments of the sequence."""
        return list(rows.split(list(self.layout.sizes), 1))


def undisturbed(recipe: GeneratorRecipeChoice) -> GeneratorRecipeChoice:
    """The recipe without terms, noise and random lists of scales, so that losses of any run and step compare."""
    fields, aside = type(recipe).model_fields, ("terms", "noise", "scale_lists")
    defaults: dict[str, Any] = {
        name: fields[name].get_default(call_default_factory=True) for name in aside if name in fields
    }
    return recipe.model_copy(update=defaults)


class Observer:
    """A generator with trained weights, without the terms of its recipe (their heads and teachers are not needed).

    Its contexts are clean, at the tokenizer's own scales and in the order of its end, whatever it was trained with on
    the way there.
    """

    def __init__(self, config: Config, device: torch.device, checkpoint: Path, *, drop_labels: bool = True) -> None:
        """Build it and load the weights.

        Args:
            checkpoint: a checkpoint or a run directory, of which the newest counts.
            drop_labels: as often as in training; else every image has its class.

        Raises:
            ConfigError: the run trains no generator.
            CheckpointError: there are no weights, or those of another model.
        """
        recipe = require_generator_recipe(config)
        self.noisy = "noise" in type(recipe).model_fields
        """Whether contexts can be made noisy (:meth:`observe`)."""
        recipe = undisturbed(recipe)
        generator = config.generator
        if generator is not None and not drop_labels and "label_drop" in type(generator).model_fields:
            generator = generator.model_copy(update={"label_drop": 0.0})
        changed = {"recipe": recipe, "generator": generator, "parallel": ParallelConfig()}
        self.config = config.model_copy(update=changed)
        self.device = device
        self.source, self.split = _unseen(self.config)
        mesh = topology.initialize(ParallelConfig(), environment())
        assembly = Assembly(self.config, self.source, device, mesh)
        self.recipe: Any = assembly.recipe()
        self.tokenizer = assembly.tokenizer()
        self.step = assembly.steps
        """The one for which the recipe prepares: the last."""
        self.generator: Any = self.recipe.modules()[GENERATOR_MODULE]
        load_weights(self.generator, checkpoint, GENERATOR_MODULE, ema=config.sampling.weights == "ema")
        self.generator.eval()

    @property
    def blocks(self) -> list[int]:
        """Numbers of the blocks, from 0."""
        return sorted(map(int, self.generator.blocks))

    def watch(
        self, images: int, batch: int, hidden: Sequence[int] = (), *, trained: bool = False, noise: float = 0.0
    ) -> Iterator[Observation]:
        """Show the first ``images`` images, ``batch`` at a time; labels are dropped as often as in training.

        Args:
            hidden: blocks whose output is kept.
            trained: show training images.
            noise: share of the tokens that it reads which are replaced by random ones.
        """
        for shown in self.batches(images, batch, trained=trained):
            yield self.observe(shown, hidden, noise=noise)

    def batches(self, images: int, batch: int, *, trained: bool = False) -> Iterator[Batch]:
        """The first images as the tokenizer sees them, on the device, without augmentation."""
        source = build_source(of_images(self.config.data)) if trained else self.source
        transform = build_transform(self.config.data, "test")
        count = min(images, len(source))
        for first in range(0, count, batch):
            places = range(first, min(first + batch, count))
            pixels, labels = stored_images(source, transform, places, self.config.data.damaged_samples)
            ids = torch.tensor(places)
            yield Batch(to_float(pixels), labels, ids, torch.zeros_like(ids)).to(self.device)

    @torch.no_grad()
    def predict(self, batch: Batch, ids: Tensor) -> Tensor:
        """Logits float32 [B, L, V] of each of the tokens ``ids`` [B, L] after those before it, under batch's classes.

        Raises:
            ConfigError: the run's recipe reads no tokens.
        """
        if self.tokenizer.space.vocabulary is None:
            raise ConfigError(f"{self.config.run.name} draws vectors: this analysis is of tokens with a vocabulary.")
        inputs = self.recipe.prepare(replace(batch, images=None, latents=None, tokens=ids), self.step)
        logits: Tensor = self.recipe.passes(GENERATOR_MODULE, self.step)[0].forward(self.generator, inputs).prediction
        return logits

    @torch.no_grad()
    def observe(self, batch: Batch, hidden: Sequence[int] = (), *, noise: float = 0.0) -> Observation:
        """One batch, teacher-forced; the arguments are those of :meth:`watch`.

        Raises:
            ConfigError: the run's recipe knows no noisy contexts.
        """
        if noise and not self.noisy:
            raise ConfigError(
                f"The recipe {self.config.recipe.name!r} of {self.config.run.name} has no noisy contexts: only runs of "
                f"recipes with a key recipe.noise can be shown some."
            )
        kept = self.recipe.config
        if noise:
            self.recipe.config = kept.model_copy(update={"noise": NoiseConfig(schedule="fixed", share=noise)})
        inputs = self.recipe.prepare(batch, self.step)
        self.recipe.config = kept
        first = self.recipe.passes(GENERATOR_MODULE, self.step)[0]
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
            if -1 in hidden:
                block = self.generator.blocks[str(self.blocks[0])]
                handle = block.register_forward_pre_hook(lambda _, given: keep(-1, given[0]))
                hooks.callback(handle.remove)
            for number in (number for number in hidden if number >= 0):
                block = self.generator.blocks[str(number)]
                handle = block.register_forward_hook(lambda _, given, output, number=number: keep(number, output))
                hooks.callback(handle.remove)
            output = first.forward(self.generator, inputs)
        observed = Observation(
            seen["layout"], batch.labels.cpu(), routing, states, valid=int(self.recipe.valid(batch, self.step))
        )
        if first.loss is not None:
            named = first.loss(output, inputs).named
            observed.loss, observed.hits = float(named["loss"]), float(named.get("accuracy", 0.0))
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
