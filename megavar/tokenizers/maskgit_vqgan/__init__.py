"""MaskGIT's VQGAN: one square map of tokens."""

from megavar.tokenizers.maskgit_vqgan.model import Decoder, MaskGITVQGAN

__all__ = ["Decoder", "MaskGITVQGAN"]
