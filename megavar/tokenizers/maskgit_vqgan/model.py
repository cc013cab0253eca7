"""MaskGIT's VQGAN: image <-> one square map of tokens, by convolutions alone.

Images are float32 [B, 3, H, W] in [-1, 1] as everywhere; inside they are in [0, 1], as the public weights want them.
Differences from VQGAN: average pooling, no attention, convolutions of residual blocks without bias, and a shortcut of
another width that is applied to the *branch*.

Sources: MaskGIT (arXiv:2202.04200); bytedance/1d-tokenizer ``modeling/modules/maskgit_vqgan.py``, a copy of open-muse.
Attribute names are the published checkpoint's key names.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megavar.config.token_space import TokenSpace
from megavar.config.tokenizers.maskgit_vqgan import MaskGITVQGANConfig
from megavar.tokenizers.convolution import activated, channels_last, initialize_layers
from megavar.tokenizers.dropout import SampleDropout, name_dropouts, sample_keys
from megavar.tokenizers.maskgit_vqgan.quantizer import NearestCode
from megavar.tokenizers.trainable import Reconstruction


class ResidualBlock(nn.Module):
    """``h + x`` with h = conv2(silu(norm2(conv1(silu(norm1(x)))))); ``h + nin_shortcut(h)`` where the width changes.

    That the shortcut reads h and not x is a slip of the public code, and part of its weights.
    """

    def __init__(self, config: MaskGITVQGANConfig, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.norm1 = _norm(config, channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False)
        self.norm2 = _norm(config, channels_out)
        self.dropout = SampleDropout(config.dropout)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        if channels_in != channels_out:
            self.nin_shortcut = nn.Conv2d(channels_out, channels_out, 1, bias=False)
        self.widens = channels_in != channels_out

    def forward(self, x: Tensor) -> Tensor:
        """[B, C_in, H, W] -> [B, C_out, H, W]."""
        h = self.conv1(activated(self.norm1(x)))
        h = self.conv2(self.dropout(activated(self.norm2(h))))
        return h + (self.nin_shortcut(h) if self.widens else x)


def _norm(config: MaskGITVQGANConfig, channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(config.norm_groups, channels, eps=config.norm_epsilon)


class Level(nn.Module):
    """The residual blocks of one resolution; in the decoder followed by a convolution of the doubled map."""

    def __init__(self, config: MaskGITVQGANConfig, channels_in: int, channels: int, *, upsample: bool = False) -> None:
        super().__init__()
        widths = [channels_in] + [channels] * config.residual_blocks
        self.block = nn.ModuleList([ResidualBlock(config, a, b) for a, b in pairwise(widths)])
        self.upsample_conv = nn.Conv2d(channels, channels, 3, padding=1) if upsample else None

    def forward(self, h: Tensor) -> Tensor:
        """[B, C_in, H, W] -> [B, C, H, W], or twice as large."""
        for block in self.block:
            h = block(h)
        return h if self.upsample_conv is None else self.upsample_conv(F.interpolate(h, scale_factor=2.0))


def _middle(config: MaskGITVQGANConfig, channels: int) -> nn.ModuleList:
    return nn.ModuleList([ResidualBlock(config, channels, channels) for _ in range(config.residual_blocks)])


class Encoder(nn.Module):
    """Images [B, 3, H, W] in [0, 1] -> [B, C, h, w]."""

    def __init__(self, config: MaskGITVQGANConfig) -> None:
        super().__init__()
        widths = [config.base_channels, *(config.base_channels * m for m in config.channel_multipliers)]
        self.conv_in = nn.Conv2d(config.image_channels, widths[0], 3, padding=1, bias=False)
        self.down = nn.ModuleList([Level(config, a, b) for a, b in pairwise(widths)])
        self.mid = _middle(config, widths[-1])
        self.norm_out = _norm(config, widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.code_dimension, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Encode."""
        h = self.conv_in(channels_last(images))
        for number, level in enumerate(self.down):
            h = level(h if number == 0 else F.avg_pool2d(h, 2))
        for block in self.mid:
            h = block(h)
        return self.conv_out(activated(self.norm_out(h))).contiguous()


