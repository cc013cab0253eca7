"""Drawing by flow matching, scale by scale."""

from typing import ClassVar, Literal

from pydantic import Field

from megavar.config.procedures.base import SamplingChoice


class FlowARSampling(SamplingChoice):
    """FlowAR's sampler (``sampler.py``): Euler in float64, guided where the time is low enough.

    S: 25 steps, guidance 4.3 (eval.sh: 4.2) until 0.9. L: 25, 2.4, 0.9. H: 50, 2.4 (eval.sh: 2.8), 0.7.
    """

    implementation: ClassVar[str] = "megavar.sampling.procedures.flowar:NextScaleFlow"

    procedure: Literal["flowar"] = "flowar"
    steps: int = Field(25, ge=2)
    """Number n of the grid of times. ``released``: an odd n gives n - 1 steps."""
    grid: Literal["released", "uniform"] = "released"
    """``released``: half of the times between 1 and 0.3, half between 0.25 and 0; with 50 steps, and no other number,
    ``uniform``: n equal steps."""
    guidance: float = Field(4.3, ge=1)
    """Classifier-free guidance g of the last scale: u + g (c - u), growing linearly from 1 (none) at the first one."""
    guidance_until: float = Field(0.9, ge=0, le=1)
    """Times above are not guided (1 is noise)."""

    @property
    def guided(self) -> bool:
        """With any guidance."""
        return self.guidance > 1
