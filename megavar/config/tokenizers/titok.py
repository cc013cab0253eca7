"""TiTok's tokenizers of 1-D tokens."""

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field, PositiveInt, model_validator

from megavar.config.token_space import TokenSpace
from megavar.config.tokenizers.base import TokenizerChoice
from megavar.config.tokenizers.maskgit_vqgan import MaskGITVQGANConfig
from megavar.config.tokenizers.vision import VisionTransformerConfig


class TiTokConfig(TokenizerChoice):
    """TiTok (Yu et al. 2024, arXiv:2406.07550): an image as an ordered set of few tokens.

    The defaults are the published ``tokenizer_titok_l32_imagenet`` (641.05 M parameters with the pixel decoder). B-64:
    64 tokens, width 768, depth 12, 12 heads (204.81 M). S-128: 128 tokens, width 512, depth 8, 8 heads (83.67 M).
    """

    implementation: ClassVar[str] = "megavar.tokenizers.titok:TiTok"
    weight_layouts: ClassVar[Mapping[str, str]] = {
        "titok": "megavar.tokenizers.titok.published:TiTokLayout",
        "titok_stage1": "megavar.tokenizers.titok.published:TiTokStage1Layout",
    }

    name: Literal["titok"] = "titok"
    tokens: PositiveInt = 32
    """Tokens of an image."""
    quantization: Literal["vq", "vae"] = "vq"
    """``vq``: ids of code vectors; ``vae``: vectors with a Gaussian posterior."""
    vocabulary_size: int = Field(4096, ge=2)
    """Number of code vectors; unused by ``vae``."""
    code_dimension: PositiveInt = 12
    """Channels of a token's vector."""
    normalized_codes: bool = True
    """Compare directions: tokens and codes have unit length."""
    commitment_weight: float = Field(0.25, ge=0)
    """Weight of the commitment term of the quantizer's loss."""
    initial_std: float = Field(0.02, gt=0)
    """Standard deviation of fresh linear layers and convolutions, cut at twice of it (released: 0.02, at widths of 512
    to 1024). What such a layer does to the size of what it reads depends on the width: 0.02 sqrt(1024 / width) does the
    same at others. With less, fresh tokens hardly depend on the image, and every position keeps one code."""
    encoder: VisionTransformerConfig = VisionTransformerConfig(width=1024, depth=24, heads=16)
    """Sizes of the encoder."""
    decoder: VisionTransformerConfig = VisionTransformerConfig(width=1024, depth=24, heads=16)
    """Sizes of the decoder."""
    patch: PositiveInt = 16
    """Side of the encoder's patches in pixels."""
    decoder_patch: PositiveInt = 16
    """Pixels per side of a position of the decoder."""
    image_side: PositiveInt = 256
    """Side of the images."""
    legacy: bool = True
    """The first published models: the decoder predicts codes of ``pixel``, whose decoder makes the image, and the
    encoder's last convolution reads [tokens, width] as if it were [width, tokens]. Otherwise the decoder makes pixels.
    """
    pixel: MaskGITVQGANConfig = MaskGITVQGANConfig()
    """The VQGAN whose codes a legacy model predicts; unused by others."""

    @model_validator(mode="after")
    def _consistent(self) -> "TiTokConfig":
        for key in ("patch", "decoder_patch"):
            if self.image_side % getattr(self, key):
                raise ValueError(f"image_side={self.image_side} is not a multiple of {key}={getattr(self, key)}")
        if self.legacy and self.quantization == "vae":
            raise ValueError("quantization=vae with legacy=true was never published: set legacy to false")
        if self.legacy and (self.image_side // self.decoder_patch, self.image_side) != (
            self.pixel.side, self.pixel.space.image_side
        ):  # fmt: skip
            raise ValueError(
                f"pixel makes {self.pixel.space.image_side} pixels of {self.pixel.side} positions a side, the decoder "
                f"has {self.image_side // self.decoder_patch} for {self.image_side}: set pixel.side and decoder_patch"
            )
        return self

    @property
    def space(self) -> TokenSpace:
        """An ordered set, without places in the image."""
        vocabulary = self.vocabulary_size if self.quantization == "vq" else None
        return TokenSpace("line", (), self.tokens, vocabulary, self.code_dimension, self.image_side)
