"""Decoding of MAR (``models/mar.py``, ``sample_tokens``; arXiv:2406.11838).

    everything is masked; in iteration k = 1 ... K the masked tokens become floor(L cos(pi/2 k/K)), at least one and one
    less than before, none after the last; those that leave are drawn by diffusion, given all that were drawn before

For any generator that takes :class:`~megavar.generators.inputs.MaskedInputs` and has a ``denoise``.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from megavar.conditions import Condition
from megavar.config.procedures.mar import MARSampling
from megavar.diffusion import Diffusion, evenly, strided
from megavar.errors import ConfigError
from megavar.generators.inputs import MaskedInputs
from megavar.parallel import seeds
from megavar.sampling.noise import FiniteLogits, Noise
from megavar.tokenizers.base import Continuous


class MaskedGenerator(Protocol):
    """What this procedure asks of a generator."""

    def step(self, inputs: MaskedInputs, cache: None) -> Tensor:
        """The diffusion head's condition of all tokens, [B, L, Z]; nothing is kept from pass to pass."""
        ...

    def denoise(self, noisy: Tensor, times: Tensor, condition: Tensor) -> Tensor:
        """Noise and variance [..., 2 C] of noisy tokens [..., C] at times int64 [...]."""
        ...


class DrawnTokens(NamedTuple):
    """One iteration."""

    tokens: Tensor
    """float32 [B, L, C]: all that are known now, zeros elsewhere."""
    condition: Tensor
    """Of the diffusion head, [B or 2 B, L, Z]: with guidance those without class come second."""
    guidance: float


class MaskedDecoding:
    """Iteration by iteration."""

    repeated = ("diffuse",)

    def __init__(self, settings: MARSampling) -> None:
        self.settings = settings
        self.kept = (evenly if settings.spacing == "even" else strided)(settings.steps)
        self.chain = Diffusion(self.kept)

    def draw(
        self, generator: MaskedGenerator, tokenizer: Continuous, condition: Condition, noise: Noise | None
    ) -> Tensor:
        """Tokens float32 [B, L, C]; see :class:`megavar.sampling.base.Procedure`."""
        finite = FiniteLogits()
        for step in self.steps(generator, tokenizer, condition, noise):
            finite.note(step.tokens)
        finite.require()
        return step.tokens

    def left(self, length: int) -> list[int]:
        """Masked tokens after each iteration but the last, whose number only decides its guidance.

        Raises:
            ConfigError: there are more iterations than tokens.
        """
        if self.settings.iterations > length:
            raise ConfigError(
                f"sampling.iterations={self.settings.iterations}, but an image has {length} tokens: lower it."
            )
        counts, before = [], length
        for step in range(1, self.settings.iterations + 1):
            wanted = math.floor(length * math.cos(math.pi / 2 * step / self.settings.iterations))
            before = max(1, min(before - 1, wanted))
            counts.append(before)
        return counts

    def order(self, length: int, indices: Tensor) -> Tensor:
        """Places, int64 [B, L]: the first of them stay masked longest."""
        places = torch.arange(length, device=indices.device)
        return seeds.random_bits(self.settings.seed, "sampling/order", indices[:, None], places).argsort(1)

    def guidance_of(self, left: int, length: int) -> float:
        """Of an iteration after which ``left`` tokens are masked."""
        share = (length - left) / length if self.settings.guidance_schedule == "linear" else 1.0
        return 1 + (self.settings.guidance - 1) * share

    @torch.no_grad()
    def steps(
        self, generator: MaskedGenerator, tokenizer: Continuous, condition: Condition, noise: Noise | None
    ) -> Iterator[DrawnTokens]:
        """The iterations one by one. Without ``noise`` every chain starts at zero and has none."""
        given = condition.with_dropped() if self.settings.guided else condition
        copies, space, device = len(given) // len(condition), tokenizer.space, given.labels.device
        indices = noise.indices if noise is not None else torch.arange(len(condition), device=device)
        order = self.order(space.length, indices)
        rank = order.argsort(1)
        tokens = torch.zeros(len(condition), space.length, space.channels, device=device)
        masked, text = space.length, None if given.text is None else given.text.ids
        counts = self.left(space.length)
        for number, left in enumerate(counts, 1):
            known = MaskedInputs(given.labels, tokens.repeat(copies, 1, 1), (rank < masked).repeat(copies, 1), text)
            told = generator.step(known, None)
            after = 0 if number == len(counts) else left
            drawn = order[:, after:masked].sort(1).values
            guidance, index = self.guidance_of(left, space.length), drawn[..., None]
            asked = told.gather(1, index.repeat(copies, 1, 1).expand(-1, -1, told.shape[-1]))
            index = index.expand(-1, -1, space.channels)
            tokens = tokens.scatter(1, index, self._diffuse(generator, asked, drawn, space.channels, guidance, noise))
            masked = after
            yield DrawnTokens(tokens, told, guidance)

    def _diffuse(
        self, generator: MaskedGenerator, told: Tensor, places: Tensor, channels: int, guidance: float,
        noise: Noise | None,
    ) -> Tensor:  # fmt: skip
        def normal(step: int) -> Tensor:
            if noise is None:
                return torch.zeros(*places.shape, channels, device=places.device)
            return noise.normal(places, channels, repetition=step)

        return self.diffuse(generator.denoise, told, normal, guidance)

    def diffuse(
        self, denoise: Callable[[Tensor, Tensor, Tensor], Tensor], told: Tensor, normal: Callable[[int], Tensor],
        guidance: float,
    ) -> Tensor:  # fmt: skip
        """From noise to tokens, float32 [B, n, C].

        Args:
            denoise: see :class:`MaskedGenerator`.
            told: conditions [B, n, Z]; with guidance 2 B of them.
            normal: standard normal numbers [B, n, C] of the beginning (0) and of each step (1, 2 ...).
        """
        state = normal(0)
        for number, step in enumerate(reversed(range(len(self.kept))), 1):
            copies = len(told) // len(state)
            times = torch.full((*told.shape[:-1],), self.kept[step], device=told.device)
            output = denoise(state.repeat(copies, *[1] * (state.dim() - 1)), times, told)
            output = output[: len(state)] if copies == 1 else _guided(output, guidance)
            state = self.chain.step_back(output, state, step, normal(number), self.settings.temperature)
        return state


def _guided(output: Tensor, guidance: float) -> Tensor:
    """Guided noise and the conditional variance, [B, n, 2 C] from [2 B, n, 2 C]."""
    conditional, free = output.chunk(2)
    (noise, variance), (free_noise, _) = conditional.chunk(2, -1), free.chunk(2, -1)
    return torch.cat([free_noise + guidance * (noise - free_noise), variance], -1)
