"""The kind of all terms: losses that combine with any recipe of a generator."""

from typing import ClassVar

from pydantic import Field

from megavar.config.choice import Choice
from megavar.config.teachers.base import TeacherChoice


class TermChoice(Choice):
    """A loss on hidden states of the generator; :class:`megavar.recipes.terms.base.Term` is what it configures."""

    package: ClassVar[str] = "megavar.config.terms"

    name: str
    """Which loss."""
    weight: float = Field(1.0, ge=0)
    """Its share in the total loss."""

    def frozen_weights(self) -> dict[str, str]:
        """Paths of the weights that it uses and does not train (a teacher's), by what they are."""
        return {}

    @property
    def counted(self) -> bool:
        """Whether plans can count its head: its class has ``head_of`` (``recipes.terms.base``)."""
        return False

    @property
    def teachers(self) -> tuple[TeacherChoice, ...]:
        """Networks whose features it needs of every image."""
        return ()
