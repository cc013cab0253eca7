"""How different the hidden states of scales are (MEPA Fig. 1a)."""

from typing import ClassVar, Literal

from pydantic import Field

from megavar.config.analyses.base import ObservedChoice


class ScaleFeaturesAnalysis(ObservedChoice):
    """Hidden states of each scale in two dimensions, and numbers of how far scales lie apart."""

    implementation: ClassVar[str] = "megavar.analysis.kinds.scale_features:ScaleFeatures"

    kind: Literal["scale_features"] = "scale_features"
    block: int | None = Field(None, ge=0)
    """Number, from 0, of the block whose output is taken. Default: the middle one. The paper does not say."""
    points: int = Field(200, ge=8)
    """Tokens of each scale that are drawn and measured; scales with fewer give all they have."""
    embedding: Literal["tsne", "pca"] = "tsne"
    """How two dimensions come about: t-SNE (perplexity 30) of 50 principal components, or the first two of them."""
    seed: int = 0
    """Chooses the tokens and begins t-SNE."""
