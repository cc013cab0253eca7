"""VAR's multi-scale VQ tokenizer."""

from megavar.tokenizers.multiscale_vq.autoencoder import MultiScaleVQ
from megavar.tokenizers.multiscale_vq.quantizer import MultiScaleQuantizer, Scale, phi_indices

__all__ = ["MultiScaleQuantizer", "MultiScaleVQ", "Scale", "phi_indices"]
