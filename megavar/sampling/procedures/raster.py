"""Decoding token by token (RAR ``modeling/rar.py``, ``generate``; arXiv:2411.00776).

For any generator that takes :class:`~megavar.generators.inputs.RasterInputs`. Each step computes one row against the
keys and values of the rows before it: its cost grows with the step by attention alone.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from megavar.conditions import Condition
from megavar.config.procedures.raster import RasterSampling
from megavar.generators.base import Generator
from megavar.generators.inputs import RasterInputs
from megavar.sampling.base import Known
from megavar.sampling.filters import truncate
from megavar.sampling.guidance import guide
from megavar.sampling.noise import FiniteLogits, Noise, pick
from megavar.tokenizers.base import Tokenizer
from megavar.transformer.cache import KeyValueCache


class DrawnToken(NamedTuple):
    """One step."""

    ids: Tensor
    """int64 [B, 1]."""
    logits: Tensor
    """Of the batch as the generator got it, float32 [B or 2 B, 1, V]: with guidance those without class come second."""


class Raster:
    """Row by row."""

    def __init__(self, settings: RasterSampling) -> None:
        self.settings = settings

    def draw(self, generator: Generator, tokenizer: Tokenizer, condition: Condition, noise: Noise | None) -> Tensor:
        """Ids int64 [B, L]; see :class:`megavar.sampling.base.Procedure`."""
        return self.complete(generator, tokenizer, condition, noise, None)

    def complete(
        self, generator: Generator, tokenizer: Tokenizer, condition: Condition, noise: Noise | None, known: Known | None
    ) -> Tensor:
        """Ids int64 [B, L] of which some are known; see :class:`megavar.sampling.base.Completing`."""
        finite = FiniteLogits()
        ids = []
        for step in self.steps(generator, tokenizer.space.length, condition, noise, known):
            finite.note(step.logits)
            ids.append(step.ids)
        finite.require()
        return torch.cat(ids, dim=1)

    def scale(self, step: int, length: int) -> float:
        """Guidance at a step: 1 at the first, nearly ``guidance`` at the last."""
        rise = (1 - math.cos(math.pi * (step / length) ** self.settings.guidance_power)) / 2
        return 1 + (self.settings.guidance - 1) * rise

    @torch.no_grad()
    def steps(
        self, generator: Generator, length: int, condition: Condition, noise: Noise | None, known: Known | None = None
    ) -> Iterator[DrawnToken]:
        """The tokens one by one."""
        settings = self.settings
        labels = (condition.with_dropped() if settings.guided else condition).labels
        counted = torch.arange(len(labels), device=labels.device) < len(condition)
        positions = torch.arange(length, device=labels.device)
        cache = KeyValueCache(length + 1)
        newest, start = labels.new_empty(len(labels), 0), 0
        for step in range(length):
            logits = generator.step(RasterInputs(labels, newest, start=start), cache, counted)[:, -1:]
            guided = logits
            if settings.guided:
                conditional, free = logits.chunk(2)
                guided = guide(conditional, free, self.scale(step, length) - 1)
            uniform = noise.uniform(positions[step : step + 1]) if noise is not None else None
            ids = pick(truncate(guided / settings.temperature, settings.top_k, settings.top_p), uniform)
            ids = ids if known is None else known.put(ids, step)
            yield DrawnToken(ids, logits)
            newest, start = ids.repeat(2, 1) if settings.guided else ids, step + 2
