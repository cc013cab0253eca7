"""DC-AE as a frozen tokenizer of vectors, on diffusers' ``AutoencoderDC``: an image, 32 times smaller a map."""

import math
from typing import Any

from torch import Tensor, nn

from megavar.config.tokenizers.dc_ae import DCAEConfig
from megavar.errors import missing_package


def _build(config: DCAEConfig) -> Any:
    """diffusers' module.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        from diffusers.models.autoencoders.autoencoder_dc import AutoencoderDC
    except ImportError as error:
        raise missing_package("diffusers", "tokenizer.name=dc_ae") from error
    sizes = config.decoder
    both = {
        "block_types": sizes.blocks, "block_out_channels": sizes.channels, "qkv_multiscales": sizes.attention_kernels
    }  # fmt: skip
    return AutoencoderDC(
        in_channels=3,
        latent_channels=config.channels,
        attention_head_dim=sizes.head_size,
        encoder_layers_per_block=config.encoder_layers,
        decoder_layers_per_block=sizes.layers,
        downsample_block_type=config.downsampling,
        upsample_block_type=sizes.upsampling,
        decoder_norm_types=sizes.norm,
        decoder_act_fns=sizes.activation,
        scaling_factor=config.scaling,
        **{f"{part}_{name}": value for part in ("encoder", "decoder") for name, value in both.items()},
    )  # type: ignore[arg-type]


class DCAE(nn.Module):
    """See :class:`megavar.tokenizers.base.LatentMap`. Latents are maps, float32 [B, c, h, w], unscaled."""

    def __init__(self, config: DCAEConfig) -> None:
        super().__init__()
        self.config, self.space, self.stride = config, config.space, config.stride
        self.vae = _build(config)

    def encode(self, images: Tensor) -> Tensor:
        """float [B, 3, H, W] in [-1, 1], of any multiple of the stride, to latents."""
        return self.vae.encoder(images).float()

    def tokens(self, latents: Tensor) -> Tensor:
        """Scaled, float32 [B, L, c]."""
        return self.pack(latents * self.config.scaling)

    def sample(self, latents: Tensor, normal: Tensor) -> Tensor:
        """The same: there is no posterior."""
        return self.tokens(latents)

    def decode(self, tokens: Tensor) -> Tensor:
        """float32 [B, L, c] -> [B, 3, H, W] in [-1, 1]."""
        return self.decode_maps(self.unpack(tokens)).clamp(-1, 1)

    def decode_maps(self, maps: Tensor) -> Tensor:
        """Scaled maps [B, c, h, w] to images, not clamped."""
        return self.vae.decoder(maps / self.config.scaling).float()

    def unpack(self, tokens: Tensor) -> Tensor:
        """[B, L, c] -> [B, c, h, w]."""
        side = math.isqrt(tokens.shape[1])
        return tokens.mT.unflatten(2, (side, side))

    def pack(self, maps: Tensor) -> Tensor:
        """[B, c, h, w] -> [B, L, c]."""
        return maps.flatten(2).mT
