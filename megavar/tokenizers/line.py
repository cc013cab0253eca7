"""Tokenizers whose tokens have no places in the image: their quantizer, and what their models share.

Quantizing is float32: a rounded distance picks another code.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megavar.config.token_space import TokenSpace
from megavar.parallel.parameter_rule import ParameterRule
from megavar.tokenizers.nearest import nearest
from megavar.tokenizers.trainable import Codes, QuantizerOutput, Reconstruction
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
    targets: Tensor
    """What was compared with the codes, without gradient, [B, L, C]."""


class LineQuantizer(nn.Module):
    """Each of L vectors to the nearest of V codes; of unit length both, if ``normalized``."""

    usage_average: Tensor

    def __init__(
        self, length: int, vocabulary: int, channels: int, *, normalized: bool, commitment_weight: float
    ) -> None:
        super().__init__()
        self.normalized, self.commitment_weight = normalized, commitment_weight
        self.embedding = Codes(vocabulary, channels)
        self.parts = {"line": length}
        self.register_buffer("usage_average", torch.zeros(1, vocabulary))  # of our training

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
            codebook = F.mse_loss(code, z.detach())
            return QuantizedLine(z + (code - z).detach(), ids, commitment, codebook, z.detach())

    def watched(self, line: QuantizedLine) -> QuantizerOutput:
        """The same as recipes want to see it."""
        usage = torch.bincount(line.ids.flatten(), minlength=self.embedding.num_embeddings).float()
        return QuantizerOutput(line.features, line.commitment + line.codebook, [line.ids], line.targets, usage[None])


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
    ends_in_convolution = False
    decoding: tuple[str, ...] = ("decoder.",)
    separate_scales: tuple[int, ...] = ()

    @property
    def quantizer(self) -> LineQuantizer:
        """The quantizer."""
        return self.quantize

    @property
    def space(self) -> TokenSpace:
        """Its tokens, as all others see them."""
        space: TokenSpace = self.config.space
        return space

    @property
    def dtype(self) -> torch.dtype:
        """The type of the parameters, and of all computation outside the quantizer, which is float32."""
        return self.latent_tokens.dtype

    def rule(self, name: str) -> ParameterRule:
        """Weight decay on matrices, but for embeddings, tokens and codes, as in TiTok's training."""
        *_, module, last = ("", *name.split("."))
        free = last != "weight" or "embed" in name or module.startswith(("ln_", "norm"))
        return ParameterRule(decays=not free)

    def new_quantizer(self) -> LineQuantizer:
        """Of the configured codebook."""
        config = self.config
        return LineQuantizer(
            config.space.length, config.vocabulary_size, config.code_dimension, normalized=config.normalized_codes,
            commitment_weight=config.commitment_weight,
        )  # fmt: skip

    @torch.no_grad()
    def initialize(self, generator: torch.Generator | None = None) -> None:
        """Draw fresh parameters as TiTok does: tokens and positions normal with deviation 1 / sqrt(width)."""
        initialize_layers(self, generator, self.config.initial_std)
        for part, width in ((self.encoder, self.config.encoder.width), (self.decoder, self.config.decoder.width)):
            for parameter in part.parameters(recurse=False):
                parameter.normal_(std=width**-0.5, generator=generator)
        self.latent_tokens.normal_(std=self.config.encoder.width**-0.5, generator=generator)
        if hasattr(self, "quantize"):  # else its tokens are vectors
            bound = 1 / self.config.vocabulary_size
            self.quantize.embedding.weight.uniform_(-bound, bound, generator=generator)
            self.quantize.usage_average.zero_()

    def vectors(self, images: Tensor) -> Tensor:
        """Encoder alone, with gradient: float [B, 3, H, W] in [-1, 1] -> what it makes, [B, L, ...]."""
        vectors: Tensor = self.encoder((images.to(self.dtype) + 1) / 2, self.latent_tokens)
        return vectors

    def picture(self, features: Tensor) -> tuple[Tensor, Tensor | None]:
        """Codes with gradient, [B, L, C] -> images in [0, 1], not clamped, and the input of a last 3x3 convolution."""
        raise NotImplementedError

    def forward(self, images: Tensor, keys: Tensor | None = None, side: int | None = None) -> Reconstruction:
        """Training forward pass: float [B, 3, H, W] in [-1, 1] -> reconstruction and the quantizer's losses."""
        assert side is None, "a line has no smaller images"
        line = self.quantize(self.vectors(images))
        made, last_features = self.picture(line.features.to(self.dtype))
        last_features = None if last_features is None else last_features.detach()
        return Reconstruction(2 * made - 1, self.quantize.watched(line), last_features)

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
