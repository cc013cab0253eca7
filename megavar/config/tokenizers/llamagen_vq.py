"""FlexVAR's tokenizer."""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from megavar.config.token_space import TokenSpace
from megavar.config.tokenizers.base import TokenizerChoice


class LlamaGenVQConfig(TokenizerChoice):
    """LlamaGen's VQ autoencoder, whose feature map FlexVAR quantizes at every scale by itself (arXiv:2502.20313).

    The defaults are the published 256-pixel model ``FlexVAE.pth``: LlamaGen's ``VQ-16`` with codes of 32 channels.
    """

    implementation: ClassVar[str] = "megavar.tokenizers.llamagen_vq:LlamaGenVQ"
    weight_layouts: ClassVar[Mapping[str, str]] = {
        "flexvar": "megavar.tokenizers.llamagen_vq.published:LlamaGenVQLayout"
    }

    name: Literal["llamagen_vq"] = "llamagen_vq"
    scales: Annotated[tuple[PositiveInt, ...], Field(min_length=1, strict=False)] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    """Side lengths of the token maps, coarse to fine. The last one is the side of the encoder's feature map, that is
    the image side divided by ``2 ** (len(channel_multipliers) - 1)``."""
    vocabulary_size: Annotated[int, Field(ge=2)] = 8912
    """Number of code vectors, shared by all scales. The published file has 8912 (not 8192) rows."""
    code_dimension: PositiveInt = 32
    """Channels of a code vector."""
    latent_channels: PositiveInt = 256
    """Channels between the autoencoder and the 1x1 convolutions around the quantizer."""
    image_channels: PositiveInt = 3
    """Channels of the images."""
    base_channels: PositiveInt = 128
    """Width of the first convolution; level i has ``base_channels * channel_multipliers[i]`` channels."""
    channel_multipliers: Annotated[tuple[PositiveInt, ...], Field(min_length=1, strict=False)] = (1, 1, 2, 2, 4)
    """Width of each resolution level relative to ``base_channels``. Every level but the first halves the resolution."""
    residual_blocks: PositiveInt = 2
    """Residual blocks per encoder level; the decoder has one more per level."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout inside residual blocks. The published model uses none."""
    norm_groups: PositiveInt = 32
    """Groups of every GroupNorm; it has to divide the width of every level."""
    norm_epsilon: PositiveFloat = 1e-6
    """Epsilon of every GroupNorm."""
    commitment_weight: Annotated[float, Field(ge=0)] = 0.25
    """Weight beta of the commitment term of the quantizer's loss (LlamaGen)."""
    usage_window: PositiveInt = 65536
    """Entries of the published buffer ``codebook_used``, which only the authors' training reads."""

    @property
    def downsample(self) -> int:
        """Image side over feature map side."""
        return 2 ** (len(self.channel_multipliers) - 1)

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

    @model_validator(mode="after")
    def _consistent(self) -> "LlamaGenVQConfig":
        if any(b <= a for a, b in zip(self.scales, self.scales[1:])):
            raise ValueError(f"scales {list(self.scales)} do not all grow: list side lengths from coarse to fine")
        for multiplier in self.channel_multipliers:
            if self.base_channels * multiplier % self.norm_groups:
                raise ValueError(
                    f"base_channels {self.base_channels} times channel multiplier {multiplier} is not a multiple of "
                    f"norm_groups {self.norm_groups}: choose base_channels as a multiple of it, or other norm_groups"
                )
        return self
