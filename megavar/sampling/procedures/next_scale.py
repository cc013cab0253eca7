"""Decoding of next-scale generators: one token map after the other, coarse to fine (VAR ``autoregressive_infer_cfg``).

For any generator that takes :class:`~megavar.generators.inputs.ScaleInputs`, and any tokenizer that is a ``Pyramid``.

Sources: VAR (arXiv:2404.02905) section 3.2; FoundationVision/VAR ``models/var.py``.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megavar.conditions import Condition
from megavar.config.procedures.next_scale import NextScaleSampling
from megavar.generators.base import Generator
from megavar.generators.inputs import ScaleInputs
from megavar.sampling.filters import truncate
from megavar.sampling.guidance import guide, linear
from megavar.sampling.noise import FiniteLogits, Noise, pick
from megavar.tokenizers.base import Pyramid
from megavar.transformer.cache import KeyValueCache


class DrawnScale(NamedTuple):
    """One step."""

    ids: Tensor
    """int64 [B, L_k]."""
    logits: Tensor
    """Guided logits before temperature and truncation, float32 [B, L_k, V]."""
    state: Any
    """The tokenizer's, after it took in the ids."""


class NextScale:
    """Scales in turn; all tokens of a scale at once, each drawn from its own distribution."""

    def __init__(self, settings: NextScaleSampling) -> None:
        self.settings = settings

    def draw(self, generator: Generator, tokenizer: Pyramid, condition: Condition, noise: Noise | None) -> Tensor:
        """Ids int64 [B, L], scales one after the other; see :class:`megavar.sampling.base.Procedure`."""
        finite = FiniteLogits()
        ids = []
        for step in self.steps(generator, tokenizer, condition, noise):
            finite.note(step.logits)
            ids.append(step.ids)
        finite.require()
        return torch.cat(ids, dim=1)

    @torch.no_grad()
    def steps(
        self,
        generator: Generator,
        tokenizer: Pyramid,
        condition: Condition,
        noise: Noise | None,
        given: Sequence[Tensor] = (),
    ) -> Iterator[DrawnScale]:
        """The scales one by one.

        Args:
            given: ids [B, L_k] of the first scales, taken as they are instead of drawn ones.
        """
        settings, sides = self.settings, tokenizer.space.sides
        guided = settings.guided
        labels = (condition.with_dropped() if guided else condition).labels
        counted = torch.arange(len(labels), device=labels.device) < len(condition)
        positions = torch.arange(tokenizer.space.length, device=labels.device)
        uniform = None if noise is None else noise.uniform(positions)
        cache, state, start = KeyValueCache(tokenizer.space.length), None, 0
        features: Tensor | None = None
        for k, side in enumerate(sides):
            doubled = features if features is None or not guided else features.repeat(2, 1, 1)
            logits = generator.step(ScaleInputs(labels, doubled, sides=sides, scale=k), cache, counted)
            if guided:
                conditional, free = logits.chunk(2)
                logits = self.guide(conditional, free, k, sides)
            here = None if uniform is None else uniform[:, start : start + side * side]
            ids = given[k] if k < len(given) else self.choose(logits, side, here)
            state, features = tokenizer.grow(state, ids, k)
            start += side * side
            yield DrawnScale(ids, logits, state)

    def choose(self, logits: Tensor, side: int, uniform: Tensor | None) -> Tensor:
        """Ids [B, L_k] of a scale of this side from its guided logits."""
        settings = self.settings
        return pick(truncate(logits / settings.temperature, self.top_k(side), settings.top_p), uniform)

    def guide(self, conditional: Tensor, free: Tensor, k: int, sides: tuple[int, ...]) -> Tensor:
        """Guided logits of scale k, from those with class and those without."""
        return guide(conditional, free, linear(self.settings.guidance, k, len(sides)))

    def top_k(self, side: int) -> int:
        """How many tokens of each distribution may be drawn at a scale of this side."""
        return self.settings.top_k
