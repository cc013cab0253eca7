"""VGT-AE (VGT section 3.2): f = E(x), z = phi(f), x^ = D(z).

    f  = vision encoder of a vision-language model                                   [B, L, d]
    z  = down(f), down = 3 x (f + Linear GELU Linear LN(f)), LN Linear GELU Linear   [B, L, d_z]
    z  = (z - mean over channels) / deviation over channels, at every position       second stage, Eq. 5
    x^ = bilinear(decoder(z))

Source: hustvl/VGT ``tokenizer/modeling/vlvae_intervl.py``, ``src/models/vgtae_qwen25vl.py``.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megavar.config.tokenizers.vgt_ae import VGTAEConfig
from megavar.parallel.logical import initialize_parameters
from megavar.tokenizers.posterior import Posterior
from megavar.tokenizers.vgt_ae.decoders import build_decoder
from megavar.tokenizers.vgt_ae.encoders import build_encoder

_EPSILON = 1e-6
_STD = 0.02


class AutoencoderOutput(NamedTuple):
    """The result of a training forward pass."""

    images: Tensor
    """Reconstructions, float32 [B, 3, H, W], not clamped."""
    semantic: Tensor
    """Semantic vectors of the encoder, float32 [B, L, d]."""
    latents: Tensor
    """What :meth:`VGTAE.encode` says, with gradient."""


class ResidualBlock(nn.Module):
    """``x + Linear(GELU(Linear(LN(x))))``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.LayerNorm(width, eps=_EPSILON), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, d] -> [B, L, d]."""
        return x + self.mlp(x)


class Projection(nn.Module):
    """Semantic vectors to few channels: [B, L, d] -> [B, L, d_z], twice d_z with a posterior."""

    def __init__(self, config: VGTAEConfig) -> None:
        super().__init__()
        width, channels = config.semantic_width, config.channels * (2 if config.posterior else 1)
        self.blocks = nn.ModuleList([ResidualBlock(width) for _ in range(config.residual_blocks)])
        self.out = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, channels), nn.GELU(), nn.Linear(channels, channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Project."""
        for block in self.blocks:
            x = block(x)
        return self.out(x)


class VGTAE(nn.Module):
    """See :class:`megavar.tokenizers.base.LatentMap`, ``Normalized`` and ``Semantic``.

    Latents are maps, float32 [B, c, h, w]; with a posterior means and log variances, [B, 2 c, h, w].
    """

    ends_in_convolution = False
    """What the decoder's last convolution makes is resized."""

    def __init__(self, config: VGTAEConfig) -> None:
        super().__init__()
        self.config, self.space, self.stride = config, config.space, config.stride
        self.encoder = build_encoder(config)
        self.projection = Projection(config)
        self.decoder: Any = build_decoder(config)

    def initialize(self, seed: int) -> None:
        """Draw fresh parameters, the same under every layout: see :func:`initial_value`."""
        initialize_parameters(self, initial_value, seed)

    def forward(self, images: Tensor, noise: Tensor | None = None, normal: Tensor | None = None) -> AutoencoderOutput:
        """Training: reconstruct through disturbed latents.

        Args:
            images: float [B, 3, H, W] in [-1, 1].
            noise: added to the latents of Eq. 5, float32 [B, L, d_z].
            normal: standard normal numbers of a posterior's sample, float32 [B, L, d_z]; None: its mean.
        """
        semantic = self.encoder.semantic(images)
        rows, columns = (size // self.stride for size in images.shape[2:])
        latents = self.latents(semantic, rows, columns)
        tokens = self.tokens(latents) if normal is None else self.sample(latents, normal)
        tokens = tokens if noise is None else tokens + noise
        maps = tokens.mT.unflatten(2, (rows, columns))
        return AutoencoderOutput(self.decode_maps(maps), semantic, latents)

    def semantic(self, images: Tensor) -> Tensor:
        """f = E(x), float32 [B, L, d]."""
        return self.encoder.semantic(images)

    def latents(self, semantic: Tensor, rows: int, columns: int) -> Tensor:
        """Semantic vectors to a map of latents; see the class."""
        projected = self.projection(semantic.to(self.dtype)).float() * self.config.scale + self.config.shift
        mean, *logarithm = projected.split(self.config.channels, -1)
        return torch.cat([self.normalize(mean), *logarithm], -1).mT.unflatten(2, (rows, columns))

    def encode(self, images: Tensor) -> Tensor:
        """float [B, 3, H, W] in [-1, 1], of any multiple of the stride, to latents."""
        rows, columns = (size // self.stride for size in images.shape[2:])
        return self.latents(self.encoder.semantic(images), rows, columns)

    def tokens(self, latents: Tensor) -> Tensor:
        """Means, float32 [B, L, c]."""
        return self.pack(latents[:, : self.config.channels])

    def sample(self, latents: Tensor, normal: Tensor) -> Tensor:
        """A sample of the posterior, float32 [B, L, c]; the latents themselves where there is none."""
        if not self.config.posterior:
            return self.tokens(latents)
        return self.tokens(latents) + self.pack(Posterior.of(latents, 1).deviation) * normal

    def normalize(self, tokens: Tensor) -> Tensor:
        """Each vector over its channels, [..., c] -> [..., c]; unchanged where latents are not normalized."""
        return F.layer_norm(tokens, tokens.shape[-1:], eps=_EPSILON) if self.config.normalize else tokens

    def decode(self, tokens: Tensor) -> Tensor:
        """float32 [B, L, c] -> [B, 3, H, W] in [-1, 1]."""
        return self.decode_maps(self.unpack(tokens)).clamp(-1, 1)

    def decode_maps(self, maps: Tensor) -> Tensor:
        """Maps [B, c, h, w] to images, float32, not clamped."""
        decoded = self.decoder(((maps - self.config.shift) / self.config.scale).to(self.dtype)).float()
        size = [side * self.stride for side in maps.shape[2:]]
        return decoded if list(decoded.shape[2:]) == size else F.interpolate(decoded, size, mode="bilinear")

    def unpack(self, tokens: Tensor) -> Tensor:
        """[B, L, c] -> [B, c, h, w]."""
        side = math.isqrt(tokens.shape[1])
        return tokens.mT.unflatten(2, (side, side))

    def pack(self, maps: Tensor) -> Tensor:
        """[B, c, h, w] -> [B, L, c]."""
        return maps.flatten(2).mT

    @property
    def dtype(self) -> torch.dtype:
        """The type of the parameters."""
        return self.projection.out[1].weight.dtype  # type: ignore[return-value,union-attr]


def initial_value(name: str, value: Tensor, generator: torch.Generator) -> None:
    """Encoder and projection normal with deviation 0.02, cut at twice of it, as VGT's new layers; a decoder that is
    trained from scratch uniform as Xavier's (released: ``random_init_fn``). Biases zero, scales one, layer scales 0.1.
    """
    last = name.rpartition(".")[2]
    if last in ("lambda_1", "lambda_2"):
        value.fill_(0.1)
    elif value.ndim == 1:
        value.fill_(0.0 if last == "bias" else 1.0)
    elif name.startswith("decoder.") and last == "weight":
        nn.init.xavier_uniform_(value, generator=generator)
    else:
        nn.init.trunc_normal_(value, std=_STD, a=-2 * _STD, b=2 * _STD, generator=generator)
