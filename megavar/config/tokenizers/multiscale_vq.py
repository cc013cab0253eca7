"""VAR's tokenizer."""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from megavar.config.tokenizers.convolutional import MultiScaleConfig


class MultiScaleVQConfig(MultiScaleConfig):
    """VAR's multi-scale residual vector-quantized autoencoder (Tian et al. 2024, arXiv:2404.02905, section 3.2).

    The defaults are the published 256-pixel model ``vae_ch160v4096z32.pth``: 108,948,355 parameters.
    """

    implementation: ClassVar[str] = "megavar.tokenizers.multiscale_vq:MultiScaleVQ"
    weight_layouts: ClassVar[Mapping[str, str]] = {
        "var": "megavar.tokenizers.multiscale_vq.published:MultiScaleVQLayout"
    }

    name: Literal["multiscale_vq"] = "multiscale_vq"
    vocabulary_size: Annotated[int, Field(ge=2)] = 4096
    """Number of code vectors, shared by all scales."""
    code_dimension: PositiveInt = 32
    """Channels of a code vector and of the quantized feature map."""
    base_channels: PositiveInt = 160
    """Width of the first convolution; level i has ``base_channels * channel_multipliers[i]`` channels."""
    lowest_level_attention: bool = True
    """Self-attention after every residual block of the lowest-resolution level."""
    middle_attention: bool = True
    """Self-attention between the two residual blocks at the bottleneck."""
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
    code_initial_std: PositiveFloat = 0.02
    """Standard deviation of fresh code vectors. Small, so that before the codebook is drawn from data (see the training
    recipe) all of a feature map is left for every scale to quantize; the authors published no value."""

    @property
    def refinement_convolutions(self) -> int:
        """The number of refinement convolutions after defaults."""
        default = {"partially_shared": 4, "shared": 1, "per_scale": len(self.scales)}[self.refinement]
        return self.refinement_count or default

    @model_validator(mode="after")
    def _consistent(self) -> "MultiScaleVQConfig":
        if any(b < a for a, b in zip(self.scales, self.scales[1:])):
            raise ValueError(f"scales {list(self.scales)} decrease somewhere: list side lengths from coarse to fine")
        if self.latent_kernel % 2 == 0:
            raise ValueError(f"latent_kernel {self.latent_kernel} is even: use an odd one, which keeps the map's size")
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
