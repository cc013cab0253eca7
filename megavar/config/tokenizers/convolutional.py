"""What VQGAN-like tokenizers share: a convolutional autoencoder around a codebook."""

from typing import Annotated

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from megavar.config.token_space import TokenSpace
from megavar.config.tokenizers.base import TokenizerChoice


class ConvolutionalVQConfig(TokenizerChoice):
    """Sizes of a convolutional autoencoder with a codebook."""

    vocabulary_size: Annotated[int, Field(ge=2)]
    """Number of code vectors."""
    code_dimension: PositiveInt
    """Channels of a code vector."""
    image_channels: PositiveInt = 3
    """Channels of the images."""
    base_channels: PositiveInt = 128
    """Width of the first convolution; level i has ``base_channels * channel_multipliers[i]`` channels."""
    channel_multipliers: Annotated[tuple[PositiveInt, ...], Field(min_length=1, strict=False)] = (1, 1, 2, 2, 4)
    """Width of each resolution level relative to ``base_channels``. Every level but the first halves the resolution."""
    residual_blocks: PositiveInt = 2
    """Residual blocks per encoder level."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout inside residual blocks. The published models use none."""
    norm_groups: PositiveInt = 32
    """Groups of every GroupNorm; it has to divide the width of every level."""
    norm_epsilon: PositiveFloat = 1e-6
    """Epsilon of every GroupNorm."""

    @property
    def downsample(self) -> int:
        """Image side over feature map side."""
        return 2 ** (len(self.channel_multipliers) - 1)

    @model_validator(mode="after")
    def _groups_divide_widths(self) -> "ConvolutionalVQConfig":
        for multiplier in self.channel_multipliers:
            if self.base_channels * multiplier % self.norm_groups:
                raise ValueError(
                    f"base_channels {self.base_channels} times channel multiplier {multiplier} is not a multiple of "
                    f"norm_groups {self.norm_groups}: choose base_channels as a multiple of it, or other norm_groups"
                )
        return self


class MultiScaleConfig(ConvolutionalVQConfig):
    """One whose feature map is quantized at several scales. The decoder has one residual block more per level."""

    scales: Annotated[tuple[PositiveInt, ...], Field(min_length=1, strict=False)] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    """Side lengths of the token maps, coarse to fine. The last one is the side of the encoder's feature map, that is
    the image side divided by ``2 ** (len(channel_multipliers) - 1)``. VAR: this list at 256 pixels,
    1 2 3 4 6 9 13 18 24 32 at 512, 1 2 3 4 5 7 9 12 16 21 27 36 48 64 at 1024."""
    commitment_weight: Annotated[float, Field(ge=0)] = 0.25
    """Weight beta of the commitment term of the quantizer's loss (van den Oord et al. 2017; published value)."""

    @property
    def image_side(self) -> int:
        """Side in pixels of the images whose feature map is as large as the last scale."""
        return self.scales[-1] * self.downsample

    @property
    def space(self) -> TokenSpace:
        """Maps of growing side length."""
        return TokenSpace.of_scales(
            self.scales, self.vocabulary_size, self.code_dimension, self.image_side, self.image_channels
        )
