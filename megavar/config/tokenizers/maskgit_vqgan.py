"""MaskGIT's tokenizer, which RAR, reAR and TiTok build on."""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field, PositiveInt

from megavar.config.token_space import TokenSpace
from megavar.config.tokenizers.convolutional import ConvolutionalVQConfig


class MaskGITVQGANConfig(ConvolutionalVQConfig):
    """MaskGIT's VQGAN (Chang et al. 2022, arXiv:2202.04200): one square map of tokens, no attention.

    The defaults are the published ``maskgit-vqgan-imagenet-f16-256.bin``: an encoder of 23,775,104 and a decoder of
    30,478,339 parameters. Its training was never published; one of the same layout is trained by the recipe
    ``tokenizer``.
    """

    implementation: ClassVar[str] = "megavar.tokenizers.maskgit_vqgan:MaskGITVQGAN"
    weight_layouts: ClassVar[Mapping[str, str]] = {
        "maskgit_vqgan": "megavar.tokenizers.maskgit_vqgan.published:MaskGITVQGANLayout"
    }

    name: Literal["maskgit_vqgan"] = "maskgit_vqgan"
    side: PositiveInt = 16
    """Side of the token map; images have ``2 ** (len(channel_multipliers) - 1)`` times as many pixels."""
    vocabulary_size: Annotated[int, Field(ge=2)] = 1024
    """Number of code vectors."""
    code_dimension: PositiveInt = 256
    """Channels of a code vector and of the feature map that is quantized."""
    codebook_weight: Annotated[float, Field(ge=0)] = 0.25
    """Weight of the codebook term of the quantizer's loss; the commitment term has weight 1. The public port
    (open-muse) multiplies its ``commitment_cost`` to this term, not to the other one."""

    @property
    def space(self) -> TokenSpace:
        """One map, row by row."""
        length, image_side = self.side**2, self.side * self.downsample
        return TokenSpace(
            "grid", (self.side,), length, self.vocabulary_size, self.code_dimension, image_side, self.image_channels
        )
