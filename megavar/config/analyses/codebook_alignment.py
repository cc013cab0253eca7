"""Where hidden states resemble code vectors (reAR Fig. 8b, 8c)."""

from typing import ClassVar, Literal

from pydantic import Field

from megavar.config.analyses.base import ObservedChoice


class CodebookAlignmentAnalysis(ObservedChoice):
    """Linear CKA of the hidden states of every layer with the vectors of the current and of the next token."""

    implementation: ClassVar[str] = "megavar.analysis.kinds.codebook_alignment:CodebookAlignment"

    kind: Literal["codebook_alignment"] = "codebook_alignment"
    images: int = Field(64, ge=1)
    """Test images, from the first on; every token of them counts. The paper does not say how many."""
    noise: float = Field(0.0, ge=0, le=1)
    """Share of the tokens read that are replaced by random ones; vectors are those of the true ones."""
