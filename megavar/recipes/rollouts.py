"""A generator's own tokens while it is trained: drawn from its predictions, never differentiated through."""

import itertools
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from megavar.config.rollout import RolloutConfig
from megavar.data.batch import Batch
from megavar.generators.base import GeneratorOutput
from megavar.generators.inputs import ScaleInputs
from megavar.parallel import seeds
from megavar.parallel.vocabulary import all_logits, vocabulary_best
from megavar.sampling.filters import truncate
from megavar.sampling.guidance import guide
from megavar.sampling.noise import pick


class Rollout:
    """Draws tokens of scales. With guidance every image is in the batch twice, the second time without class."""

    def __init__(self, config: RolloutConfig, classes: int) -> None:
        """``classes``: the label that stands for "no class"."""
        self.config, self.classes = config, classes

    @property
    def copies(self) -> int:
        """How often each image is in the batch; see :class:`megavar.recipes.base.Pass`."""
        return 2 if self.config.guided else 1

    def doubled(self, inputs: ScaleInputs) -> ScaleInputs:
        """Inputs [2 B]: as given, then without class; as given where there is no guidance."""
        if not self.config.guided:
            return inputs
        keys, features = inputs.sample_keys, inputs.features
        return replace(
            inputs,
            labels=torch.cat([inputs.labels, torch.full_like(inputs.labels, self.classes)]),
            features=None if features is None else features.repeat(2, 1, 1),
            sample_keys=None if keys is None else keys.repeat(2),
        )

    def conditional(self, output: GeneratorOutput) -> GeneratorOutput:
        """The half with classes."""
        if not self.config.guided:
            return output
        half = tree_map(lambda value: value[: len(value) // 2], (output.prediction, output.taps, output.heads))
        return GeneratorOutput(*half)

    @torch.no_grad()
    def draw(self, logits: Tensor, uniform: Tensor, scale: int, count: int) -> Tensor:
        """Tokens of scale ``scale`` of ``count``; see :meth:`draw_along`."""
        return self.draw_along(logits, uniform, scale / max(count - 1, 1))

    @torch.no_grad()
    def draw_along(self, logits: Tensor, uniform: Tensor, along: float) -> Tensor:
        """Tokens of a scale that is ``along`` the way from 0, the first one, to 1, the last: guidance grows with it.

        Args:
            logits: float32 [copies B, rows, V / tensor-parallel size].
            uniform: float64 [B, rows], a function of (seed, epoch, sample, position).

        Returns:
            int64 [B, rows], the same on every tensor-parallel rank.
        """
        config = self.config
        if not config.sampled:
            return vocabulary_best(logits)
        logits = all_logits(logits)
        if config.guided:
            conditional, free = logits.chunk(2)
            logits = guide(conditional, free, 0.5 * config.guidance * (1 + along))
        return pick(truncate(logits, config.top_k, config.top_p), uniform)


def uniform_of(batch: Batch, length: int, seed: int) -> Tensor:
    """What decides the draws of a batch: float64 [B, length], a function of (seed, epoch, sample, position)."""
    positions = torch.arange(length, device=batch.labels.device)
    return seeds.uniform(seed, "rollout", batch.epochs[:, None], batch.sample_ids[:, None], positions)


def bounds_of(sides: Sequence[int]) -> list[tuple[int, int]]:
    """(first row, row after the last) of each scale."""
    return list(itertools.pairwise(itertools.accumulate((side * side for side in sides), initial=0)))
