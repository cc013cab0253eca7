"""Vision encoders of vision-language models: pixels to semantic vectors, on transformers' own modules.

    InternViT: patches and a class token -> blocks -> patches without the class token, no final norm
               -> 2 x 2 of them side by side -> mlp1 = LN, Linear, GELU, Linear
    Qwen-ViT:  patches of an image that is repeated in time, 2 x 2 neighbours together -> blocks, most of them inside
               windows -> merger

Dropout and dropped paths are off, as VGT turns them off. The packages are imported when an encoder is built.
"""

from typing import Any

import torch
from torch import Tensor, nn

from megavar.config.tokenizers.vgt_ae import MERGE, InternViTConfig, QwenViTConfig, VGTAEConfig
from megavar.errors import missing_package


class Encoder(nn.Module):
    """Pixels to semantic vectors."""

    tower: Any
    """transformers' module."""
    mean: tuple[float, float, float]
    """Of the colours in [0, 1], subtracted first."""
    deviation: tuple[float, float, float]
    """Divides afterwards."""

    def semantic(self, images: Tensor) -> Tensor:
        """Images in [-1, 1], [B, 3, H, W], to semantic vectors, float32 [B, H W / stride^2, d], row by row."""
        mean, deviation = (images.new_tensor(value).view(3, 1, 1) for value in (self.mean, self.deviation))
        pixels = ((images + 1) / 2 - mean) / deviation
        return self(pixels.to(self.tower.dtype)).float()


class InternViT(Encoder):
    """InternVL3's."""

    mean = (0.485, 0.456, 0.406)
    deviation = (0.229, 0.224, 0.225)

    def __init__(self, config: VGTAEConfig) -> None:
        super().__init__()
        sizes = config.encoder
        assert isinstance(sizes, InternViTConfig)
        try:
            from transformers import InternVLVisionConfig, InternVLVisionModel
        except ImportError as error:
            raise missing_package("transformers", "tokenizer.encoder.name=intern_vit") from error
        side = config.image_side
        self.tower = InternVLVisionModel(
            InternVLVisionConfig(
                hidden_size=sizes.width,
                num_hidden_layers=sizes.depth,
                num_attention_heads=sizes.heads,
                intermediate_size=sizes.feed_forward,
                patch_size=[sizes.patch, sizes.patch],
                image_size=[side, side],
                attention_bias=sizes.qkv_bias,
                use_qk_norm=sizes.qk_normalization,
                norm_type=sizes.norm,
                layer_norm_eps=sizes.norm_epsilon,
                hidden_act=sizes.activation,
                use_mean_pooling=True,  # no final norm
            )
        )
        merged, width = MERGE**2 * sizes.width, config.semantic_width
        self.projector = nn.Sequential(
            nn.LayerNorm(merged), nn.Linear(merged, width), nn.GELU(), nn.Linear(width, width)
        )
        self.patch = sizes.patch

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalized pixels [B, 3, H, W] to [B, L, d]."""
        patches = self.tower(pixels).last_hidden_state[:, 1:]
        grid = patches.unflatten(1, (pixels.shape[2] // self.patch, pixels.shape[3] // self.patch))
        return self.projector(merge_patches(grid).flatten(1, 2))


class QwenViT(Encoder):
    """Qwen2.5-VL's."""

    mean = (0.48145466, 0.4578275, 0.40821073)
    deviation = (0.26862954, 0.26130258, 0.27577711)

    def __init__(self, config: VGTAEConfig) -> None:
        super().__init__()
        sizes = config.encoder
        assert isinstance(sizes, QwenViTConfig)
        try:
            from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
            from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel
        except ImportError as error:
            raise missing_package("transformers", "tokenizer.encoder.name=qwen_vit") from error
        self.tower = Qwen2_5_VisionTransformerPretrainedModel(
            Qwen2_5_VLVisionConfig(
                depth=sizes.depth,
                hidden_size=sizes.width,
                intermediate_size=sizes.feed_forward,
                num_heads=sizes.heads,
                patch_size=sizes.patch,
                spatial_merge_size=MERGE,
                temporal_patch_size=sizes.temporal_patch,
                window_size=sizes.window,
                fullatt_block_indexes=list(sizes.full_attention),
                out_hidden_size=config.semantic_width,
            )
        )
        self.patch, self.frames = sizes.patch, sizes.temporal_patch

    def patches(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """What the tower reads.

        Args:
            pixels: [B, 3, H, W].

        Returns:
            [B h w, 3 frames p p], 2 x 2 neighbours one after the other; and frames, rows and columns of patches of each
            image, int64 [B, 3].
        """
        batch, colours, height, width = pixels.shape
        rows, columns, p = height // self.patch, width // self.patch, self.patch
        parts = pixels.view(batch, colours, rows // MERGE, MERGE, p, columns // MERGE, MERGE, p)
        parts = parts.permute(0, 2, 5, 3, 6, 1, 4, 7)[..., None, :, :]  # b h w m n colour (frame) p q
        repeated = parts.expand(*parts.shape[:6], self.frames, p, p)
        grid = torch.tensor([[1, rows, columns]], device=pixels.device).expand(batch, -1)
        return repeated.reshape(batch * rows * columns, -1), grid

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalized pixels [B, 3, H, W] to [B, L, d]."""
        patches, grid = self.patches(pixels)
        return self.tower(patches, grid_thw=grid).pooler_output.unflatten(0, (len(pixels), -1))


def merge_patches(grid: Tensor) -> Tensor:
    """InternVL's ``pixel_shuffle(0.5)``: [B, h, w, C] to [B, h/2, w/2, 4 C], channels (row, column, channel)."""
    batch, rows, columns, channels = grid.shape
    parts = grid.reshape(batch, rows // MERGE, MERGE, columns // MERGE, MERGE, channels)
    return parts.transpose(2, 3).flatten(3)


def build_encoder(config: VGTAEConfig) -> Encoder:
    """The configured encoder.

    Raises:
        ConfigError: the package transformers is not installed.
    """
    return InternViT(config) if isinstance(config.encoder, InternViTConfig) else QwenViT(config)
