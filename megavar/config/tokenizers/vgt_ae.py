"""VGT-AE: the vision encoder of a vision-language model, a projection to few channels, and a pixel decoder."""

import itertools
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from megavar.config.base import Section
from megavar.config.token_space import TokenSpace
from megavar.config.tokenizers.base import TokenizerChoice
from megavar.config.tokenizers.vision import VisionTransformerConfig

MERGE = 2
"""Patches of a side that become one semantic vector, in both encoders."""


class VisionTowerConfig(VisionTransformerConfig):
    """Sizes of a vision encoder."""

    feed_forward: PositiveInt
    """Hidden size of the feed-forward networks."""
    patch: PositiveInt = 14
    """Side of a patch in pixels."""


class InternViTConfig(VisionTowerConfig):
    """InternVL3's encoder (transformers' ``InternVLVisionModel``) with its projector ``mlp1``: InternViT-300M."""

    name: Literal["intern_vit"] = "intern_vit"
    width: PositiveInt = 1024
    """Hidden size."""
    depth: PositiveInt = 24
    """Number of blocks."""
    heads: PositiveInt = 16
    """Attention heads."""
    feed_forward: PositiveInt = 4096
    """Hidden size of the feed-forward networks."""
    qkv_bias: bool = True
    """Whether queries, keys and values have biases."""
    qk_normalization: bool = False
    """Whether queries and keys are normalized (InternViT-6B)."""
    norm: Literal["layer_norm", "rms_norm"] = "layer_norm"
    """Kind of the norms."""
    norm_epsilon: PositiveFloat = 1e-6
    """Epsilon of the norms."""
    activation: str = "gelu"
    """transformers' name of the activation."""


class QwenViTConfig(VisionTowerConfig):
    """Qwen2.5-VL's encoder (transformers' ``Qwen2_5_VisionTransformerPretrainedModel``); defaults: of the 3B model."""

    name: Literal["qwen_vit"] = "qwen_vit"
    width: PositiveInt = 1280
    """Hidden size."""
    depth: PositiveInt = 32
    """Number of blocks."""
    heads: PositiveInt = 16
    """Attention heads."""
    feed_forward: PositiveInt = 3420
    """Hidden size of the feed-forward networks."""
    window: PositiveInt = 112
    """Side in pixels of the windows inside which most blocks attend."""
    full_attention: Annotated[tuple[int, ...], Field(strict=False)] = (7, 15, 23, 31)
    """Numbers of the blocks that attend to the whole image."""
    temporal_patch: PositiveInt = 2
    """Frames of a patch: an image is repeated so often."""


class DCAEDecoderConfig(Section):
    """DC-AE's decoder (diffusers' ``AutoencoderDC``); defaults: ``dc-ae-f32c32-sana-1.1``, 159.2 M parameters."""

    name: Literal["dc_ae"] = "dc_ae"
    channels: Annotated[tuple[PositiveInt, ...], Field(strict=False, min_length=1)] = (128, 256, 512, 512, 1024, 1024)
    """Width of each resolution, the finest first. Every one but the last doubles the resolution."""
    layers: Annotated[tuple[PositiveInt, ...], Field(strict=False)] = (3, 3, 3, 3, 3, 3)
    """Blocks of each resolution."""
    blocks: Annotated[tuple[Literal["ResBlock", "EfficientViTBlock"], ...], Field(strict=False)] = (
        "ResBlock", "ResBlock", "ResBlock", "EfficientViTBlock", "EfficientViTBlock", "EfficientViTBlock",
    )  # fmt: skip
    """Kind of blocks of each resolution: convolutions, or linear attention."""
    attention_kernels: Annotated[
        tuple[Annotated[tuple[PositiveInt, ...], Field(strict=False)], ...], Field(strict=False)
    ] = (
        (), (), (), (5,), (5,), (5,),
    )  # fmt: skip
    """Kernels of the convolutions over queries, keys and values, of each resolution (``qkv_multiscales``)."""
    head_size: PositiveInt = 32
    """Channels of a head of attention."""
    upsampling: Literal["interpolate", "pixel_shuffle"] = "interpolate"
    """How resolutions are doubled."""
    norm: Literal["rms_norm", "batch_norm"] = "rms_norm"
    """Kind of the norms. Batch norm depends on how a batch is split over ranks."""
    activation: str = "silu"
    """diffusers' name of the activation."""

    @model_validator(mode="after")
    def _of_each_resolution(self) -> "DCAEDecoderConfig":
        sizes = {len(self.channels), len(self.layers), len(self.blocks), len(self.attention_kernels)}
        if len(sizes) > 1:
            raise ValueError(
                f"channels has {len(self.channels)} resolutions, layers {len(self.layers)}, blocks {len(self.blocks)}, "
                f"attention_kernels {len(self.attention_kernels)}: give one value of each per resolution"
            )
        for channels, kind in zip(self.channels, self.blocks):
            if kind == "EfficientViTBlock" and channels % self.head_size:
                raise ValueError(f"channels {channels} is not a multiple of head_size {self.head_size}: change one")
        for fine, coarse in itertools.pairwise(self.channels):
            if 4 * fine % coarse:
                raise ValueError(
                    f"channels {coarse} do not divide four times the {fine} of the next resolution, to which DC-AE "
                    f"repeats them: change one"
                )
        return self


