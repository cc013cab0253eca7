"""What all recipes of next-scale prediction have in common."""

from pydantic import Field

from megavar.config.noise import NoiseConfig
from megavar.config.recipes.base import GeneratorRecipeChoice
from megavar.config.scale_lists.base import ScaleListsChoice


class NextScaleConfig(GeneratorRecipeChoice):
    """Teacher forcing on maps of growing side, which SAR begins with, too."""

    scale_lists: ScaleListsChoice = Field(default_factory=ScaleListsChoice.make)
    """On which scales a step trains: the tokenizer's, or FlexVAR's random lists."""
    noise: NoiseConfig | None = None
    """Noisy contexts; none by default."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Label smoothing of the cross entropy (VAR: 0)."""
    cross_entropy_weight: float = Field(1.0, ge=0)
    """lambda in MEPA Eq. 13 (0.5 in its section 5.1): weighs the cross entropy of teacher forcing against semantic
    guidance and the balance loss. The logged loss is the cross entropy itself."""

    def refuse_lists_of_ranks(self, passes: str) -> None:
        """Where the number of a step's passes depends on its scales, and ranks would wait for each other for ever.

        Args:
            passes: the keys that make it so.
        """
        if getattr(self.scale_lists, "per", "step") == "rank":
            raise ValueError(
                f"{passes} has passes for scales, and with scale_lists.per: rank ranks would have different numbers of "
                f"them: set scale_lists.per to step"
            )
