"""The run that ``tools/benchmark.py`` measures: its model, recipe and inputs with fresh weights, its operations."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megavar import frozen
from megavar.assembly import PARAMETER_TYPES, Assembly, require_generator, require_generator_recipe
from megavar.config.choice import resolve
from megavar.config.deepspeed import load_deepspeed_json
from megavar.config.generators.base import GeneratorChoice
from megavar.config.parallel import ParallelConfig
from megavar.config.root import Config
from megavar.config.token_space import TokenSpace
from megavar.data.batch import Batch
from megavar.data.build import build_text
from megavar.parallel.environment import choose_kernels
from megavar.parallel.topology import Topology
from megavar.planning.efficiency import flops_per_image
from megavar.planning.measure import DrawRequest, UnmeasurableError, drawing_flops, tokenizer_cost
from megavar.recipes.base import Recipe
from megavar.training.engine import Engine
from megavar.training.step import build_engines


@dataclass
class Part:
    """Alternatives to compare."""

    name: str
    alternatives: dict[str, Callable[[], Any]] = field(default_factory=dict)
    images: int = 1
    """Images of one call."""
    flops: dict[str, float] = field(default_factory=dict)
    """Model FLOPs of one call, by alternative, where they are known."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Alternatives that cannot run here, with the reason."""
    baseline: str | None = None
    """Alternative to which the others' times are related."""


class FreshAssembly(Assembly):
    """Parts of a run whose tokenizer has fresh weights: speed does not depend on them."""

    def recipe(self) -> Recipe:
        """The recipe, without looking at data."""
        recipe: Recipe = resolve(self.config.recipe).build(self)
        return recipe

    @property
    def steps(self) -> int:
        """As configured; 1 where that depends on data."""
        return self.config.train.steps or 1

    def tokenizer(self) -> Any:
        """Frozen."""
        return frozen.ready(self.fresh_tokenizer(), self.device)


@dataclass(frozen=True)
class Operations:
    """Model FLOPs per image; None where a model cannot be measured."""

    step: float | None
    """A train step, without the frozen tokenizer."""
    drawing: float | None
    """A drawn image, decoded."""
    encoding: float | None
    """The frozen tokenizer's encoder."""


@dataclass
class Bench:
    """The run that is measured, on one device."""

    config: Config
    topology: Topology
    device: torch.device
    batch: int
    """Images of a micro-batch."""

    def __post_init__(self) -> None:
        self.generator: GeneratorChoice = require_generator(self.config)
        require_generator_recipe(self.config)
        train = self.config.train
        choose_kernels(train.precision, train.tf32, train.deterministic)

    @property
    def space(self) -> TokenSpace:
        """Of the tokens."""
        return self.config.tokenizer.space

    @property
    def dtype(self) -> torch.dtype:
        """Type of weights and activations."""
        return PARAMETER_TYPES[self.config.train.precision]

    @functools.cached_property
    def shell(self) -> Any:
        """The generator without memory: it knows its sizes and what its sequences look like."""
        with torch.device("meta"):
            return resolve(self.generator)(
                self.generator, self.space, parallel=ParallelConfig(), dtype=self.dtype, seed=self.config.train.seed
            )

    @functools.cached_property
    def operations(self) -> Operations:
        """Measured once for all parts."""
        drawing = encoding = None
        try:
            cost = tokenizer_cost(self.config.tokenizer)
            encoding = cost.encode_flops
            drawing = drawing_flops(DrawRequest(self.generator, self.config.tokenizer, self.config.sampling))
            drawing = None if drawing is None else drawing + cost.decode_flops
        except UnmeasurableError as error:
            print(f"Some parts are given without FLOPs. {error}", flush=True)
        return Operations(flops_per_image(self.config), drawing, encoding)

    def random(self, *shape: int, gradient: bool = True) -> Tensor:
        """Normal values in the run's type."""
        values = torch.randn(*shape, device=self.device, dtype=self.dtype)
        return values.requires_grad_(gradient)

    def assembly(self) -> FreshAssembly:
        """The run's parts; there is no source of data."""
        return FreshAssembly(self.config, None, self.device, self.topology)  # type: ignore[arg-type]

    def images(self) -> Batch:
        """A random micro-batch."""
        space, count = self.space, torch.arange(self.batch, device=self.device)
        pixels = torch.rand(self.batch, space.image_channels, space.image_side, space.image_side, device=self.device)
        classes = self.generator.class_count
        labels = torch.full_like(count, -1) if classes is None else count % classes
        captions = ("a photograph",) * self.batch if self.generator.condition == "text" else None
        batch = Batch(pixels * 2 - 1, labels, count, torch.zeros_like(count), captions=captions)
        encoder = build_text(self.config.data)
        if captions is None or encoder is None:
            return batch
        text = encoder.encode(captions)
        return replace(batch, text_ids=text.ids.to(self.device), text_mask=text.mask.to(self.device))

    def tokens(self) -> Batch | None:
        """The same from a token cache; None where tokens are vectors."""
        if self.space.vocabulary is None:
            return None
        batch, shape = self.images(), (self.batch, self.space.length)
        ids = torch.randint(self.space.vocabulary, shape, device=self.device)
        return replace(batch, images=None, tokens=ids)

    def engines(self, recipe: Recipe) -> dict[str, Engine]:
        """The engines around a recipe's modules."""
        return build_engines(
            recipe,
            optimizer=self.config.optimizer,
            deepspeed=load_deepspeed_json(Path(self.config.deepspeed)),
            deepspeed_origin=self.config.deepspeed,
            global_batch_size=self.batch * self.topology.data,
            micro_batch_size=self.batch,
            precision=self.config.train.precision,
            topology=self.topology,
        )

    def layers(self, **changes: Any) -> Any:
        """The configuration of the layers of the generator with other values of its keys."""
        choice = self.generator.model_copy(update=changes)
        return resolve(choice).layers(choice, ParallelConfig(), self.dtype)

    def known(self, flops: Mapping[str, float | None]) -> dict[str, float]:
        """FLOPs of a micro-batch, from those of an image, that are known."""
        return {name: value * self.batch for name, value in flops.items() if value is not None}


def trained_module(recipe: Recipe) -> tuple[str, nn.Module]:
    """The first of a recipe's modules, by name: the generator."""
    return next(iter(recipe.modules().items()))
