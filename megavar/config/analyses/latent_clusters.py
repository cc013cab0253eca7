"""Which places of images have alike latents (VGT Fig. 3)."""

from typing import ClassVar, Literal

from pydantic import Field

from megavar.config.analyses.base import ObservedChoice


class LatentClustersAnalysis(ObservedChoice):
    """k-means over the latent tokens of some images, painted on them.

    Of runs of tokenizers; beside a run's latents what its encoder says before they are projected, if it is a pretrained
    one, and the pixels of the same patches.
    """

    implementation: ClassVar[str] = "megavar.analysis.kinds.latent_clusters:LatentClusters"

    kind: Literal["latent_clusters"] = "latent_clusters"
    clusters: int = Field(8, ge=2)
    """k. The paper does not say."""
    shown: int = Field(8, ge=1)
    """Images that are painted, the first ones."""
    seed: int = 0
    """Begins k-means."""
