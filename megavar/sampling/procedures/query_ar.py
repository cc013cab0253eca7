"""Decoding by position queries (VGT section 3.3; ``vgt_internvl3.py``, ``flow_head.py``, ``generation_scheduler.py``).

    cache: text, <img>, Q z Q z ... of all groups before the last      then, in one pass, group k:
    [Q z] of group k-1, Q of group k  ->  hidden states of the Q of group k  ->  flow from noise to their latents

For any generator that takes :class:`~megavar.generators.inputs.QueryInputs` and has a ``velocity``. In groups of one,
the query of the group before is in the cache already, and only its latent is fed. In larger ones the bare queries of a
group would lie before the same queries that are fed again with their latents: they are cropped first (``context:
training``), or stay (``release``). Every step costs one pass over three groups at most, whatever was drawn before.
"""

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from megavar import flow_matching
from megavar.conditions import Condition
from megavar.config.generators.query_ar import QueryARConfig
from megavar.config.procedures.query_ar import QuerySampling
from megavar.data.text import Text
from megavar.generators.inputs import QueryInputs
from megavar.parallel import seeds
from megavar.sampling.noise import FiniteLogits, Noise
from megavar.tokenizers.base import Continuous
from megavar.transformer.cache import KeyValueCache


class QueryGenerator(Protocol):
    """What this procedure asks of a generator."""

    choice: QueryARConfig

    def step(self, inputs: QueryInputs, cache: KeyValueCache, counted: Tensor | None = None) -> Tensor:
        """The flow head's condition of the queries, [B, A, Z]."""
        ...

    def velocity(self, noisy: Tensor, times: Tensor, condition: Tensor) -> Tensor:
        """Velocity [B, A, C] of latents [B, A, C] at times [B, A]."""
        ...


class DrawnGroup(NamedTuple):
    """One step."""

    places: Tensor
    """int64 [B, A]."""
    raw: Tensor
    """float32 [B, A, C], as the flow ends."""
    tokens: Tensor
    """The same as the tokenizer normalizes them: what is kept and fed back."""
    condition: Tensor
    """Of the flow head, [B or 2 B, A, Z]: with guidance those without caption come second."""
    guidance: float


