"""AliTok's tokenizer."""

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field, PositiveInt, model_validator

from megavar.config.token_space import TokenSpace
from megavar.config.tokenizers.base import TokenizerChoice
from megavar.config.tokenizers.vision import VisionTransformerConfig


class AliTokConfig(TokenizerChoice):
    """AliTok (Wu et al. 2025, arXiv:2506.05289): prefix tokens, then a grid of tokens, made for causal generators.

    The defaults are the published ``AliTok.pth``.
    """

    implementation: ClassVar[str] = "megavar.tokenizers.alitok:AliTok"
    weight_layouts: ClassVar[Mapping[str, str]] = {"alitok": "megavar.tokenizers.alitok.published:AliTokLayout"}

    name: Literal["alitok"] = "alitok"
    image_side: PositiveInt = 256
    """Side of the images."""
    patch: PositiveInt = 16
    """Side of a patch in pixels."""
    prefix: PositiveInt = 17
    """Tokens before those of the grid."""
    vocabulary_size: int = Field(4096, ge=2)
    """Number of code vectors."""
    code_dimension: PositiveInt = 32
    """Channels of a code vector."""
    normalized_codes: bool = False
    """Compare directions: tokens and codes have unit length."""
    commitment_weight: float = Field(0.25, ge=0)
    """Weight of the commitment term of the quantizer's loss."""
    initial_std: float = Field(0.02, gt=0)
    """Standard deviation of fresh linear layers and convolutions (released: 0.02); see :class:`TiTokConfig`."""
    encoder: VisionTransformerConfig = VisionTransformerConfig(width=768, depth=12, heads=12)
    """Sizes of the encoder."""
    decoder: VisionTransformerConfig = VisionTransformerConfig(width=1024, depth=24, heads=16)
    """Sizes of the decoder."""
    registers: PositiveInt = 32
    """Learned tokens before the bidirectional decoder's."""
    causal: bool = False
    """The decoder of the first stage: causal, one learned token, and a head that makes a strip of the prefix."""

    @model_validator(mode="after")
    def _patches_fit(self) -> "AliTokConfig":
        if self.image_side % self.patch:
            raise ValueError(f"image_side={self.image_side} is not a multiple of patch={self.patch}: change one")
        return self

    @property
    def side(self) -> int:
        """Side of the grid in tokens."""
        return self.image_side // self.patch

    @property
    def space(self) -> TokenSpace:
        """Prefix and grid in one line."""
        length = self.prefix + self.side**2
        return TokenSpace("line", (), length, self.vocabulary_size, self.code_dimension, self.image_side)
