"""Training of variational autoencoders."""

from typing import ClassVar, Literal

from pydantic import Field

from megavar.config.recipes.tokenizer import ReconstructionConfig


class KLVAETrainingConfig(ReconstructionConfig):
    """Training of a tokenizer of vectors by reconstruction: a KL-VAE (Rombach et al. 2022, ``LPIPSWithDiscriminator``),
    TiTok with ``quantization: vae`` (1d-tokenizer, ``ReconstructionLoss_Single_Stage``)."""

    implementation: ClassVar[str] = "megavar.recipes.tokenizer.kl_vae:KLVAETraining"
    trains: ClassVar[Literal["generator", "tokenizer", "teacher"]] = "tokenizer"

    name: Literal["kl_vae"] = "kl_vae"
    kl_weight: float = Field(1e-6, ge=0)
    """Weight of the divergence of an image's posterior from a standard normal distribution, in nats, summed over all
    tokens and channels (latent diffusion and TiTok: 1e-6), beside ``l2_weight`` times the mean squared error of its N
    pixel values. It is 2 s^2 l2_weight / N for a decoder that says x up to normal noise of deviation s (the evidence's
    lower bound), so smaller images ask for more: TiTok's 1e-6 with errors of images in [0, 1] (``l2_weight: 0.25``) is
    s = 0.63 of ours in [-1, 1] at 256 pixels, and the same s is 6.4e-5 at 32."""
