"""Naive student forcing (``papers/sar.md`` section 4.1, Eq. 3, Table 3): what SAR improves on.

    for each scale that shall follow the model's own tokens, coarse to fine:
        rollout:  predict the scale before from what is there, without gradient; draw its tokens
    then one pass with a loss: all scales, after drawn tokens where the schedule says so, against the true tokens

A scale's tokens are drawn in the very context that the last pass gives it, so a schedule of n drawn scales takes n
rollouts: the cost that the paper complains of.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from megavar.config.recipes.student_forcing import StudentForcingConfig
from megavar.data.batch import Batch
from megavar.generators.base import GeneratorOutput
from megavar.generators.inputs import ScaleInputs
from megavar.recipes.base import Pass
from megavar.recipes.next_scale import NextScale, NextScaleInputs
from megavar.recipes.rollouts import Rollout, bounds_of, uniform_of


@dataclass
class StudentInputs(NextScaleInputs):
    """A prepared micro-batch."""

    uniform: Tensor = field(default_factory=lambda: torch.empty(0))
    """float64 [B, L]: decides what rollouts draw; a function of (seed, epoch, sample, position)."""
    mixed: Tensor | None = None
    """int64 [B, L]: true tokens, or drawn ones where a rollout has drawn them; None: all are true."""


class StudentForcing(NextScale):
    """Rollouts, then next-scale prediction after what they drew."""

    config: StudentForcingConfig

    @functools.cached_property
    def rollout(self) -> Rollout:
        """What draws tokens."""
        return Rollout(self.config.rollout, self.classes)

    def prepare(self, batch: Batch, step: int) -> StudentInputs:
        """Teacher-forcing inputs, and what rollouts draw from."""
        given = super().prepare(batch, step)
        uniform = uniform_of(batch, given.targets.shape[1], self.seed)
        return StudentInputs(given.model, given.targets, given.terms, uniform)

    def passes(self, module: str, step: int) -> Sequence[Pass]:
        """A rollout for each student-forced scale, then all scales with their loss."""
        rollouts = [
            Pass(
                functools.partial(self.prefix_forward, count=scale),
                None,
                carry=functools.partial(self.roll_out, scale=scale - 1),
                following=functools.partial(self.with_drawn, scale=scale - 1),
                copies=self.rollout.copies,
            )
            for scale in self.config.student_scales(self.scale_lists.of_step(step), step)
        ]
        return [*rollouts, *super().passes(module, step)]

    def prefix_forward(self, model: Callable[[ScaleInputs], Any], inputs: StudentInputs, count: int) -> Any:
        """The first ``count`` scales."""
        bounds = bounds_of(self.sides(inputs))
        features = inputs.model.features
        assert features is not None
        rows = features[:, : bounds[count - 1][1] - bounds[0][1]]
        return model(self.rollout.doubled(replace(inputs.model, features=rows, only=tuple(range(count)))))

    def roll_out(self, output: GeneratorOutput, inputs: StudentInputs, scale: int) -> Tensor:
        """Tokens of a scale, int64 [B, L_k]."""
        bounds = bounds_of(self.sides(inputs))
        rows = slice(*bounds[scale])
        return self.rollout.draw(output.prediction[:, rows], inputs.uniform[:, rows], scale, len(bounds))

    def with_drawn(self, inputs: StudentInputs, drawn: Tensor, scale: int) -> StudentInputs:
        """The inputs with what follows from drawn tokens of a scale in place of the true ones."""
        sides = self.sides(inputs)
        rows = slice(*bounds_of(sides)[scale])
        mixed = (inputs.targets if inputs.mixed is None else inputs.mixed).clone()
        mixed[:, rows] = drawn
        model = replace(inputs.model, features=self.tokenizer.inputs(mixed, sides))
        return replace(inputs, model=model, mixed=mixed)
