"""Training of KL autoencoders."""

from typing import ClassVar, Literal

from pydantic import Field

from megavar.config.recipes.base import RecipeChoice


class KLVAETrainingConfig(RecipeChoice):
    """Training of a KL-VAE by reconstruction (Rombach et al. 2022, ``LPIPSWithDiscriminator``), without the parts that
    need other networks: for small autoencoders. Published ones are loaded."""

    implementation: ClassVar[str] = "megavar.recipes.kl_vae:KLVAETraining"
    trains: ClassVar[Literal["generator", "tokenizer", "teacher"]] = "tokenizer"

    name: Literal["kl_vae"] = "kl_vae"
    kl_weight: float = Field(1e-6, ge=0)
    """Weight of the divergence of an image's posterior from a standard normal distribution, summed over the map (latent
    diffusion: 1e-6), beside the mean squared error of its pixels."""
