"""Latent diffusion's KL-VAE: KL-16, SD's f8, EQ-VAE."""

from megavar.tokenizers.kl_vae.model import KLVAE

__all__ = ["KLVAE"]
