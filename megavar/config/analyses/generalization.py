"""How well unseen images are predicted (reAR Fig. 8a)."""

from typing import ClassVar, Literal

from pydantic import Field

from megavar.config.analyses.base import ObservedChoice


class GeneralizationAnalysis(ObservedChoice):
    """Correct token ratio and loss on trained and unseen images, with clean contexts and with noisy ones."""

    implementation: ClassVar[str] = "megavar.analysis.kinds.generalization:Generalization"

    kind: Literal["generalization"] = "generalization"
    images: int = Field(2048, ge=1)
    """Of either kind, from the first on. The paper: as many of the training set as the validation set has, 50,000."""
    noise: float = Field(0.1, ge=0, le=1)
    """Share of the tokens read that are replaced by random ones, for the noisy contexts."""
