"""Training of SAR's hybrid of masked and next-scale prediction."""

from collections.abc import Sequence
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from megavar.config.recipes.base import PlannedPass
from megavar.config.recipes.next_scale import NextScaleConfig
from megavar.config.rollout import RolloutConfig


class MaskedScalesConfig(NextScaleConfig):
    """Masked tokens of the first map, all tokens of later maps; teacher forcing or student forcing (SAR Tables 2, 3).

    The rules are the public code's (``scalear_trainer.py``), which has the schedules of Table 3 for this model only.
    """

    implementation: ClassVar[str] = "megavar.recipes.masked_scales:MaskedScales"

    name: Literal["masked_scales"] = "masked_scales"
    schedule: Literal["teacher", "full", "alternate", "interleave", "hybrid"] = "teacher"
    """What maps after the first are made of. ``teacher``: true tokens. ``full``: the model's own tokens of the map
    before. ``alternate``: ``teacher`` in even steps, ``full`` in odd ones. ``interleave``: the second map, the fourth,
    ... follow own tokens. ``hybrid``: those finer than ``true_until``."""
    true_until: int = Field(8, ge=1)
    """``hybrid``: side of the last map that follows true tokens (k of the paper's "Hybrid @ k")."""
    mask_ratio: float | None = Field(None, gt=0, le=1)
    """Share of the first map's tokens that are masked. None draws it in every step from the left half of a normal
    distribution (``mask_ratio_mean``, ``mask_ratio_deviation``, ``smallest_mask_ratio``), as MAR does."""
    mask_ratio_mean: float = 1.0
    """Mean, and largest ratio (public code)."""
    mask_ratio_deviation: float = Field(0.25, gt=0)
    """Standard deviation (public code)."""
    smallest_mask_ratio: float = Field(0.7, gt=0, le=1)
    """Where the distribution is cut off (public code)."""
    rollout: RolloutConfig = RolloutConfig(guidance=1.2, top_p=0.96)
    """How tokens are drawn; the defaults are the public code's."""

    @model_validator(mode="after")
    def _no_additions(self) -> Self:
        if self.terms or self.noise is not None:
            raise ValueError("masked_scales adds no terms and no noise to its calls: leave out recipe.terms and noise.")
        if self.schedule in ("full", "alternate", "hybrid"):
            self.refuse_lists_of_ranks(f"schedule: {self.schedule}")
        return self

    def passes_of_step(self, sides: tuple[int, ...]) -> tuple[PlannedPass, ...]:
        """The recipe's calls, all with a loss; all but the last of a step draw tokens, guided in twice the batch."""
        prefixes = [sides[:count] for count in range(1, len(sides) + 1)]
        if self.schedule == "alternate":
            return PlannedPass(share=0.5), *self._drawing(prefixes, 0.5)
        if self.schedule == "full":
            return self._drawing(prefixes)
        if self.schedule == "interleave":
            return self._drawing([maps for maps in (sides[::2], sides[1::2]) if maps])
        if self.schedule == "hybrid":
            true = tuple(side for number, side in enumerate(sides) if number == 0 or side <= self.true_until)
            return self._drawing([true, *((side,) for side in sides[len(true) :])])
        return (PlannedPass(),)

    def _drawing(self, calls: Sequence[tuple[int, ...]], share: float = 1.0) -> tuple[PlannedPass, ...]:
        copies = 2 if self.rollout.guided else 1
        return *(PlannedPass(maps, copies, share) for maps in calls[:-1]), PlannedPass(calls[-1], share=share)
