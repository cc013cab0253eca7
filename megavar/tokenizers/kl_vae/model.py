"""The KL-VAE as a tokenizer of vectors, on diffusers' ``AutoencoderKL``.

Latents are what the encoder says of the posterior: means and log variances, float32 [B, 2 c, h, w], unscaled. Tokens
are scaled, and patches of p x p positions where the configuration says so (space to depth: channel-major, as
``pixel_unshuffle``).
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megavar.config.tokenizers.kl_vae import KLVAEConfig
from megavar.errors import missing_package
from megavar.parallel.parameter_rule import ParameterRule
from megavar.tokenizers.posterior import Posterior
from megavar.tokenizers.trainable import PosteriorReconstruction


def _build(config: KLVAEConfig) -> Any:
    """diffusers' module.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    except ImportError as error:
        raise missing_package("diffusers", "tokenizer.name=kl_vae") from error
    levels = len(config.channel_multipliers)
    down, up = ["DownEncoderBlock2D"] * levels, ["UpDecoderBlock2D"] * levels
    if config.attention != "none":
        down[-1] = "AttnDownEncoderBlock2D"
    if config.attention == "both":
        up[0] = "AttnUpDecoderBlock2D"
    return AutoencoderKL(
        in_channels=config.image_channels,
        out_channels=config.image_channels,
        down_block_types=tuple(down),
        up_block_types=tuple(up),
        block_out_channels=tuple(config.base_channels * multiplier for multiplier in config.channel_multipliers),
        layers_per_block=config.residual_blocks,
        latent_channels=config.latent_channels,
        norm_num_groups=config.norm_groups,
        sample_size=config.image_side,
        scaling_factor=config.scaling,
    )


class KLVAE(nn.Module):
    """See :class:`megavar.tokenizers.base.LatentMap`."""

    ends_in_convolution = False
    """It does, but diffusers' decoder does not say what that convolution reads."""

    def __init__(self, config: KLVAEConfig) -> None:
        super().__init__()
        self.config, self.space = config, config.space
        self.stride = config.downsample * config.patch
        self.vae = _build(config)

    def rule(self, name: str) -> ParameterRule:
        """Weight decay on all but biases and norms."""
        return ParameterRule(decays=not (name.endswith("bias") or "norm" in name.split(".")[-2]))

    @torch.no_grad()
    def initialize(self, generator: torch.Generator | None = None) -> None:
        """Fresh parameters: scales of norms one, biases zero, weights normal with variance 1 / (3 fan-in), as PyTorch's
        convolutions."""
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=(3 * parameter[0].numel()) ** -0.5, generator=generator)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)

    def forward(self, images: Tensor, *, normal: Tensor) -> PosteriorReconstruction:
        """See :class:`megavar.tokenizers.trainable.Variational`."""
        latents = self.encode(images)
        made = self.decode_maps(self.unpack(self.sample(latents, normal)))
        return PosteriorReconstruction(made, self.posterior(latents), None)

    def posterior(self, latents: Tensor) -> Posterior:
        """Of a map, unscaled: [B, 2 c, h, w] -> distributions of [B, c, h, w]."""
        return Posterior.of(latents, 1)

    def encode(self, images: Tensor) -> Tensor:
        """Means and log variances, float32 [B, 2 c, h, w]; images of any multiple of the stride."""
        return self.vae.quant_conv(self.vae.encoder(images)).float()

    def tokens(self, latents: Tensor) -> Tensor:
        """Means, float32 [B, L, C]."""
        return self.pack(self.posterior(latents).mean * self.config.scaling)

    def sample(self, latents: Tensor, normal: Tensor) -> Tensor:
        """A sample of the posterior, float32 [B, L, C]; see :class:`megavar.tokenizers.base.Continuous`."""
        return self.tokens(latents) + self.pack(self.posterior(latents).deviation * self.config.scaling) * normal

    def decode(self, tokens: Tensor) -> Tensor:
        """float32 [B, L, C] -> [B, 3, H, W] in [-1, 1]."""
        return self.decode_maps(self.unpack(tokens)).clamp(-1, 1)

    def decode_maps(self, maps: Tensor) -> Tensor:
        """Scaled maps [B, c, h, w] to images, not clamped."""
        return self.vae.decoder(self.vae.post_quant_conv(maps / self.config.scaling)).float()

    def unpack(self, tokens: Tensor) -> Tensor:
        """[B, L, C] -> [B, c, h, w]."""
        side = math.isqrt(tokens.shape[1])
        return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (side, side)), self.config.patch)

    def pack(self, maps: Tensor) -> Tensor:
        """[B, c, h, w] -> [B, L, C]."""
        return F.pixel_unshuffle(maps, self.config.patch).flatten(2).transpose(1, 2)
