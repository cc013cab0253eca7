"""Decoding of SAR's hybrid (GengzeZhou/SAR ``models/scalear.py``): masked steps for the first map, then map after map.

order = a permutation of the first map's n tokens for each sample
step i of S: tokens of order below b_i are known, all others masked; draw all n; take those below b_{i+1}
             b_i = int(n (1 - (1 + cos(pi i / S)) / 2))
map k: from the map before, resized; all tokens at once
"""

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from megavar.conditions import Condition
from megavar.config.procedures.masked_scales import MaskedScalesSampling
from megavar.errors import ConfigError
from megavar.generators.scalear import ScaleAR, ScaleARInputs
from megavar.sampling.filters import truncate
from megavar.sampling.guidance import guide
from megavar.sampling.noise import FiniteLogits, Noise, pick
from megavar.tokenizers.base import Pyramid
from megavar.transformer.cache import KeyValueCache

_ORDER = 1 << 20
"""Repetition that stands for the order of a sample's tokens; draws count from 0."""


class Drawn(NamedTuple):
    """One step of the first map, or one later map."""

    sampled: Tensor
    """int64 [B, L_k]: what was drawn at all places."""
    ids: Tensor
    """int64 [B, L_k]: what is known after the step."""
    logits: Tensor
    """Guided logits before temperature and truncation, float32 [B, L_k, V]."""
    finished: bool
    """Whether the map is complete."""


def schedule(tokens: int, steps: int) -> list[tuple[int, int]]:
    """(known tokens, tokens known afterwards) of each step: cosine, at least one token per step while there are any."""
    bounds = [int(tokens * (1 - 0.5 * (1 + math.cos(math.pi * step / steps)))) for step in range(steps)] + [tokens]
    for step in range(1, steps):
        bounds[step] = min(max(bounds[step], bounds[step - 1] + 1), tokens)
    return list(itertools.pairwise(bounds))


class MaskedScales:
    """See the module."""

    def __init__(self, settings: MaskedScalesSampling) -> None:
        self.settings = settings

    def draw(self, generator: ScaleAR, tokenizer: Pyramid, condition: Condition, noise: Noise | None) -> Tensor:
        """Ids int64 [B, L]; see :class:`megavar.sampling.base.Procedure`."""
        if not isinstance(generator, ScaleAR):
            raise ConfigError(
                f"sampling.procedure=masked_scales masks tokens, which {type(generator).__name__} cannot read: set "
                f"generator.name to scalear or choose another procedure."
            )
        finite, ids = FiniteLogits(), []
        for step in self.steps(generator, tokenizer, condition, noise):
            finite.note(step.logits)
            if step.finished:
                ids.append(step.ids)
        finite.require()
        return torch.cat(ids, 1)

    def order(self, condition: Condition, size: int, noise: Noise | None) -> Tensor:
        """Place of each token in the order of its sample, int64 [B, size]; row by row without noise."""
        places = torch.arange(size, device=condition.labels.device)
        if noise is None:
            return places.expand(len(condition), -1)
        return noise.uniform(places, _ORDER).argsort(1).argsort(1)

    @torch.no_grad()
    def steps(
        self, generator: ScaleAR, tokenizer: Pyramid, condition: Condition, noise: Noise | None
    ) -> Iterator[Drawn]:
        """All steps of the first map, then the other maps."""
        sides = tokenizer.space.sides
        size = sides[0] ** 2
        order = self.order(condition, size, noise)
        ids = torch.zeros_like(order)
        count = self.settings.first_steps
        for number, (known, after) in enumerate(schedule(size, count)):
            features = tokenizer.embed(ids)
            logits = self.logits(generator, condition, features, sides[:1], masked=order >= known)
            logits = self.guide(logits, number / count, first=True)
            sampled = self.pick(logits, noise, 0, number)
            taken = order < after
            ids = torch.where(taken & (order >= known if self.settings.settled else taken), sampled, ids)
            yield Drawn(sampled, ids, logits, number + 1 == count)
        yield from self.later(generator, tokenizer, condition, noise, ids)

    def later(
        self, generator: ScaleAR, tokenizer: Pyramid, condition: Condition, noise: Noise | None, ids: Tensor
    ) -> Iterator[Drawn]:
        """The maps after the first, ``ids`` [B, L_0]."""
        sides, start = tokenizer.space.sides, ids.shape[1]
        state, features = tokenizer.grow(None, ids, 0)
        cached = generator.choice.history != "none"
        cache = KeyValueCache(1 + tokenizer.space.length) if cached else None
        for k, side in enumerate(sides[1:], 1):
            assert features is not None
            class_row = not cached or k == 1
            logits = self.logits(generator, condition, features, (side,), cache=cache, class_row=class_row)
            logits = self.guide(logits, k / (len(sides) - 1), first=False)
            ids = self.pick(logits, noise, start, 0)
            start += side * side
            state, features = tokenizer.grow(state, ids, k)
            yield Drawn(ids, ids, logits, True)

    def logits(
        self,
        generator: ScaleAR,
        condition: Condition,
        features: Tensor,
        sides: tuple[int, ...],
        masked: Tensor | None = None,
        cache: KeyValueCache | None = None,
        class_row: bool = True,
    ) -> Tensor:
        """Logits float32 [B or 2 B, rows, V]."""
        guided = self.settings.guided
        labels = (condition.with_dropped() if guided else condition).labels
        counted = torch.arange(len(labels), device=labels.device) < len(condition)
        if guided:
            features = features.repeat(2, 1, 1)
            masked = None if masked is None else masked.repeat(2, 1)
        inputs = ScaleARInputs(labels, features, sides=sides, masked=masked, class_row=class_row)
        cache = cache or KeyValueCache(1 + features.shape[1])
        logits: Tensor = generator.step(inputs, cache, counted)
        return logits

    def guide(self, logits: Tensor, along: float, *, first: bool) -> Tensor:
        """Guided logits [B, rows, V]."""
        settings = self.settings
        if not settings.guided:
            return logits
        conditional, free = logits.chunk(2)
        if settings.guidance_form == "llamagen":
            return guide(conditional, free, settings.guidance * (0.5 if first else 1.0) - 1)
        return guide(conditional, free, 0.5 * settings.guidance * (1 + along))

    def pick(self, logits: Tensor, noise: Noise | None, start: int, repetition: int) -> Tensor:
        """Draw tokens of rows that begin at place ``start`` of the sample's tokens."""
        places = torch.arange(start, start + logits.shape[1], device=logits.device)
        uniform = None if noise is None else noise.uniform(places, repetition)
        return pick(truncate(logits / self.settings.temperature, self.settings.top_k, self.settings.top_p), uniform)
