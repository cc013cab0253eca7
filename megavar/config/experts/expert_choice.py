"""Experts that choose their tokens."""

from collections.abc import Sequence
from fractions import Fraction
from typing import Any, ClassVar, Literal

from pydantic import Field

from megavar.config.experts.base import ExpertsChoice
from megavar.errors import ConfigError


class ExpertChoiceExperts(ExpertsChoice):
    """Every expert takes the tokens that suit it best, a fixed number of each group (Zhou et al., arXiv:2202.09368).

    MEPA compares with it (Table 4, "MoEEC") and says neither among which tokens experts choose nor how many. Loads are
    equal by construction, so there is no balance loss; a token may meet any number of experts, also none.
    """

    implementation: ClassVar[str] = "megavar.transformer.moe.routers.expert_choice:ExpertChoiceRouter"
    variable_number: ClassVar[bool] = True

    router: Literal["expert_choice"] = "expert_choice"
    capacity_factor: float | None = Field(None, gt=0)
    """Experts that a token meets on average, c. An expert takes k = c n / M of n tokens. Default: ``top_k`` (which has
    no other meaning here), so that experts compute as many tokens as under the routers that MEPA compares it with. The
    paper's is 2."""
    rounding: Literal["nearest", "floor", "ceil"] = "nearest"
    """Of k; halves go up. The paper does not say, its public implementation rounds, EC-DiT's takes the floor."""
    minimum: int = Field(1, ge=0)
    """Tokens that an expert takes at least of a group that has so many. Without it the first scale, one token, would
    meet no expert; with it, it meets all of them. (flaxformer's is 4, of much larger groups.)"""
    group: Literal["image_scale", "image", "batch"] = "image_scale"
    """Among which tokens an expert chooses. ``image_scale``: those of one scale of one image, which are known at once
    while decoding too, so that images are drawn by the function that was trained. ``image`` (EC-DiT): all of an image,
    so that in training the scales to come decide which experts a token meets. ``batch`` (DiffMoE): all of a rank's
    micro-batch, where other images decide, too; it depends on how a batch is split."""
    decoding_group: Literal["image_scale"] | None = None
    """Among which tokens an expert chooses while decoding, where that cannot be ``group``. Default: such a model is not
    decoded, because it would be another function than the one that was trained."""
    balance_coefficient: float = Field(0.0, ge=0)
    """Weight of MEPA's balance loss (Eq. 10): none, because it is constant where experts take equal shares."""

    def tokens_per_expert(self, tokens: Any) -> Any:
        """How many of ``tokens`` tokens of a group each expert takes, k; for an int or an int64 tensor alike."""
        asked = Fraction(str(self.capacity_factor or self.top_k)) / self.number
        share, whole = asked.numerator, asked.denominator
        if self.rounding == "nearest":
            taken = (2 * tokens * share + whole) // (2 * whole)
        elif self.rounding == "floor":
            taken = tokens * share // whole
        else:
            taken = (tokens * share + whole - 1) // whole
        taken = taken + (self.minimum - taken) * (taken < self.minimum)
        return taken + (tokens - taken) * (taken > tokens)

    def copies(self, sizes: Sequence[int]) -> float:
        """See :meth:`ExpertsChoice.copies`; the group ``batch`` is counted like ``image``."""
        groups = sizes if self.group == "image_scale" else (sum(sizes),)
        return self.number * sum(map(self.tokens_per_expert, groups)) / sum(sizes)

    def check_decoding(self) -> None:
        """Refuse groups that do not exist while decoding."""
        if self.group != "image_scale" and self.decoding_group is None:
            raise ConfigError(
                f"generator.experts.group={self.group}: experts chose among tokens of all scales in training, but "
                f"while decoding later scales do not exist yet. Train with group=image_scale, or set "
                f"generator.experts.decoding_group=image_scale to decode with another function than was trained."
            )
