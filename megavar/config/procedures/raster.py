"""Decoding of raster generators."""

from typing import ClassVar, Literal

from pydantic import Field

from megavar.config.procedures.base import SamplingChoice


class RasterSampling(SamplingChoice):
    """Token by token, row by row, with power-cosine guidance (RAR ``generate``).

    RAR: B 16, 2.75, temperature 1; L 15.5, 2.5, 1.02; XL 6.9, 1.5, 1.02. reAR: S 22, 2.75; B 14.5, 2.25; L 10, 1.75.
    """

    implementation: ClassVar[str] = "megavar.sampling.procedures.raster:Raster"

    procedure: Literal["raster"] = "raster"
    guidance: float = Field(16.0, ge=1)
    """Classifier-free guidance g: at step s of L, u + (c - u) (1 + (g - 1) (1 - cos(pi (s/L)^power)) / 2). 1: none."""
    guidance_power: float = Field(2.75, ge=0)
    """How late guidance rises. 0: not at all, it is ``guidance`` from the first token on (reAR appendix E: 4)."""
    temperature: float = Field(1.0, gt=0)
    """Divides the guided logits."""
    top_k: int = Field(0, ge=0)
    """Keep the k most likely tokens (ties included); 0 keeps all."""
    top_p: float = Field(0.0, ge=0, le=1)
    """Then keep the smallest set of most likely tokens whose probability exceeds p; 0 keeps all."""

    @property
    def guided(self) -> bool:
        """With any guidance."""
        return self.guidance > 1