class SDVAEDecoderConfig(Section):
    """Stable Diffusion's decoder (diffusers' ``AutoencoderKL``): f8, 49.6 M parameters with 32 channels."""

    name: Literal["sd_vae"] = "sd_vae"
    channels: Annotated[tuple[PositiveInt, ...], Field(strict=False, min_length=1)] = (128, 256, 512, 512)
    """Width of each resolution, the finest first. Every one but the last doubles the resolution."""
    layers: PositiveInt = 2
    """Residual blocks of each resolution of the encoder; the decoder has one more."""
    norm_groups: PositiveInt = 32
    """Groups of every GroupNorm."""

    @model_validator(mode="after")
    def _groups_divide_widths(self) -> "SDVAEDecoderConfig":
        for channels in self.channels:
            if channels % self.norm_groups:
                raise ValueError(f"channels {channels} is not a multiple of norm_groups {self.norm_groups}: change one")
        return self


class ViTDecoderConfig(VisionTransformerConfig):
    """A plain vision transformer, of which the paper says only its size (Table 4: 151 M): 12 blocks of 1024."""

    name: Literal["vit"] = "vit"
    width: PositiveInt = 1024
    """Hidden size."""
    depth: PositiveInt = 12
    """Number of blocks."""
    heads: PositiveInt = 16
    """Attention heads."""


class VGTAEConfig(TokenizerChoice):
    """VGT's autoencoder (section 3.2): semantic vectors of a vision-language model, as few channels, as pixels.

    The defaults are the released ``vgt_ae_internvl3.pth``: InternViT of InternVL3-1B, 448 pixels to 16 x 16 vectors of
    32 channels, DC-AE's decoder (472.6 M parameters). Needs the packages transformers and diffusers.
    """

    implementation: ClassVar[str] = "megavar.tokenizers.vgt_ae:VGTAE"
    weight_layouts: ClassVar[Mapping[str, str]] = {"vgt": "megavar.tokenizers.vgt_ae.published:VGTAELayout"}
    folder_part: ClassVar[str] = "megavar.tokenizers.vgt_ae.pretrained:encoder_of"

    name: Literal["vgt_ae"] = "vgt_ae"
    image_side: PositiveInt = 448
    """Side of the images in pixels."""
    encoder: InternViTConfig | QwenViTConfig = Field(InternViTConfig(), discriminator="name")
    """The vision encoder."""
    decoder: DCAEDecoderConfig | SDVAEDecoderConfig | ViTDecoderConfig = Field(
        DCAEDecoderConfig(), discriminator="name"
    )
    """The pixel decoder. What it makes is resized (bilinear) to the image's side."""
    semantic_width: PositiveInt = 896
    """Channels d of a semantic vector: the hidden size of the language model that the encoder was taken from
    (InternVL3-1B 896, which both sizes of VGT's InternVL3 use; Qwen2.5-VL-3B 2048)."""
    channels: PositiveInt = 32
    """Channels d_z of a latent vector."""
    residual_blocks: int = Field(3, ge=0)
    """Residual blocks of the projection (released: 3)."""
    normalize: bool = True
    """Normalize each vector over its channels, without scale and shift (second stage, Eq. 5). The paper speaks of
    statistics "across the batch", which the released code does not use: it normalizes every position by itself."""
    posterior: bool = False
    """The projection says mean and log variance of a latent (the released code's ``kl``); no published weights do."""
    scale: float = 1.0
    """Multiplies latents before they are normalized, and divides them again before they are decoded."""
    shift: float = 0.0
    """Added after ``scale``."""

    @property
    def stride(self) -> int:
        """Pixels of an image per vector, along a side."""
        return self.encoder.patch * MERGE

    @property
    def space(self) -> TokenSpace:
        """A map of vectors, row by row."""
        side = self.image_side // self.stride
        return TokenSpace("latent", (side,), side * side, None, self.channels, self.image_side)

    @model_validator(mode="after")
    def _consistent(self) -> "VGTAEConfig":
        if self.image_side % self.stride:
            raise ValueError(
                f"image_side {self.image_side} is not a multiple of {self.stride}, the pixels of a vector "
                f"(encoder.patch x {MERGE}): change image_side or encoder.patch"
            )
        decoder = self.decoder
        if isinstance(decoder, DCAEDecoderConfig) and decoder.channels[-1] % self.channels:
            raise ValueError(
                f"decoder.channels ends with {decoder.channels[-1]}, which is no multiple of channels={self.channels}: "
                f"DC-AE repeats latents to that width. Change one of them"
            )
        if self.scale == 0:
            raise ValueError("scale is 0, so that every latent would be the same: give another number")
        return self