class QueryDecoding:
    """Group by group."""

    repeated = ("flow",)

    def __init__(self, settings: QuerySampling) -> None:
        self.settings = settings
        self.grid: list[float] = self.times().tolist()

    def draw(
        self, generator: QueryGenerator, tokenizer: Continuous, condition: Condition, noise: Noise | None
    ) -> Tensor:
        """Latents float32 [B, N, C], row by row; see :class:`megavar.sampling.base.Procedure`."""
        finite, steps = FiniteLogits(), []
        for step in self.steps(generator, tokenizer, condition, noise):
            finite.note(step.tokens)
            steps.append(step)
        finite.require()
        places = torch.cat([step.places for step in steps], 1)
        tokens = torch.cat([step.tokens for step in steps], 1)
        return tokens.gather(1, places.argsort(1)[..., None].expand_as(tokens))

    def sizes(self, length: int) -> list[int]:
        """Latents of each group."""
        groups = max(1, length // self.settings.tokens_per_step)
        least, larger = divmod(length, groups)
        return [least + 1] * larger + [least] * (groups - larger)

    def order(self, length: int, indices: Tensor) -> Tensor:
        """Places in the order of drawing, int64 [B, N], for samples ``indices`` [B]."""
        places = torch.arange(length, device=indices.device)
        if self.settings.order == "sample":
            return seeds.random_bits(self.settings.seed, "sampling/order", indices[:, None], places).argsort(1)
        if self.settings.order == "random":
            seed = self.settings.seed if self.settings.order_seed is None else self.settings.order_seed
            places = torch.randperm(length, generator=torch.Generator().manual_seed(seed)).to(indices.device)
        return places.expand(len(indices), -1)

    def guidance_of(self, group: int, groups: int) -> float:
        """Of a group: ``guidance`` at the first, then falling to nearly 1."""
        share = (groups - group) / groups if self.settings.guidance_schedule == "linear" else 1.0
        return 1 + (self.settings.guidance - 1) * share

    @torch.no_grad()
    def steps(
        self, generator: QueryGenerator, tokenizer: Continuous, condition: Condition, noise: Noise | None
    ) -> Iterator[DrawnGroup]:
        """The groups one by one. Without ``noise`` every flow starts at zero, the mean of noise, and has none."""
        given = condition.with_dropped() if self.settings.guided else condition
        samples, copies = len(condition), len(given) // len(condition)
        assert given.text is not None, "build_sampler encodes captions"
        space, device = tokenizer.space, given.text.ids.device
        indices = noise.indices if noise is not None else torch.arange(samples, device=device)
        groups = self.order(space.length, indices).split(self.sizes(space.length), 1)
        counted = torch.arange(len(given), device=device) < samples
        rows = Rows(generator.choice, given.text, space.length, space.channels, self.settings.context == "training")
        places, tokens = groups[0][:, :0], torch.zeros(samples, 0, space.channels, device=device)
        for number, asked in enumerate(groups):
            inputs = rows.following(places.repeat(copies, 1), tokens.repeat(copies, 1, 1), asked.repeat(copies, 1))
            told = generator.step(inputs, rows.cache, counted)
            guidance = self.guidance_of(number, len(groups))
            raw = self.flow(generator, told, asked, space.channels, guidance, noise)
            places, tokens = asked, _normalized(tokenizer, raw)
            yield DrawnGroup(places, raw, tokens, told, guidance)

    def times(self) -> Tensor:
        """The grid, float64, falling from 1 to 0."""
        last, steps = self.settings.last_step, self.settings.steps
        even = torch.linspace(1, last, steps + (last == 0), dtype=torch.float64)
        grid = torch.cat([even, torch.zeros(1, dtype=torch.float64)]) if last else even
        return flow_matching.shifted(grid, self.settings.time_shift)

    def flow(
        self, generator: QueryGenerator, told: Tensor, places: Tensor, channels: int, guidance: float,
        noise: Noise | None,
    ) -> Tensor:  # fmt: skip
        """From noise to the latents of a group, float32 [B, A, C].

        Args:
            told: conditions of the flow head [B, A, Z]; with guidance 2 B of them.
            places: int64 [B, A].
        """

        def normal(step: int) -> Tensor:
            if noise is None:
                return torch.zeros(*places.shape, channels, device=places.device)
            return noise.normal(places, channels, repetition=step)

        def velocity_at(noisy: Tensor, time: float) -> Tensor:
            if guidance <= 1:
                return generator.velocity(noisy, torch.full_like(noisy[..., 0], time), told[: len(noisy)])
            both = noisy.repeat(len(told) // len(noisy), 1, 1)
            return guided(generator.velocity(both, torch.full_like(both[..., 0], time), told), guidance)

        if self.settings.solver == "euler" or noise is None:
            return flow_matching.euler(velocity_at, normal(0), self.grid)
        plain_last = self.settings.last_step > 0
        return flow_matching.euler_maruyama(velocity_at, normal(0), self.grid, normal, plain_last=plain_last)


class Rows:
    """What is fed to a generator step by step, and the cache of what it has read."""

    def __init__(self, choice: QueryARConfig, text: Text, length: int, channels: int, crop: bool) -> None:
        """Begin with ``text``; ``crop``: bare queries are forgotten, padding stays hidden."""
        start = torch.tensor(choice.image_start, device=text.ids.device).expand(len(text.ids), -1)
        self.text = torch.cat([text.ids, start], 1)
        self.valid = torch.cat([text.mask, torch.ones_like(start, dtype=torch.bool)], 1)
        self.crop, self.channels = crop, channels
        self.cache = KeyValueCache(self.text.shape[1] + 3 * length)
        self.complete = 0
        """Rows of the cache that stay."""
        self.fed = 0
        """All of them."""

    def following(self, places: Tensor, tokens: Tensor, asked: Tensor) -> QueryInputs:
        """The next pass: latents [B, P, C] that are known now, of ``places`` [B, P], and queries ``asked`` [B, A]."""
        text = self.text if self.fed == 0 else None
        again = places.shape[1] > 1  # with their queries
        if again and self.crop:
            self.cache.crop(self.complete)
            self.fed = self.complete
        pairs = 2 if again else 1
        known = torch.stack([places] * pairs, 2).flatten(1)
        values = torch.stack([torch.zeros_like(tokens)] * (pairs - 1) + [tokens], 2).flatten(1, 2)
        rows = known.shape[1]
        holds = torch.arange(rows + asked.shape[1], device=asked.device)
        holds = (holds < rows) & (holds % pairs == pairs - 1)
        before = self.fed + (self.text.shape[1] if text is not None else 0)
        inputs = QueryInputs(
            text,
            torch.cat([known, asked], 1),
            torch.cat([values, values.new_zeros(*asked.shape, self.channels)], 1),
            holds,
            slice(rows, None),
            valid=self._valid(before + rows + asked.shape[1]) if self.crop or text is not None else None,
            positions=None if text is not None else self._positions(rows + asked.shape[1]),
        )
        self.complete = before + rows
        self.fed = self.complete + asked.shape[1]
        return inputs

    def _valid(self, rows: int) -> Tensor:
        more = torch.ones(len(self.valid), rows - self.valid.shape[1], dtype=torch.bool, device=self.valid.device)
        return torch.cat([self.valid, more], 1)

    def _positions(self, rows: int) -> Tensor:
        """They go on from the last one, padding not counted."""
        first = self.valid.sum(1, keepdim=True) + self.fed - self.valid.shape[1]
        return first + torch.arange(rows, device=first.device)


def guided(velocities: Tensor, *strengths: float) -> Tensor:
    """The last of n + 1 velocities [(n + 1) B, ...] plus ``strengths`` times the differences between neighbours.

    With one strength g: u + g (c - u). With two: the second from the least to the less conditional one (VGT's third
    condition for editing).
    """
    parts = velocities.chunk(len(strengths) + 1)
    result = parts[-1]
    for strength, better, worse in zip(strengths, parts, parts[1:]):
        result = result + strength * (better - worse)
    return result


def _normalized(tokenizer: Continuous, tokens: Tensor) -> Tensor:
    normalize = getattr(tokenizer, "normalize", None)
    return tokens if normalize is None else normalize(tokens)
