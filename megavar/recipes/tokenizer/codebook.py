"""Codebook upkeep: seeding from data, usage averages, revival of dead codes, usage metrics.

After an optimizer step that is due, codes that are hardly used are replaced by vectors which the quantizer had to
quantize in that step's global batch. Which code takes which vector is a function of (seed, step, sample), so every rank
replaces the same codes by the same vectors, and the number of ranks and micro-batches does not matter.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from megavar.config.recipes.tokenizer import CodebookConfig
from megavar.parallel.seeds import random_bits
from megavar.recipes.ranks import gather_over_ranks, rank, sum_over_ranks
from megavar.tokenizers.trainable import Quantizer, QuantizerOutput

_STREAM = "revived_codes"
NO_UPKEEP = CodebookConfig(draw_from_data=False, revive_every=0)
"""Usage is watched, and nothing replaced."""


class Replacement(NamedTuple):
    """New values of some codes, equal on all ranks: what :class:`WriteRows` takes."""

    rows: Tensor
    """int64 [n]: which codes."""
    vectors: Tensor
    """float32 [n, C]."""
    moves: Tensor | None = None
    """float32 [n] in [0, 1]: how far the codes go there; by default all the way."""


class Upkeep(Protocol):
    """Watches the quantizer's micro-batches of a step and says after it which codes change."""

    def begin(self) -> None:
        """A step begins: forget what was seen in one that was not applied."""
        ...

    def observe(self, step: int, quantized: QuantizerOutput, keys: Tensor) -> None:
        """Note a micro-batch of B samples; ``keys`` are int64 [B], different for different samples."""
        ...

    def after_step(self, step: int) -> Replacement | None:
        """The codes that change, if any. Collective."""
        ...


class CodebookUpkeep:
    """Watches the quantizer's micro-batches of a step and proposes replacements after it.

    The usage averages live in the quantizer's buffer ``usage_average``: hits of each code per scale and step, over the
    global batch, as in VAR's code.
    """

    def __init__(self, config: CodebookConfig, quantizer: Quantizer, seed: int, *, fresh: bool) -> None:
        """``fresh``: the codebook is random, so it may be drawn from the first batch."""
        self.config = config
        self.quantizer = quantizer
        self.seed = seed
        self.fresh = fresh
        self.sizes = list(quantizer.parts.values())
        self._usage: list[Tensor] = []
        self._keys: list[Tensor] = []
        self._vectors: list[Tensor] = []

    def draws_codebook(self, step: int) -> bool:
        """Whether the whole codebook is replaced after ``step``."""
        return step == 0 and self.fresh and self.config.draw_from_data

    def due(self, step: int) -> bool:
        """Whether codes may be replaced after ``step``."""
        every, until = self.config.revive_every, self.config.revive_until
        revives = every > 0 and (step + 1) % every == 0 and (until is None or step < until)
        return revives or self.draws_codebook(step)

    def begin(self) -> None:
        """See :class:`Upkeep`."""
        self._usage, self._keys, self._vectors = [], [], []

    def observe(self, step: int, quantized: QuantizerOutput, keys: Tensor) -> None:
        """Note a micro-batch of B samples; ``keys`` are int64 [B], different for different samples."""
        self._usage.append(quantized.usage)
        if self.due(step):
            self._keys.append(keys)
            self._vectors.append(quantized.targets)

    @torch.no_grad()
    def after_step(self, step: int) -> Replacement | None:
        """Update the usage averages; return the codes to replace, if any. Collective."""
        if not self._usage:
            return None
        usage = sum_over_ranks(torch.stack(self._usage).sum(dim=0))
        average = self.quantizer.usage_average
        decay = self.config.usage_decay * average.any()  # the first step's usage is taken as it is
        average.copy_(decay * average + (1 - decay) * usage)
        replacement = self._replacement(step, average) if self.due(step) else None
        self.begin()
        return replacement

    def _replacement(self, step: int, average: Tensor) -> Replacement | None:
        hits = average.float().sum(dim=0)
        limit = math.inf if self.draws_codebook(step) else self.config.dead_below
        dead = (hits < limit * hits.mean()).nonzero().flatten()
        if len(dead) == 0:
            return None
        replacement = self._draw(step, dead)
        if len(replacement.rows) == 0 or not bool(replacement.vectors.isfinite().all()):
            return None
        # As if the code had been used like the others, so that it has time to prove itself.
        average[:, replacement.rows] = average.mean(dim=1, keepdim=True)
        return replacement

    def _draw(self, step: int, dead: Tensor) -> Replacement:
        """Different vectors for the dead codes, evenly from all scales; fewer if the batch has fewer vectors."""
        keys, vectors = torch.cat(self._keys), torch.cat(self._vectors)  # [b], [b, L, C] on this rank
        samples = _distinct(gather_over_ranks(keys))
        first_scale = int(random_bits(self.seed, _STREAM, step)) % len(self.sizes)
        quotas = _quotas(len(dead), [len(samples) * size for size in self.sizes], first_scale)
        owners, positions = [], []
        for scale, (size, quota) in enumerate(zip(self.sizes, quotas)):
            candidates = torch.arange(len(samples) * size, device=dead.device)
            chosen = random_bits(self.seed, _STREAM, step, scale, candidates).argsort()[:quota]
            owners.append(samples[chosen // size])
            positions.append(sum(self.sizes[:scale]) + chosen % size)
        owner, position = torch.cat(owners), torch.cat(positions)
        mine = owner // len(keys) == rank()
        drawn = vectors.new_zeros(len(owner), vectors.shape[-1])
        drawn[mine] = vectors[owner[mine] % len(keys), position[mine]]
        return Replacement(dead[: len(owner)], sum_over_ranks(drawn))


def _quotas(wanted: int, available: list[int], first: int) -> list[int]:
    """Share ``wanted`` evenly; a remainder goes to scales from ``first`` on, what a scale lacks to the finer ones."""
    scales = len(available)
    quotas, surplus = [], 0
    for scale, candidates in enumerate(available):
        share = wanted // scales + ((scale - first) % scales < wanted % scales) + surplus
        quotas.append(min(share, candidates))
        surplus = share - quotas[-1]
    return quotas


def _distinct(keys: Tensor) -> Tensor:
    """Indices of the samples in the order of their keys, each sample once (ranks may hold copies): int64 [n]."""
    ordered, index = keys.sort(stable=True)
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[1:] = ordered[1:] != ordered[:-1]
    return index[first]


def usage_metrics(usage: Tensor, parts: Iterable[str]) -> dict[str, float]:
    """Metrics of usage counts [K, V]: perplexity and share of codes in use, per part of a row and over all of them.

    Perplexity is the exponential of the entropy of the code distribution: the number of equally used codes that would
    carry as much information. 1 means that the scale has collapsed.
    """
    usage = usage.double().cpu()
    metrics = {}
    for name, counts in [("all_scales", usage.sum(dim=0)), *zip(parts, usage)]:
        share = counts / counts.sum().clamp_min(1)
        metrics[f"perplexity/{name}"] = math.exp(-float(torch.xlogy(share, share).sum()))
        metrics[f"codes_used/{name}"] = float((counts > 0).double().mean())
    return metrics
