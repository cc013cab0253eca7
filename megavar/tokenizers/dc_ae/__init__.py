"""The deep-compression autoencoder."""

from megavar.tokenizers.dc_ae.model import DCAE

__all__ = ["DCAE"]
