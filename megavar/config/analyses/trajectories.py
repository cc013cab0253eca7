"""How a generator goes on from an image's own coarse map (SAR Fig. 7)."""

from typing import ClassVar, Literal

from pydantic import Field

from megavar.config.analyses.base import ObservedChoice


class TrajectoriesAnalysis(ObservedChoice):
    """Images at every scale, drawn after the true maps up to a small one, the same for all runs.

    The scales are the run's own: ``sampling.scales=[1,2,3,4,8,10,13,16]`` gives the paper's 4, 8, 10, 13, 16.
    """

    implementation: ClassVar[str] = "megavar.analysis.kinds.trajectories:Trajectories"

    kind: Literal["trajectories"] = "trajectories"
    given: int = Field(4, ge=1)
    """Largest side of a map that is taken from the image; the paper's 4."""
    shown: int = Field(4, ge=1)
    """Images in the picture."""
