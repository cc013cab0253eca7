"""Pixel decoders: maps of latents [B, c, h, w] to images [B, 3, H, W] of any size, on diffusers' own modules.

DC-AE makes 32 pixels of each vector, Stable Diffusion's decoder 8. The package is imported when a decoder is built.
"""

from typing import Any

import torch
from torch import Tensor, nn

from megavar.config.tokenizers.vgt_ae import DCAEDecoderConfig, SDVAEDecoderConfig, VGTAEConfig, ViTDecoderConfig
from megavar.errors import missing_package
from megavar.tokenizers.vision import blocks, pixels


class ViTDecoder(nn.Module):
    """Vectors to a wider layer with positions, blocks, norm, and the pixels of each vector.

    The paper's Table 4 says only how large it is. The grid of positions is that of the configured image.
    """

    def __init__(self, config: VGTAEConfig, sizes: ViTDecoderConfig) -> None:
        super().__init__()
        self.stride = config.stride
        self.embed = nn.Linear(config.channels, sizes.width)
        self.position_embedding = nn.Parameter(torch.zeros(config.space.length, sizes.width))
        self.blocks = blocks(sizes)
        self.norm = nn.LayerNorm(sizes.width)
        self.head = nn.Linear(sizes.width, 3 * self.stride**2)

    def forward(self, maps: Tensor) -> Tensor:
        """[B, c, h, w] -> [B, 3, h stride, w stride]."""
        x = self.embed(maps.flatten(2).mT) + self.position_embedding
        for block in self.blocks:
            x = block(x)
        return pixels(self.head(self.norm(x)).mT.unflatten(2, maps.shape[2:]), self.stride)


def build_decoder(config: VGTAEConfig) -> Any:
    """The configured decoder.

    Raises:
        ConfigError: the package diffusers is not installed.
    """
    sizes = config.decoder
    if isinstance(sizes, ViTDecoderConfig):
        return ViTDecoder(config, sizes)
    try:
        from diffusers.models.autoencoders import autoencoder_dc, vae
    except ImportError as error:
        raise missing_package("diffusers", f"tokenizer.decoder.name={sizes.name}") from error
    if isinstance(sizes, SDVAEDecoderConfig):
        return vae.Decoder(
            in_channels=config.channels,
            out_channels=3,
            up_block_types=("UpDecoderBlock2D",) * len(sizes.channels),
            block_out_channels=sizes.channels,
            layers_per_block=sizes.layers,
            norm_num_groups=sizes.norm_groups,
        )
    assert isinstance(sizes, DCAEDecoderConfig)
    return autoencoder_dc.Decoder(
        in_channels=3,
        latent_channels=config.channels,
        attention_head_dim=sizes.head_size,
        block_type=sizes.blocks,  # type: ignore[arg-type]  # annotated as a tuple of one
        block_out_channels=sizes.channels,
        layers_per_block=sizes.layers,
        qkv_multiscales=sizes.attention_kernels,
        norm_type=sizes.norm,
        act_fn=sizes.activation,
        upsample_block_type=sizes.upsampling,
    )
