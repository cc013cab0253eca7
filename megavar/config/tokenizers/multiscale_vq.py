"""VAR's tokenizer."""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from megavar.config.token_space import TokenSpace
from megavar.config.tokenizers.base import TokenizerChoice


class MultiScaleVQConfig(TokenizerChoice):
    """VAR's multi-scale residual vector-quantized autoencoder (Tian et al. 2024, arXiv:2404.02905, section 3.2).

    The defaults are the published 256-pixel model ``vae_ch160v4096z32.pth``: 108,948,355 parameters.
    """

    implementation: ClassVar[str] = "megavar.tokenizers.multiscale_vq:MultiScaleVQ"
    weight_layouts: ClassVar[Mapping[str, str]] = {
        "var": "megavar.tokenizers.multiscale_vq.published:MultiScaleVQLayout"
    }

    name: Literal["multiscale_vq"] = "multiscale_vq"
    scales: Annotated[tuple[PositiveInt, ...], Field(min_length=1, strict=False)] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    """Side lengths of the token maps, coarse to fine. The last one is the side of the encoder's feature map, that is
    the image side divided by ``2 ** (len(channel_multipliers) - 1)``. VAR: this list at 256 pixels,
    1 2 3 4 6 9 13 18 24 32 at 512, 1 2 3 4 5 7 9 12 16 21 27 36 48 64 at 1024."""
    vocabulary_size: Annotated[int, Field(ge=2)] = 4096
    """Number of code vectors, shared by all scales."""
    code_dimension: PositiveInt = 32
    """Channels of a code vector and of the quantized feature map."""
    image_channels: PositiveInt = 3
    """Channels of the images."""
    base_channels: PositiveInt = 160
    """Width of the first convolution; level i has ``base_channels * channel_multipliers[i]`` channels."""
    channel_multipliers: Annotated[tuple[PositiveInt, ...], Field(min_length=1, strict=False)] = (1, 1, 2, 2, 4)
    """Width of each resolution level relative to ``base_channels``. Every level but the first halves the resolution."""
    residual_blocks: PositiveInt = 2
    """Residual blocks per encoder level; the decoder has one more per level."""
    lowest_level_attention: bool = True
    """Self-attention after every residual block of the lowest-resolution level."""
    middle_attention: bool = True
    """Self-attention between the two residual blocks at the bottleneck."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout inside residual blocks. The published model uses none."""
    norm_groups: PositiveInt = 32
    """Groups of every GroupNorm; it has to divide the width of every level."""
    norm_epsilon: PositiveFloat = 1e-6
    """Epsilon of every GroupNorm."""
    latent_kernel: Annotated[int, Field(ge=1)] = 3
    """Kernel side of the convolutions before and after the quantizer (odd)."""
    refinement: Literal["partially_shared", "shared", "per_scale"] = "partially_shared"
    """How the refinement convolutions phi (VAR, algorithms 1 and 2) are shared between scales: ``partially_shared`` has
    ``refinement_count`` of them and each scale uses the one nearest to its relative depth, ``shared`` has one,
    ``per_scale`` has one per scale. It decides the checkpoint's key layout."""
    refinement_count: PositiveInt | None = None
    """Number of refinement convolutions. Default: 4 if partially shared (published), 1 if shared, the number of scales
    if per scale."""
    refinement_ratio: Annotated[float, Field(ge=-1, le=1)] = 0.5
    """Refinement is ``(1 - r) x + r conv(x)`` with r the magnitude of this number; 0 removes the convolutions."""
    normalized_search: bool = False
    """Search the nearest code by cosine instead of Euclidean distance. The code that is added is never normalized."""
    commitment_weight: Annotated[float, Field(ge=0)] = 0.25
    """Weight beta of the commitment term of the quantizer's loss (van den Oord et al. 2017; published value)."""
    code_initial_std: PositiveFloat = 0.02
    """Standard deviation of fresh code vectors. Small, so that before the codebook is drawn from data (see the training
    recipe) all of a feature map is left for every scale to quantize; the authors published no value."""

    @property
    def downsample(self) -> int:
        """Image side over feature map side."""
        return 2 ** (len(self.channel_multipliers) - 1)

    @property
    def image_side(self) -> int:
        """Side in pixels of the images whose feature map is as large as the last scale."""
        return self.scales[-1] * self.downsample

    @property
    def refinement_convolutions(self) -> int:
        """The number of refinement convolutions after defaults."""
        default = {"partially_shared": 4, "shared": 1, "per_scale": len(self.scales)}[self.refinement]
        return self.refinement_count or default

    @property
    def space(self) -> TokenSpace:
        """Maps of growing side length."""
        return TokenSpace.of_scales(
            self.scales, self.vocabulary_size, self.code_dimension, self.image_side, self.image_channels
        )

    @model_validator(mode="after")
    def _consistent(self) -> "MultiScaleVQConfig":
        if any(b < a for a, b in zip(self.scales, self.scales[1:])):
            raise ValueError(f"scales {list(self.scales)} decrease somewhere: list side lengths from coarse to fine")
        if self.latent_kernel % 2 == 0:
            raise ValueError(f"latent_kernel {self.latent_kernel} is even: use an odd one, which keeps the map's size")
        for multiplier in self.channel_multipliers:
            if self.base_channels * multiplier % self.norm_groups:
                raise ValueError(
                    f"base_channels {self.base_channels} times channel multiplier {multiplier} is not a multiple of "
                    f"norm_groups {self.norm_groups}: choose base_channels as a multiple of it, or other norm_groups"
                )
        if self.refinement == "shared" and self.refinement_convolutions != 1:
            raise ValueError(
                f"refinement_count {self.refinement_count} needs refinement partially_shared or "
                "per_scale: shared means one convolution"
            )
        if self.refinement == "partially_shared" and self.refinement_convolutions < 2:
            raise ValueError(
                "refinement partially_shared with refinement_count 1 is refinement shared: write that, "
                "the checkpoint's key layout depends on it"
            )
        return self
