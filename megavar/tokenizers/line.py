"""Tokenizers whose tokens have no places in the image: their quantizer, and what their models share.

Quantizing is float32: a rounded distance picks another code.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megavar.config.token_space import TokenSpace
from megavar.tokenizers.nearest import nearest
from megavar.tokenizers.trainable import Codes
from megavar.tokenizers.vision import initialize_layers


class QuantizedLine(NamedTuple):
    """What becomes of vectors [B, L, C]."""

    features: Tensor
    """Codes with the gradient passed straight through to the vectors, [B, L, C]."""
    ids: Tensor
    """int64 [B, L]."""
    commitment: Tensor
    """Weighted commitment loss, scalar."""
    codebook: Tensor
    """Codebook loss, scalar."""


class LineQuantizer(nn.Module):
    """Each vector to the nearest of V codes; of unit length both, if ``normalized``."""

    def __init__(self, vocabulary: int, channels: int, *, normalized: bool, commitment_weight: float) -> None:
        super().__init__()
        self.normalized, self.commitment_weight = normalized, commitment_weight
        self.embedding = Codes(vocabulary, channels)

    def scaled(self, vectors: Tensor) -> Tensor:
        """float32 [..., C] as they are compared."""
        return F.normalize(vectors.float(), dim=-1) if self.normalized else vectors.float()

    def embed(self, ids: Tensor) -> Tensor:
        """Code vectors: int64 [...] -> float32 [..., C]."""
        return self.scaled(self.embedding(ids))

    def search(self, vectors: Tensor) -> Tensor:
        """float [B, L, C] -> int64 [B, L]."""
        return nearest(self.scaled(vectors).flatten(0, 1), self.scaled(self.embedding())).view(vectors.shape[:2])

    def forward(self, vectors: Tensor) -> QuantizedLine:
        """Quantize for training: the losses are beta mse(sg(e), z) and mse(e, sg(z))."""
        with torch.autocast(vectors.device.type, enabled=False):
            z, ids = self.scaled(vectors), self.search(vectors)
            code = self.embed(ids)
            commitment = self.commitment_weight * F.mse_loss(code.detach(), z)
            return QuantizedLine(z + (code - z).detach(), ids, commitment, F.mse_loss(code, z.detach()))


class LineTokenizer(nn.Module):
    """[patches of the image, L latent tokens] -> encoder -> L vectors -> ids -> decoder, as TiTok introduced it.

    Images are float32 [B, 3, H, W] in [-1, 1]; the encoder reads them in [0, 1].
    """

    config: Any
    """With ``space``, ``encoder``, ``decoder`` and the codebook's sizes."""
    encoder: nn.Module
    decoder: nn.Module
    latent_tokens: nn.Parameter
    quantize: LineQuantizer

    @property
    def space(self) -> TokenSpace:
        """Its tokens, as all others see them."""
        space: TokenSpace = self.config.space
        return space

    @property
    def dtype(self) -> torch.dtype:
        """The type of the parameters, and of all computation outside the quantizer, which is float32."""
        return self.latent_tokens.dtype

    def new_quantizer(self) -> LineQuantizer:
        """Of the configured codebook."""
        config = self.config
        return LineQuantizer(
            config.vocabulary_size, config.code_dimension, normalized=config.normalized_codes,
            commitment_weight=config.commitment_weight,
        )  # fmt: skip

    @torch.no_grad()
    def initialize(self, generator: torch.Generator | None = None) -> None:
        """Draw fresh parameters as TiTok does: tokens and positions normal with deviation 1 / sqrt(width)."""
        initialize_layers(self, generator)
        for part, width in ((self.encoder, self.config.encoder.width), (self.decoder, self.config.decoder.width)):
            for parameter in part.parameters(recurse=False):
                parameter.normal_(std=width**-0.5, generator=generator)
        self.latent_tokens.normal_(std=self.config.encoder.width**-0.5, generator=generator)
        if hasattr(self, "quantize"):  # else its tokens are vectors
            bound = 1 / self.config.vocabulary_size
            self.quantize.embedding.weight.uniform_(-bound, bound, generator=generator)

    def vectors(self, images: Tensor) -> Tensor:
        """Encoder alone, with gradient: float [B, 3, H, W] in [-1, 1] -> what it makes, [B, L, ...]."""
        vectors: Tensor = self.encoder((images.to(self.dtype) + 1) / 2, self.latent_tokens)
        return vectors

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Vectors before quantization: float [B, 3, H, W] in [-1, 1] -> float32 [B, L, C].

        Not under autocast, whatever the caller does: a rounded feature picks another token.
        """
        with torch.autocast(images.device.type, enabled=False):
            return self.vectors(images).float()

    @torch.no_grad()
    def tokens(self, latents: Tensor) -> Tensor:
        """int64 [B, L]."""
        return self.quantize.search(latents)

    def embed(self, ids: Tensor) -> Tensor:
        """Code vectors: int64 [...] -> float32 [..., C]."""
        return self.quantize.embed(ids)
