"""LlamaGen's VQ autoencoder as FlexVAR uses it: image <-> token maps that do not depend on each other.

Images are float32 [B, 3, H, W] in [-1, 1]; tokens are int64 [B, L], the row-major maps one after the other. The last
map alone is decoded; coarser ones are images of their own, of lower resolution.

Sources: FlexVAR (arXiv:2502.20313) section 3; jiaosiyu1999/FlexVAR ``models/vq_llama.py``, a copy of LlamaGen's
``tokenizer_image/vq_model.py``. Attribute names are the published checkpoints' key names.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megavar.config.token_space import TokenSpace
from megavar.config.tokenizers.llamagen_vq import LlamaGenVQConfig
from megavar.tokenizers.convolution import (
    Downsample,
    ResidualBlock,
    SplitAttentionBlock,
    Upsample,
    activated,
    channels_last,
    initialize_layers,
)
from megavar.tokenizers.dropout import name_dropouts, sample_keys
from megavar.tokenizers.llamagen_vq.quantizer import UnitQuantizer
from megavar.tokenizers.trainable import Reconstruction


class Level(nn.Module):
    """One resolution: residual blocks, at the lowest one each followed by attention, then a resize."""

    def __init__(self, config: LlamaGenVQConfig, widths: list[int], *, attention: bool, **resampler: nn.Module) -> None:
        super().__init__()
        self.res = nn.ModuleList([residual_block(config, a, b) for a, b in pairwise(widths)])
        self.attn = nn.ModuleList([attention_block(config, b) for b in widths[1:]] if attention else [])
        self.resampler = next(iter(resampler), None)
        for name, module in resampler.items():
            self.add_module(name, module)

    def forward(self, h: Tensor) -> Tensor:
        """[B, C_in, H, W] -> [B, C_out, H', W']."""
        for index, block in enumerate(self.res):
            h = block(h)
            if len(self.attn):
                h = self.attn[index](h)
        return h if self.resampler is None else getattr(self, self.resampler)(h)


def residual_block(config: LlamaGenVQConfig, channels_in: int, channels_out: int) -> ResidualBlock:
    """A residual block with the config's norm and dropout."""
    groups, epsilon = config.norm_groups, config.norm_epsilon
    return ResidualBlock(channels_in, channels_out, norm_groups=groups, norm_epsilon=epsilon, dropout=config.dropout)


def attention_block(config: LlamaGenVQConfig, channels: int) -> SplitAttentionBlock:
    """An attention block with the config's norm."""
    return SplitAttentionBlock(channels, norm_groups=config.norm_groups, norm_epsilon=config.norm_epsilon)


def middle(config: LlamaGenVQConfig, channels: int) -> nn.ModuleList:
    """The bottleneck: residual block, attention, residual block."""
    block = residual_block(config, channels, channels)
    return nn.ModuleList([block, attention_block(config, channels), residual_block(config, channels, channels)])


