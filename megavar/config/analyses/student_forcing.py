"""What becomes of self-generated inputs over the scales (SAR Fig. 8)."""

from typing import ClassVar, Literal

from pydantic import Field

from megavar.config.analyses.base import ObservedChoice


class StudentForcingAnalysis(ObservedChoice):
    """Latents after true maps (teacher forcing) and after own ones (student forcing), and how far both are off."""

    implementation: ClassVar[str] = "megavar.analysis.kinds.student_forcing:StudentForcing"

    kind: Literal["student_forcing"] = "student_forcing"
    first: int | None = Field(None, ge=1)
    """Side of the first map that is drawn; those before it are true. Default: the last but three, in the paper 8 of
    8, 10, 13, 16."""
    shown: int = Field(0, ge=0)
    """Number, from 0, of the image in the picture."""
