"""The kind of all analyses: what to look at in a run that is trained."""

from typing import ClassVar

from pydantic import Field

from megavar.config.choice import Choice


class AnalysisChoice(Choice):
    """A look at runs; :class:`megavar.analysis.base.Analysis` is what it configures.

    Its keys are set on the command line as ``analysis.KEY=VALUE``.
    """

    discriminator: ClassVar[str] = "kind"
    package: ClassVar[str] = "megavar.config.analyses"

    kind: str
    """Which one."""


class ObservedChoice(AnalysisChoice):
    """An analysis that shows images to the generator."""

    images: int = Field(256, ge=1)
    """Test images, from the first on (training images, where there are no others); at most as many as there are."""
    batch: int = Field(32, ge=1)
    """Images at a time."""
