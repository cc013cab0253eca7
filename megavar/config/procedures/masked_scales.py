"""Decoding of SAR's hybrid of masked and next-scale prediction."""

from typing import ClassVar, Literal

from pydantic import Field

from megavar.config.procedures.base import SamplingChoice


class MaskedScalesSampling(SamplingChoice):
    """The first map in several steps, as MaskGIT does without confidences, then one map after the other (public code).

    The defaults are FlexVAR's evaluation's; the paper gives none for Table 2.
    """

    implementation: ClassVar[str] = "megavar.sampling.procedures.masked_scales:MaskedScales"

    procedure: Literal["masked_scales"] = "masked_scales"
    guidance: float = Field(2.5, ge=0)
    """Classifier-free guidance, see ``guidance_form``."""
    guidance_form: Literal["var", "llamagen"] = "var"
    """``var``: (1 + t) c - t u with t = guidance (1 + r) / 2, r growing over steps of the first map, again over maps;
    ``llamagen``: u + (c - u) guidance / 2 in the first map, u + (c - u) guidance later."""
    first_steps: int = Field(8, ge=1)
    """Steps of the first map, with a cosine schedule."""
    temperature: float = Field(1.0, gt=0)
    """Divides the guided logits."""
    top_k: int = Field(900, ge=0)
    """Keep the k most likely tokens (ties included); 0 keeps all."""
    top_p: float = Field(0.95, ge=0, le=1)
    """Then keep the smallest set of most likely tokens whose probability exceeds p; 0 keeps all."""
    settled: bool = False
    """Whether tokens of the first map that were taken in a step stay. Off (public code): they are drawn again in every
    later step."""

    @property
    def guided(self) -> bool:
        """With any guidance."""
        return self.guidance > 0
