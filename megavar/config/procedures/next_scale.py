"""Decoding of next-scale generators."""

from typing import ClassVar, Literal

from pydantic import Field

from megavar.config.procedures.base import SamplingChoice


class NextScaleSampling(SamplingChoice):
    """One token map after the other, coarse to fine (VAR ``autoregressive_infer_cfg``)."""

    implementation: ClassVar[str] = "megavar.sampling.procedures.next_scale:NextScale"

    procedure: Literal["next_scale"] = "next_scale"
    guidance: float = Field(1.5, ge=0)
    """Classifier-free guidance at the last scale, t = guidance x k/(K-1) at scale k, logits (1+t) c - t u. VAR's README
    uses 1.5 (its paper 2.0)."""
    temperature: float = Field(1.0, gt=0)
    """Divides the guided logits."""
    top_k: int = Field(900, ge=0)
    """Keep the k most likely tokens (ties included); 0 keeps all."""
    top_p: float = Field(0.96, ge=0, le=1)
    """Then keep the smallest set of most likely tokens whose probability exceeds p; 0 keeps all."""

    @property
    def guided(self) -> bool:
        """With any guidance."""
        return self.guidance > 0
