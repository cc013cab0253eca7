"""FlexVAR's tokenizer: LlamaGen's VQ autoencoder, quantized at several scales."""

from megavar.tokenizers.llamagen_vq.model import LlamaGenVQ

__all__ = ["LlamaGenVQ"]
