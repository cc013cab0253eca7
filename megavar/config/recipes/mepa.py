"""VAR's and MEPA's next-scale prediction."""

from typing import ClassVar, Literal

from pydantic import Field

from megavar.config.recipes.base import GeneratorRecipeChoice


class MEPAConfig(GeneratorRecipeChoice):
    """MEPA: next-scale cross entropy on a VAR, with experts balanced by Eq. 10 where the generator has experts."""

    implementation: ClassVar[str] = "megavar.recipes.next_scale:NextScale"

    name: Literal["mepa"] = "mepa"
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Label smoothing of the cross entropy (VAR: 0)."""
    cross_entropy_weight: float = Field(1.0, ge=0)
    """lambda in MEPA Eq. 13 (0.5 in its section 5.1), which weighs the cross entropy against semantic guidance and the
    balance loss. The logged loss is the cross entropy itself."""
