"""Naive student forcing."""

from collections.abc import Sequence
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from megavar.config.recipes.base import PlannedPass
from megavar.config.recipes.next_scale import NextScaleConfig
from megavar.config.rollout import RolloutConfig


class StudentForcingConfig(NextScaleConfig):
    """Naive student forcing (SAR section 4.1, Table 3): scales that are predicted after the model's own tokens.

    Table 3 is on FlexVAR; the public code has these schedules for its hybrid model only, whose scales do not see each
    other. Here a scale sees all coarser ones, as FlexVAR does, so each self-generated scale takes a rollout of its own.
    """

    implementation: ClassVar[str] = "megavar.recipes.student_forcing:StudentForcing"

    name: Literal["student_forcing"] = "student_forcing"
    schedule: Literal["full", "alternate", "interleave", "hybrid"] = "full"
    """Which scales follow drawn tokens instead of true ones. ``full``: all. ``alternate``: all in every second step,
    none in the others. ``interleave``: the second, the fourth, ... ``hybrid``: those finer than ``true_until``."""
    true_until: int = Field(8, ge=1)
    """``hybrid``: side of the last scale that follows true tokens (k of the paper's "Hybrid @ k"). With the public
    code's reading, which this is, Hybrid @ 16 is teacher forcing at 256 pixels, yet Table 3 prints 5.90 and 3.83."""
    rollout: RolloutConfig = RolloutConfig(guidance=1.2, top_p=0.96)
    """How tokens are drawn. Not in the paper; the defaults are those with which the public code runs."""

    @model_validator(mode="after")
    def _passes_of_all_ranks(self) -> Self:
        self.refuse_lists_of_ranks(f"schedule: {self.schedule}")
        return self

    def passes_of_step(self, sides: tuple[int, ...]) -> tuple[PlannedPass, ...]:
        """A rollout of the scales before each one that follows drawn tokens, and one pass with a loss."""
        share, copies = (0.5 if self.schedule == "alternate" else 1.0), (2 if self.rollout.guided else 1)
        drawn = [number for step in (0, 1) for number in self.student_scales(sides, step)]
        rollouts = (PlannedPass(sides[:number], copies, share, learns=False) for number in sorted(set(drawn)))
        return *rollouts, PlannedPass()

    def student_scales(self, sides: Sequence[int], step: int) -> list[int]:
        """Numbers of the scales that follow drawn tokens in a step, coarse to fine."""
        later = range(1, len(sides))
        if self.schedule == "alternate":
            return [*later] if step % 2 else []
        if self.schedule == "interleave":
            return [*later][::2]
        if self.schedule == "hybrid":
            return [number for number in later if sides[number] > self.true_until]
        return [*later]