class Decoder(nn.Module):
    """[B, C, h, w] -> images [B, 3, H, W] in [0, 1], not clamped."""

    def __init__(self, config: MaskGITVQGANConfig) -> None:
        super().__init__()
        widths = [config.base_channels * multiplier for multiplier in config.channel_multipliers]
        above = [*widths[1:], widths[-1]]  # width of the level below in resolution, which is decoded before
        self.conv_in = nn.Conv2d(config.code_dimension, widths[-1], 3, padding=1)
        self.mid = _middle(config, widths[-1])
        levels = enumerate(zip(above, widths))
        self.up = nn.ModuleList([Level(config, a, b, upsample=number > 0) for number, (a, b) in levels])
        self.norm_out = _norm(config, widths[0])
        self.conv_out = nn.Conv2d(widths[0], config.image_channels, 3, padding=1)

    def last_features(self, latents: Tensor) -> Tensor:
        """Everything before the last convolution: [B, C, h, w] -> [B, C', H, W]."""
        h = self.conv_in(channels_last(latents))
        for block in [*self.mid, *reversed(self.up)]:
            h = block(h)
        return activated(self.norm_out(h))

    def forward(self, latents: Tensor) -> Tensor:
        """Decode."""
        return self.conv_out(self.last_features(latents)).contiguous()


class MaskGITVQGAN(nn.Module):
    """A :class:`megavar.tokenizers.base.Codebook` of one map, and trainable by reconstruction."""

    ends_in_convolution = True
    decoding = ("decoder.",)
    separate_scales: tuple[int, ...] = ()

    def __init__(self, config: MaskGITVQGANConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = NearestCode(config)
        name_dropouts(self)
        self.initialize()

    @property
    def space(self) -> TokenSpace:
        """Its tokens, as all others see them."""
        return self.config.space

    @property
    def quantizer(self) -> NearestCode:
        """The quantizer."""
        return self.quantize

    @property
    def dtype(self) -> torch.dtype:
        """The type of the parameters, and of all computation outside the quantizer, which is float32."""
        return self.encoder.conv_in.weight.dtype

    @torch.no_grad()
    def initialize(self, generator: torch.Generator | None = None) -> None:
        """Draw fresh parameters: convolutions by torch's default, codes uniform in +-1/V (VQ-VAE's and open-muse's)."""
        initialize_layers(self, generator)
        bound = 1 / self.config.vocabulary_size
        self.quantize.embedding.weight.uniform_(-bound, bound, generator=generator)
        self.quantize.usage_average.zero_()

    def forward(self, images: Tensor, keys: Tensor | None = None, side: int | None = None) -> Reconstruction:
        """Training forward pass: float [B, 3, H, W] in [-1, 1] -> reconstruction and the quantizer's losses."""
        assert side is None, "one map has no smaller images"
        with sample_keys(self, keys):
            quantized = self.quantize(self.encoder((images.to(self.dtype) + 1) / 2))
            last_features = self.decoder.last_features(quantized.features.to(self.dtype))
        return Reconstruction(2 * self.decoder.conv_out(last_features) - 1, quantized, last_features.detach())

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Features before quantization: float [B, 3, H, W] in [-1, 1] -> float32 [B, C, h, w].

        Not under autocast, whatever the caller does: a rounded feature picks another token.
        """
        with torch.autocast(images.device.type, enabled=False):
            return self.encoder((images.to(self.dtype) + 1) / 2).float()

    @torch.no_grad()
    def tokens(self, latents: Tensor) -> Tensor:
        """Tokens of features [B, C, h, w]: int64 [B, h * w]."""
        return self.quantize.search(latents)

    def embed(self, ids: Tensor) -> Tensor:
        """Code vectors: int64 [...] -> float32 [..., C]."""
        return self.quantize.embedding(ids)

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """int64 [B, L] -> float32 [B, 3, H, W] clamped to [-1, 1]."""
        codes = self.embed(tokens).mT.unflatten(-1, (self.config.side, self.config.side))
        return (2 * self.decoder(codes.to(self.dtype)).float() - 1).clamp(-1, 1)
