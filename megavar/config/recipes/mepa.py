"""VAR's, FlexVAR's and MEPA's next-scale prediction."""

from typing import ClassVar, Literal

from megavar.config.recipes.next_scale import NextScaleConfig


class MEPAConfig(NextScaleConfig):
    """MEPA: next-scale cross entropy, with experts balanced by Eq. 10 where the generator has experts."""

    implementation: ClassVar[str] = "megavar.recipes.next_scale:NextScale"

    name: Literal["mepa"] = "mepa"
