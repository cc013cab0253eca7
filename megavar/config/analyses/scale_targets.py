"""What each scale learns and predicts where scales are vectors (SAR Fig. 2 and 3)."""

from typing import ClassVar, Literal

from pydantic import Field

from megavar.config.analyses.base import ObservedChoice


class ScaleTargetsAnalysis(ObservedChoice):
    """Targets and inputs of every scale, what is drawn after true maps (training) and after own ones (inference)."""

    implementation: ClassVar[str] = "megavar.analysis.kinds.scale_targets:ScaleTargets"

    kind: Literal["scale_targets"] = "scale_targets"
    shown: int = Field(0, ge=0)
    """Number, from 0, of the image in the picture."""