class Encoder(nn.Module):
    """Images [B, 3, H, W] -> [B, latent_channels, H / downsample, W / downsample]."""

    def __init__(self, config: LlamaGenVQConfig) -> None:
        super().__init__()
        widths = [config.base_channels * multiplier for multiplier in config.channel_multipliers]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(config.image_channels, config.base_channels, 3, padding=1)
        self.conv_blocks = nn.ModuleList()
        for index, width in enumerate(widths):
            run = [widths[index - 1] if index else config.base_channels] + [width] * config.residual_blocks
            resampler = {} if index == last else {"downsample": Downsample(width)}
            self.conv_blocks.append(Level(config, run, attention=index == last, **resampler))
        self.mid = middle(config, widths[-1])
        self.norm_out = nn.GroupNorm(config.norm_groups, widths[-1], eps=config.norm_epsilon)
        self.conv_out = nn.Conv2d(widths[-1], config.latent_channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        """Encode."""
        h = self.conv_in(channels_last(images))
        for block in [*self.conv_blocks, *self.mid]:
            h = block(h)
        return self.conv_out(activated(self.norm_out(h))).contiguous()


class Decoder(nn.Module):
    """[B, latent_channels, h, w] -> images [B, 3, h * downsample, w * downsample], not clamped."""

    def __init__(self, config: LlamaGenVQConfig) -> None:
        super().__init__()
        widths = [config.base_channels * multiplier for multiplier in reversed(config.channel_multipliers)]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid = middle(config, widths[0])
        self.conv_blocks = nn.ModuleList()  # lowest resolution first
        for index, width in enumerate(widths):
            run = [widths[max(index - 1, 0)]] + [width] * (config.residual_blocks + 1)
            resampler = {} if index == last else {"upsample": Upsample(width)}
            self.conv_blocks.append(Level(config, run, attention=index == 0, **resampler))
        self.norm_out = nn.GroupNorm(config.norm_groups, widths[-1], eps=config.norm_epsilon)
        self.conv_out = nn.Conv2d(widths[-1], config.image_channels, 3, padding=1)

    def last_features(self, latents: Tensor) -> Tensor:
        """Everything before the last convolution: [B, latent_channels, h, w] -> [B, C, H, W]."""
        h = self.conv_in(channels_last(latents))
        for block in [*self.mid, *self.conv_blocks]:
            h = block(h)
        return activated(self.norm_out(h))

    def forward(self, latents: Tensor) -> Tensor:
        """Decode."""
        return self.conv_out(self.last_features(latents)).contiguous()


class LlamaGenVQ(nn.Module):
    """FlexVAR's tokenizer, a :class:`megavar.tokenizers.base.Pyramid` of independent scales."""

    def __init__(self, config: LlamaGenVQConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = UnitQuantizer(config)
        self.quant_conv = nn.Conv2d(config.latent_channels, config.code_dimension, 1)
        self.post_quant_conv = nn.Conv2d(config.code_dimension, config.latent_channels, 1)
        name_dropouts(self)
        self.initialize()

    @property
    def space(self) -> TokenSpace:
        """Its tokens, as all others see them."""
        return self.config.space

    @property
    def quantizer(self) -> UnitQuantizer:
        """The quantizer, the same at all scales."""
        return self.quantize

    ends_in_convolution = True
    decoding = ("decoder.", "post_quant_conv.")

    @property
    def separate_scales(self) -> tuple[int, ...]:
        """All but the last one; a map of a single position is no image that a normalized decoder could make."""
        return tuple(side for side in self.config.scales[:-1] if side > 1)

    @property
    def dtype(self) -> torch.dtype:
        """The type of the parameters, and of all computation outside the quantizer, which is float32."""
        return self.quant_conv.weight.dtype

    @torch.no_grad()
    def initialize(self, generator: torch.Generator | None = None) -> None:
        """Draw fresh parameters, as LlamaGen does.

        Convolutions: uniform in +-1/sqrt(fan in) (torch's default); norms: one and zero; codes: unit vectors whose
        coordinates were uniform.
        """
        initialize_layers(self, generator)
        codes = self.quantize.embedding.weight
        codes.uniform_(-1, 1, generator=generator)
        codes.copy_(F.normalize(codes, dim=-1))
        self.quantize.codebook_used.zero_()
        self.quantize.usage_average.zero_()

    def forward(self, images: Tensor, keys: Tensor | None = None, side: int | None = None) -> Reconstruction:
        """Training forward pass: float [B, 3, H, W] in [-1, 1] -> reconstruction and the quantizer's losses.

        ``side`` reconstructs the smaller image [B, 3, side * downsample, ...] that the map of this side stands for.
        """
        with sample_keys(self, keys):
            features = self.quant_conv(self.encoder(images.to(self.dtype)))
            if side is not None:
                features = F.interpolate(features.float(), size=(side, side), mode="area")
            quantized = self.quantize(features)
            last_features = self.decoder.last_features(self.post_quant_conv(quantized.features.to(self.dtype)))
        return Reconstruction(self.decoder.conv_out(last_features), quantized, last_features.detach())

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Features before quantization: float [B, 3, H, W] in [-1, 1] -> float32 [B, code_dimension, h, w].

        Not under autocast, whatever the caller does: a rounded feature picks another token.
        """
        with torch.autocast(images.device.type, enabled=False):
            return self.quant_conv(self.encoder(images.to(self.dtype))).float()

    @torch.no_grad()
    def tokens(self, latents: Tensor, sides: Sequence[int] | None = None) -> Tensor:
        """Tokens of features [B, code_dimension, h, w] at the given (default: configured) scales: int64 [B, L]."""
        return torch.cat(list(self.quantize.maps(latents, sides or self.config.scales)), dim=1)

    def embed(self, ids: Tensor) -> Tensor:
        """Unit code vectors: int64 [...] -> float32 [..., code_dimension]."""
        return self.quantize.embed(ids)

    @torch.no_grad()
    def at(self, latents: Tensor, sides: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """Tokens and the inputs of a generator that predicts them; see :class:`megavar.tokenizers.base.Pyramid`."""
        ids = self.tokens(latents, sides)
        return ids, self.inputs(ids, sides)

    @torch.no_grad()
    def inputs(self, ids: Tensor, sides: Sequence[int] | None = None) -> Tensor:
        """For every scale but the first the codes of the one before it, resized to it: float32 [B, L - L_0, C]."""
        sides = sides or self.config.scales
        maps = ids.split([side * side for side in sides], dim=1)
        known = [self.quantize.following(ids, a, b) for ids, (a, b) in zip(maps, pairwise(sides))]
        return torch.cat(known, dim=1) if known else self.embed(ids[:, :0])

    @torch.no_grad()
    def grow(self, state: Any, ids: Tensor, k: int, sides: Sequence[int] | None = None) -> tuple[Tensor, Tensor | None]:
        """The inputs of the scale after k; the state is the ids themselves, since coarser scales are done with."""
        sides = sides or self.config.scales
        return ids, None if k + 1 == len(sides) else self.quantize.following(ids, sides[k], sides[k + 1])

    @torch.no_grad()
    def decode(self, tokens: Tensor, sides: Sequence[int] | None = None) -> Tensor:
        """Images of the last map: int64 [B, L] -> float32 [B, 3, H, W] clamped to [-1, 1].

        The tokens of the first few scales alone give the smaller image that the last of them stands for.

        Raises:
            ValueError: L is the length of no number of scales.
        """
        length = 0
        for side in sides or self.config.scales:
            length += side * side
            if length == tokens.shape[1]:
                codes = self.embed(tokens[:, -side * side :]).mT.unflatten(-1, (side, side))
                return self.decoder(self.post_quant_conv(codes.to(self.dtype))).float().clamp(-1, 1)
        raise ValueError(f"{tokens.shape[1]} tokens are not those of the first scales {sides or self.config.scales}")
