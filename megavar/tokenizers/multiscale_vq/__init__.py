"""VAR's multi-scale VQ tokenizer."""

from megavar.tokenizers.multiscale_vq.autoencoder import MultiScaleVQ, Reconstruction
from megavar.tokenizers.multiscale_vq.quantizer import MultiScaleQuantizer, QuantizerOutput, Scale, phi_indices

__all__ = ["MultiScaleQuantizer", "MultiScaleVQ", "QuantizerOutput", "Reconstruction", "Scale", "phi_indices"]
