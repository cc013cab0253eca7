"""SAR: self-autoregressive refinement."""

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from megavar.config.recipes.base import PlannedPass
from megavar.config.recipes.next_scale import NextScaleConfig
from megavar.config.rollout import RolloutConfig


class SARConfig(NextScaleConfig):
    """SAR (``papers/sar.md`` section 4.2): teacher forcing, then one step on the model's own predictions.

    Text and code differ: Eq. 8 and 10 give the second pass the whole prefix, all scales, and teacher-forced predictions
    as targets; Alg. 1 takes one scale and the true tokens; the released code one scale, no prefix and drawn tokens. The
    defaults are the code's, which trained the published weights; ``configs/sar`` has the others.
    """

    implementation: ClassVar[str] = "megavar.recipes.sar:SAR"

    name: Literal["sar"] = "sar"
    student_weight: float = Field(0.01, ge=0)
    """gamma of Eq. 11. Not in the paper; the released scripts' ``sigma``."""
    target: Literal["drawn", "most_likely", "soft", "true"] = "drawn"
    """What student-forced predictions are compared with: the tokens that the rollout drew (code), the most likely ones,
    the teacher-forced distribution itself (``soft``: the literal Eq. 10), or the true tokens (Alg. 1)."""
    student_scales: Literal["last", "random", "all"] = "last"
    """Which scales the second pass predicts: the last (code), one at random per step (its comment), all but the first
    (Eq. 10)."""
    context: Literal["single_step", "prefix"] = "single_step"
    """What it sees: the class and the scale before (code, Alg. 1), or all coarser scales' predictions (Eq. 8)."""
    rollout: RolloutConfig = RolloutConfig()
    """How tokens are drawn."""
    start_position: bool = False
    """Whether the class's row keeps its start position without the prefix. The released code leaves it out."""
    independent_label_drop: bool = True
    """Whether the second pass drops labels anew (code), or those of the first."""

    @model_validator(mode="after")
    def _passes_of_all_ranks(self) -> "SARConfig":
        if self.student_scales == "all" and self.context == "single_step":
            self.refuse_lists_of_ranks("student_scales: all with context: single_step")
        return self

    def passes_of_step(self, sides: tuple[int, ...]) -> tuple[PlannedPass, ...]:
        """The first pass, twice as large with guidance, and the second: all maps, or the first one and a later one."""
        first = PlannedPass(copies=2 if self.rollout.guided else 1)
        if len(sides) < 2:
            return (PlannedPass(),)
        if self.context == "prefix":
            return first, PlannedPass()
        later = sides[-1:] if self.student_scales == "last" else sides[1:]
        share = 1 / len(later) if self.student_scales == "random" else 1.0
        return first, *(PlannedPass((sides[0], side), share=share) for side in later)
