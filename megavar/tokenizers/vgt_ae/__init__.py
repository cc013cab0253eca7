"""VGT's autoencoder on the encoders of vision-language models."""

from megavar.tokenizers.vgt_ae.model import VGTAE

__all__ = ["VGTAE"]
