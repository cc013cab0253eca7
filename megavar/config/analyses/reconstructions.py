"""How well a tokenizer of scales reconstructs, scale by scale (FlexVAR's multi-scale decoding)."""

from typing import ClassVar, Literal

from pydantic import Field

from megavar.config.analyses.base import ObservedChoice


class ReconstructionsAnalysis(ObservedChoice):
    """Test images from their coarser maps alone, against the images reduced to that size; an untrained tokenizer, too.

    Of a run that trains a tokenizer of token maps, or of the frozen one of a run that trains a generator.
    """

    implementation: ClassVar[str] = "megavar.analysis.kinds.reconstructions:Reconstructions"

    kind: Literal["reconstructions"] = "reconstructions"
    shown: int = Field(6, ge=1)
    """Images in the picture."""
