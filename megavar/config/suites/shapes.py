"""The suite ``shapes``."""

from typing import ClassVar, Literal

from pydantic import Field

from megavar.config.suites.base import SuiteChoice


class ShapesSuite(SuiteChoice):
    """ShapeEval: GenEval's six tasks on rendered shapes, for text-to-image models of the ``shapes`` source."""

    implementation: ClassVar[str] = "megavar.evaluation.suites.shapes:Shapes"

    name: Literal["shapes"] = "shapes"
    per_tag: int = Field(100, ge=1)
    """Prompts of each of the six kinds (kinds with fewer different prompts use all)."""
    per_prompt: int = Field(4, ge=1)
    """Images per prompt."""
    held_out: bool = True
    """Ask for combinations that training never shows; off: for those it shows."""
    seed: int = 0
    """Chooses the prompts."""
