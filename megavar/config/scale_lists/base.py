"""The kind of all rules by which a step gets its list of scales."""

from typing import ClassVar

from megavar.config.choice import Choice


class ScaleListsChoice(Choice):
    """A rule; :class:`megavar.recipes.scale_lists.base.ScaleLists` is what it configures."""

    package: ClassVar[str] = "megavar.config.scale_lists"
    default: ClassVar[str | None] = "fixed"

    name: str
    """Which rule."""

    @property
    def varies(self) -> bool:
        """Whether steps have different lists: caches of tokens do not serve them, caches of latents do."""
        return True
