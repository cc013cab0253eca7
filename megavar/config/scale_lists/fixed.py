"""VAR's list of scales."""

from typing import ClassVar, Literal

from megavar.config.scale_lists.base import ScaleListsChoice


class FixedScaleLists(ScaleListsChoice):
    """Every step trains on the tokenizer's scales."""

    implementation: ClassVar[str] = "megavar.recipes.scale_lists.fixed:Fixed"

    name: Literal["fixed"] = "fixed"

    @property
    def varies(self) -> bool:
        """Never."""
        return False
