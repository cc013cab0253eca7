"""Drawing of FlowAR: one map of vectors after the other, each from noise to data by Euler's method.

For any generator that takes :class:`~megavar.generators.inputs.FlowScaleInputs` and has a ``velocity``, and any
tokenizer that is a :class:`~megavar.tokenizers.base.LatentMap`.

Guided velocities are those of both conditions at the conditional sample; what the released sampler draws for the other
half of its batch is replaced by the conditional half at the first guided step and dropped after each scale, so that it
never meets a result. Here it is not computed.

Source: FlowAR ``models/sampler.py``, ``models/flowar.py`` (``sample``).
"""

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from megavar import flow_matching
from megavar.conditions import Condition
from megavar.config.procedures.flowar import FlowARSampling
from megavar.generators.inputs import FlowScaleInputs
from megavar.sampling.noise import FiniteLogits, Noise
from megavar.tokenizers.base import LatentMap
from megavar.tokenizers.latent_scales import next_input
from megavar.transformer.cache import KeyValueCache


class FlowGenerator(Protocol):
    """What this procedure asks of a generator."""

    choice: "HasScales"

    def step(self, inputs: FlowScaleInputs, cache: KeyValueCache, counted: Tensor | None = None) -> Tensor:
        """The flow head's condition of one scale, [B, L_k, Z]."""
        ...

    def velocity(self, noisy: Tensor, times: Tensor, condition: Tensor, scale: int) -> Tensor:
        """Velocity [B, L_k, C] of noisy tokens [B, L_k, C] at times [B]."""
        ...


class HasScales(Protocol):
    """Its section of the configuration."""

    scales: tuple[int, ...]
    scale_inputs: Literal["latent", "image"]


class DrawnMap(NamedTuple):
    """One step."""

    tokens: Tensor
    """float32 [B, L_k, C]."""
    condition: Tensor
    """Of the flow head, [B or 2 B, L_k, Z]: with guidance those without class come second."""
    features: Tensor | None
    """What the generator has read for it, float32 [B, L_k, C]; None at the first scale."""


class NextScaleFlow:
    """Scales in turn; all tokens of a scale at once."""

    def __init__(self, settings: FlowARSampling) -> None:
        self.settings = settings
        self.grid: list[float] = self.times().tolist()

    def draw(self, generator: FlowGenerator, tokenizer: LatentMap, condition: Condition, noise: Noise | None) -> Tensor:
        """Tokens of the last scale, float32 [B, L, C]; see :class:`megavar.sampling.base.Procedure`."""
        finite = FiniteLogits()
        for step in self.steps(generator, tokenizer, condition, noise):
            finite.note(step.tokens)
        finite.require()
        return step.tokens

    @torch.no_grad()
    def steps(
        self,
        generator: FlowGenerator,
        tokenizer: LatentMap,
        condition: Condition,
        noise: Noise | None,
        followed: Sequence[Tensor] = (),
    ) -> Iterator[DrawnMap]:
        """The scales one by one. Without ``noise`` every path starts at zero, the mean of noise.

        Args:
            followed: maps [B, L_k, C] of the first scales that later ones are drawn after, instead of those drawn.
        """
        scales, guided, channels = generator.choice.scales, self.settings.guided, tokenizer.space.channels
        labels = (condition.with_dropped() if guided else condition).labels
        counted = torch.arange(len(labels), device=labels.device) < len(condition)
        cache = KeyValueCache(sum(side * side for side in scales))
        features, start = None, 0
        for number, side in enumerate(scales):
            doubled = features.repeat(2, 1, 1) if features is not None and guided else features
            inputs = FlowScaleInputs(labels, doubled, scale=number)
            told = generator.step(inputs, cache, counted)
            places = torch.arange(start, start + side * side, device=labels.device)
            if noise is not None:
                begin = noise.normal(places, channels)
            else:
                begin = torch.zeros(len(condition), side * side, channels, device=labels.device)
            tokens = self.flow(generator, begin, told, number, self.guidance_of(number, len(scales)))
            yield DrawnMap(tokens, told, features)
            start += side * side
            if number + 1 < len(scales):
                through = generator.choice.scale_inputs
                before = followed[number] if number < len(followed) else tokens
                features = next_input(tokenizer, before, scales[-1], scales[number + 1], through)

    def guidance_of(self, number: int, scales: int) -> float:
        """Of a scale: 1 at the first, ``guidance`` at the last."""
        return 1 + (self.settings.guidance - 1) * number / max(scales - 1, 1)

    def times(self) -> Tensor:
        """The grid, float64, falling from 1 to 0."""
        n = self.settings.steps
        if self.settings.grid == "uniform" or n == 50:
            return torch.linspace(1, 0, n + 1, dtype=torch.float64)
        early = torch.linspace(1, 0.3, n // 2, dtype=torch.float64)
        return torch.cat([early, torch.linspace(0.25, 0, n // 2 + 1, dtype=torch.float64)])

    def flow(self, generator: FlowGenerator, begin: Tensor, told: Tensor, scale: int, guidance: float) -> Tensor:
        """From noise to the tokens of a scale, float32 [B, L_k, C].

        Args:
            begin: the noise, float32 [B, L_k, C].
            told: conditions of the flow head [B, L_k, Z]; with guidance 2 B of them.
        """
        conditional = told[: len(begin)]

        def velocity_at(noisy: Tensor, time: float) -> Tensor:
            times = torch.full((len(told),), time, device=noisy.device)
            if guidance <= 1 or time > self.settings.guidance_until:
                return generator.velocity(noisy, times[: len(noisy)], conditional, scale)
            both = generator.velocity(noisy.repeat(2, 1, 1), times, told, scale)
            with_class, free = both.chunk(2)
            return free + guidance * (with_class - free)

        return flow_matching.euler(velocity_at, begin, self.grid)
