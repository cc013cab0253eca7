"""The KL autoencoders of latent diffusion."""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from megavar.config.token_space import TokenSpace
from megavar.config.tokenizers.base import TokenizerChoice


class KLVAEConfig(TokenizerChoice):
    """Latent diffusion's KL-VAE (Rombach et al. 2022), diffusers' ``AutoencoderKL``: vectors instead of codes.

    The defaults are KL-16 as MAR trained it and FlowAR uses it (``kl16.ckpt``, 66,456,019 parameters). SD's f8, and
    EQ-VAE, whose weights have the same layout: ``latent_channels: 4, channel_multipliers: [1, 2, 4, 4], attention:
    none, patch: 2, scaling: 0.18215`` (83,653,863 parameters). Needs the package diffusers.
    """

    implementation: ClassVar[str] = "megavar.tokenizers.kl_vae:KLVAE"
    weight_layouts: ClassVar[Mapping[str, str]] = {
        "diffusers": "megavar.tokenizers.kl_vae.published:DiffusersLayout",
        "ldm": "megavar.tokenizers.kl_vae.published:LDMLayout",
    }

    name: Literal["kl_vae"] = "kl_vae"
    image_side: PositiveInt = 256
    """Side of the images in pixels."""
    image_channels: PositiveInt = 3
    """Channels of the images."""
    latent_channels: PositiveInt = 16
    """Channels of the latent map, c."""
    base_channels: PositiveInt = 128
    """Width of the first convolution; level i has ``base_channels * channel_multipliers[i]`` channels."""
    channel_multipliers: Annotated[tuple[PositiveInt, ...], Field(min_length=1, strict=False)] = (1, 1, 2, 2, 4)
    """Width of each resolution level relative to ``base_channels``. Every level but the first halves the resolution."""
    residual_blocks: PositiveInt = 2
    """Residual blocks per encoder level; the decoder has one more per level."""
    attention: Literal["none", "encoder", "both"] = "encoder"
    """Where residual blocks of the lowest level are followed by attention, beside the one in the middle: MAR's KL-16
    has it in the encoder alone, latent diffusion's f16 in both, SD's f8 nowhere."""
    norm_groups: PositiveInt = 32
    """Groups of every GroupNorm; it has to divide the width of every level."""
    patch: PositiveInt = 1
    """Side p of the patches of the map that are one token: C = c p p."""
    scaling: PositiveFloat = 0.2325
    """Multiplies latents to about unit variance: 0.2325 for KL-16 (MAR, FlowAR), 0.18215 for SD and EQ-VAE. It belongs
    to the weights: measure it for others."""

    @property
    def downsample(self) -> int:
        """Image side over side of the latent map."""
        return 2 ** (len(self.channel_multipliers) - 1)

    @property
    def space(self) -> TokenSpace:
        """A map of vectors, row by row."""
        side = self.image_side // self.downsample // self.patch
        channels = self.latent_channels * self.patch**2
        return TokenSpace("latent", (side,), side * side, None, channels, self.image_side, self.image_channels)

    @model_validator(mode="after")
    def _consistent(self) -> "KLVAEConfig":
        stride = self.downsample * self.patch
        if self.image_side % stride:
            raise ValueError(
                f"image_side {self.image_side} is not a multiple of {stride}, the pixels of a token "
                f"(2^(levels - 1) x patch): change image_side, patch or channel_multipliers"
            )
        for multiplier in self.channel_multipliers:
            if self.base_channels * multiplier % self.norm_groups:
                raise ValueError(
                    f"base_channels {self.base_channels} times channel multiplier {multiplier} is not a multiple of "
                    f"norm_groups {self.norm_groups}: choose base_channels as a multiple of it, or other norm_groups"
                )
        return self
