"""Naive student forcing."""

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

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

    @property
    def passes_of_step(self) -> tuple[int, int]:
        """One with a loss, and a rollout per scale: 9 of VAR's 10, each counted as if it had all scales."""
        rollouts = {"full": 9, "alternate": 5, "interleave": 5, "hybrid": 3}[self.schedule]
        return 1, rollouts * (2 if self.rollout.guided else 1)
