"""What a tokenizer's latents look like, and what they know of classes (VGT Fig. 7)."""

from typing import ClassVar, Literal

from pydantic import Field

from megavar.config.analyses.base import ObservedChoice


class LatentSpaceAnalysis(ObservedChoice):
    """Latent tokens in two dimensions, by class, and numbers that need no picture.

    Of runs of tokenizers; beside a run's latents what its encoder says before they are projected, if it is a pretrained
    one, and the pixels of the same patches.
    """

    implementation: ClassVar[str] = "megavar.analysis.kinds.latent_space:LatentSpace"

    kind: Literal["latent_space"] = "latent_space"
    points: int = Field(3000, ge=16)
    """Tokens that are drawn, of all images. The paper does not say."""
    embedding: Literal["tsne", "pca"] = "tsne"
    """How two dimensions come about: t-SNE (perplexity 30) of 50 principal components, or the first two of them."""
    seed: int = 0
    """Chooses the tokens and begins t-SNE and k-means."""
