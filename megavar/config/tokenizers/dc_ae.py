"""The deep-compression autoencoder, a pixel-level one beside VGT's."""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from megavar.config.token_space import TokenSpace
from megavar.config.tokenizers.base import TokenizerChoice
from megavar.config.tokenizers.vgt_ae import DCAEDecoderConfig


class DCAEConfig(TokenizerChoice):
    """DC-AE (Chen et al. 2025), diffusers' ``AutoencoderDC``: the baseline of VGT's Table 7 and Figure 1.

    The defaults are ``dc-ae-f32c32-sana-1.1`` at 512 pixels: 16 x 16 vectors of 32 channels. There is no recipe that
    trains it. Needs the package diffusers.
    """

    implementation: ClassVar[str] = "megavar.tokenizers.dc_ae:DCAE"
    weight_layouts: ClassVar[Mapping[str, str]] = {"diffusers": "megavar.tokenizers.dc_ae.published:DiffusersLayout"}

    name: Literal["dc_ae"] = "dc_ae"
    image_side: PositiveInt = 512
    """Side of the images in pixels."""
    channels: PositiveInt = 32
    """Channels of a latent vector."""
    decoder: DCAEDecoderConfig = DCAEDecoderConfig()
    """The decoder; the encoder has its widths, kinds of blocks and head size."""
    encoder_layers: Annotated[tuple[PositiveInt, ...], Field(strict=False)] = (2, 2, 2, 3, 3, 3)
    """Blocks of each resolution of the encoder, the finest first."""
    downsampling: Literal["conv", "pixel_unshuffle"] = "conv"
    """How the encoder halves resolutions."""
    scaling: PositiveFloat = 0.41407
    """Multiplies latents to about unit variance; it belongs to the weights."""

    @property
    def stride(self) -> int:
        """Pixels of an image per vector, along a side."""
        return int(2 ** (len(self.decoder.channels) - 1))

    @property
    def space(self) -> TokenSpace:
        """A map of vectors, row by row."""
        side = self.image_side // self.stride
        return TokenSpace("latent", (side,), side * side, None, self.channels, self.image_side)

    @model_validator(mode="after")
    def _consistent(self) -> "DCAEConfig":
        if self.image_side % self.stride:
            raise ValueError(
                f"image_side {self.image_side} is not a multiple of {self.stride}, the pixels of a vector: change it"
            )
        if len(self.encoder_layers) != len(self.decoder.channels):
            raise ValueError(
                f"encoder_layers has {len(self.encoder_layers)} resolutions, decoder.channels "
                f"{len(self.decoder.channels)}: give one number of each"
            )
        if self.decoder.channels[-1] % self.channels:
            raise ValueError(
                f"decoder.channels ends with {self.decoder.channels[-1]}, which is no multiple of "
                f"channels={self.channels}: DC-AE repeats latents to that width. Change one of them"
            )
        return self
