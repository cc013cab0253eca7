"""MAR's training."""

from typing import ClassVar, Literal

from pydantic import Field

from megavar.config.recipes.base import GeneratorRecipeChoice


class MARRecipeConfig(GeneratorRecipeChoice):
    """Masked tokens by diffusion, given the others (``mar.py``, ``diffloss.py``)."""

    implementation: ClassVar[str] = "megavar.recipes.mar:MaskedDiffusion"

    name: Literal["mar"] = "mar"
    noise_draws: int = Field(4, ge=1)
    """Times and noises of each token per step (``diffusion_batch_mul``)."""
    least_masked: float = Field(0.7, gt=0, le=1)
    """Smallest share of masked tokens; the share is normal around 1 with deviation 0.25, cut off at it and at 1."""
    masked_share: Literal["batch", "sample"] = "batch"
    """One share for all samples of a step (released: of a rank's micro-batch), or one for each sample."""
    posterior: Literal["sample", "mean"] = "sample"
    """Of a KL-VAE's latent: drawn anew in every epoch (released), or its mean. VGT-AE has none."""
