"""Real images that a generator goes on with: their first token maps, then maps of its own.

For any tokenizer that is a ``Pyramid`` and any run that is drawn scale by scale; the drawing is the run's own.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from megavar.analysis.base import Subject
from megavar.assembly import build_sampler, load_tokenizer, require_generator_recipe
from megavar.conditions import Condition
from megavar.data.batch import Batch
from megavar.errors import ConfigError
from megavar.run_samples import default_conditions
from megavar.sampling.base import DrawnScale, ScaleByScale
from megavar.sampling.noise import Noise

Maps = list[Tensor]
"""Ids [B, L_k] of each scale."""


class Continuation:
    """A run with its weights, at the scales of its ``sampling`` section."""

    def __init__(self, run: Subject) -> None:
        """Load generator and tokenizer.

        Raises:
            ConfigError: the run does not draw scales one after the other.
        """
        self.observer = run.observer()
        config, device = self.observer.config, run.device
        weights = require_generator_recipe(config).tokenizer_weights
        self.tokenizer = load_tokenizer(config.sampling.tokenizer_of(config.tokenizer), weights, device)
        self.conditions = default_conditions(config)
        procedure = build_sampler(
            config, self.observer.generator, self.tokenizer, self.conditions, device
        ).procedure
        if not isinstance(procedure, ScaleByScale):
            raise ConfigError(
                f"The run {run.name} draws with sampling.procedure={config.sampling.procedure!r}: this analysis is of "
                f"token maps that are drawn one after the other (next_scale, flexvar)."
            )
        self.procedure: ScaleByScale = procedure
        self.sides: tuple[int, ...] = self.tokenizer.space.sides
        self.seed = config.sampling.seed

    def batches(self, images: int, batch: int) -> Iterator[Batch]:
        """The first test images."""
        return self.observer.batches(images, batch)

    def true(self, batch: Batch) -> Maps:
        """Of the images themselves."""
        ids = self.tokenizer.tokens(self.tokenizer.encode(batch.require_images()))
        return list(ids.split([side * side for side in self.sides], 1))

    def steps(self, batch: Batch, given: Sequence[Tensor]) -> list[DrawnScale]:
        """Every scale: the first ones given, the others drawn; image i has the random numbers of sample i."""
        classes = self.conditions.classes
        condition = Condition(batch.labels, classes=-1 if classes is None else classes)
        generator, noise = self.observer.generator, self._noise(batch)
        return list(self.procedure.steps(generator, self.tokenizer, condition, noise, given))

    def choose(self, batch: Batch, step: DrawnScale, k: int) -> Tensor:
        """What would be drawn at scale k where it was given instead: ids [B, L_k]."""
        start = sum(side * side for side in self.sides[:k])
        positions = torch.arange(start, start + self.sides[k] ** 2, device=batch.labels.device)
        return self.procedure.choose(step.logits, self.sides[k], self._noise(batch).uniform(positions))

    def _noise(self, batch: Batch) -> Noise:
        return Noise(self.seed, batch.sample_ids)

    def image(self, maps: Sequence[Tensor], k: int) -> Tensor:
        """What the maps up to scale k show: float32 [B, 3, h, w] in [-1, 1], smaller where maps are independent."""
        decoded: Tensor = self.tokenizer.decode(torch.cat(list(maps[: k + 1]), 1), self.sides)
        return decoded
