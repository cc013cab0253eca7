"""VAR's multi-scale VQ autoencoder: image <-> token maps.

Images are float32 [B, 3, H, W] in [-1, 1]; tokens are int64 [B, L], the row-major maps one after the other.
Sources: VAR (arXiv:2404.02905) section 3.2; FoundationVision/VAR models/vqvae.py and models/basic_vae.py.
Attribute names are the published checkpoints' key names.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from megavar.config.token_space import TokenSpace
from megavar.config.tokenizers.multiscale_vq import MultiScaleVQConfig
from megavar.tokenizers.convolution import (
    AttentionBlock,
    Downsample,
    ResidualBlock,
    Upsample,
    activated,
    channels_last,
    initialize_layers,
)
from megavar.tokenizers.dropout import name_dropouts, sample_keys
from megavar.tokenizers.multiscale_vq.quantizer import MultiScaleQuantizer, Scale, height_width
from megavar.tokenizers.trainable import Reconstruction


class Level(nn.Module):
    """One resolution of encoder or decoder: residual blocks, each optionally followed by attention, then a resize."""

    def __init__(
        self,
        config: MultiScaleVQConfig,
        widths: list[int],
        *,
        attention: bool,
        resize: str,
        resampler: nn.Module | None,
    ) -> None:
        super().__init__()
        self.block = nn.ModuleList([residual_block(config, a, b) for a, b in pairwise(widths)])
        self.attn = nn.ModuleList([attention_block(config, b) for b in widths[1:]] if attention else [])
        self.resize = resize
        if resampler is not None:
            self.add_module(resize, resampler)

    def forward(self, h: Tensor) -> Tensor:
        """[B, C_in, H, W] -> [B, C_out, H', W']."""
        for index, block in enumerate(self.block):
            h = block(h)
            if len(self.attn):
                h = self.attn[index](h)
        resampler = getattr(self, self.resize, None)
        return h if resampler is None else resampler(h)


class Middle(nn.Module):
    """The bottleneck: residual block, attention, residual block, all at one width."""

    def __init__(self, config: MultiScaleVQConfig, channels: int) -> None:
        super().__init__()
        self.block_1 = residual_block(config, channels, channels)
        self.attn_1 = attention_block(config, channels) if config.middle_attention else nn.Identity()
        self.block_2 = residual_block(config, channels, channels)

    def forward(self, h: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        return self.block_2(self.attn_1(self.block_1(h)))


class Encoder(nn.Module):
    """Images [B, 3, H, W] -> features [B, code_dimension, H / downsample, W / downsample]."""

    def __init__(self, config: MultiScaleVQConfig) -> None:
        super().__init__()
        widths = level_widths(config)
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(config.image_channels, config.base_channels, 3, padding=1)
        self.down = nn.ModuleList()
        for index, width in enumerate(widths):
            before = widths[index - 1] if index else config.base_channels
            self.down.append(
                Level(
                    config,
                    [before] + [width] * config.residual_blocks,
                    resize="downsample",
                    attention=index == last and config.lowest_level_attention,
                    resampler=None if index == last else Downsample(width),
                )
            )
        self.mid = Middle(config, widths[-1])
        self.norm_out = nn.GroupNorm(config.norm_groups, widths[-1], eps=config.norm_epsilon)
        self.conv_out = nn.Conv2d(widths[-1], config.code_dimension, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        """Encode."""
        h = self.conv_in(channels_last(images))
        for level in self.down:
            h = level(h)
        return self.conv_out(activated(self.norm_out(self.mid(h)))).contiguous()


class Decoder(nn.Module):
    """Features [B, code_dimension, h, w] -> images [B, 3, h * downsample, w * downsample], not clamped."""

    def __init__(self, config: MultiScaleVQConfig) -> None:
        super().__init__()
        widths = level_widths(config)
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(config.code_dimension, widths[-1], 3, padding=1)
        self.mid = Middle(config, widths[-1])
        self.up = nn.ModuleList()  # index 0 is the full resolution and runs last
        for index, width in enumerate(widths):
            before = widths[min(index + 1, last)]
            self.up.append(
                Level(
                    config,
                    [before] + [width] * (config.residual_blocks + 1),
                    resize="upsample",
                    attention=index == last and config.lowest_level_attention,
                    resampler=None if index == 0 else Upsample(width),
                )
            )
        self.norm_out = nn.GroupNorm(config.norm_groups, widths[0], eps=config.norm_epsilon)
        self.conv_out = nn.Conv2d(widths[0], config.image_channels, 3, padding=1)

    def last_features(self, features: Tensor) -> Tensor:
        """Everything before the last convolution: [B, code_dimension, h, w] -> [B, C, H, W]."""
        h = self.mid(self.conv_in(channels_last(features)))
        for level in reversed(self.up):
            h = level(h)
        return activated(self.norm_out(h))

    def forward(self, features: Tensor) -> Tensor:
        """Decode."""
        return self.conv_out(self.last_features(features)).contiguous()


class MultiScaleVQ(nn.Module):
    """VAR's tokenizer. Calling it runs the training forward pass."""

    def __init__(self, config: MultiScaleVQConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = MultiScaleQuantizer(config)
        padding = config.latent_kernel // 2
        self.quant_conv = nn.Conv2d(config.code_dimension, config.code_dimension, config.latent_kernel, padding=padding)
        self.post_quant_conv = nn.Conv2d(
            config.code_dimension, config.code_dimension, config.latent_kernel, padding=padding
        )
        name_dropouts(self)
        self.initialize()

    @property
    def quantizer(self) -> MultiScaleQuantizer:
        """The multi-scale residual quantizer."""
        return self.quantize

    @property
    def space(self) -> TokenSpace:
        """Its tokens, as all others see them."""
        return self.config.space

    @property
    def scales(self) -> tuple[int, ...]:
        """Side lengths of the token maps, coarse to fine."""
        return self.config.scales

    @property
    def code_dimension(self) -> int:
        """Channels of a code."""
        return self.config.code_dimension

    ends_in_convolution = True
    decoding = ("decoder.", "post_quant_conv.")

    @property
    def separate_scales(self) -> tuple[int, ...]:
        """None: a scale is what the coarser ones left over."""
        return ()

    @property
    def dtype(self) -> torch.dtype:
        """The type of the parameters, and of all computation outside the quantizer, which is float32."""
        return self.quant_conv.weight.dtype

    @torch.no_grad()
    def initialize(self, generator: torch.Generator | None = None) -> None:
        """Draw fresh parameters.

        Convolutions: weights and biases uniform in +-1/sqrt(fan in), what VQGAN and VAR use (torch's own default at
        the time, made explicit); norms: one and zero; codes: normal with ``code_initial_std``.
        """
        initialize_layers(self, generator)
        self.quantize.embedding.weight.normal_(std=self.config.code_initial_std, generator=generator)
        self.quantize.ema_vocab_hit_SV.zero_()

    def forward(self, images: Tensor, keys: Tensor | None = None, side: int | None = None) -> Reconstruction:
        """Training forward pass: float [B, 3, H, W] in [-1, 1] -> reconstruction and the quantizer's losses.

        ``keys``, int64 [B], decide what dropout drops (needed with ``dropout`` above 0 in training mode only).
        """
        assert side is None, "scales are residuals of each other"
        with sample_keys(self, keys):
            quantized = self.quantize(self.quant_conv(self.encoder(images.to(self.dtype))))
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
    def tokens(self, latents: Tensor, sides: Sequence[Scale] | None = None) -> Tensor:
        """Tokens of features [B, code_dimension, h, w]: int64 [B, L].

        ``sides`` replaces the configured scales for images of another size; the last one is the feature map's size.
        """
        return torch.cat(self.quantize.quantize(latents, sides), dim=1)

    def embed(self, ids: Tensor) -> Tensor:
        """Code vectors: int64 [...] -> float32 [..., code_dimension]."""
        return self.quantize.embed(ids)

    @torch.no_grad()
    def at(self, latents: Tensor, sides: Sequence[Scale] | None = None) -> tuple[Tensor, Tensor]:
        """Tokens and the inputs of a generator that predicts them; see :class:`megavar.tokenizers.base.Pyramid`."""
        ids = self.tokens(latents, sides)
        return ids, self.inputs(ids, sides)

    @torch.no_grad()
    def inputs(self, ids: Tensor, sides: Sequence[Scale] | None = None) -> Tensor:
        """For every scale but the first the map accumulated so far, resized to it: float32 [B, L - L_0, C]."""
        return self.quantize.teacher_forcing_input(self.quantize.split(ids, sides), sides)

    @torch.no_grad()
    def grow(
        self, state: Tensor | None, ids: Tensor, k: int, sides: Sequence[Scale] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Add the tokens of scale k to the accumulated map [B, C, h, w]; also the inputs of the next scale."""
        scales = sides or self.scales
        shapes = [height_width(scale) for scale in scales]
        codes = self.embed(ids).transpose(1, 2).unflatten(-1, shapes[k])
        if state is None:
            state = codes.new_zeros(len(ids), self.code_dimension, *shapes[-1])
        state, following = self.quantize.next_input(k, state, codes, scales)
        return state, None if k + 1 == len(shapes) else following.flatten(2).transpose(1, 2)

    def decode_features(self, f_hat: Tensor) -> Tensor:
        """Images of an accumulated map: [B, C, h, w] -> float32 [B, 3, H, W] clamped to [-1, 1]."""
        return self.decoder(self.post_quant_conv(f_hat.to(self.dtype))).float().clamp(-1, 1)

    @torch.no_grad()
    def decode(self, tokens: Tensor, sides: Sequence[Scale] | None = None) -> Tensor:
        """Images of tokens: int64 [B, L] -> float32 [B, 3, H, W] clamped to [-1, 1].

        The tokens of the first few scales alone give what these scales alone reconstruct.
        """
        return self.decode_features(self.quantize.accumulate(self.quantize.split(tokens, sides), sides)[-1])


def level_widths(config: MultiScaleVQConfig) -> list[int]:
    """Channels of every resolution level, full resolution first."""
    return [config.base_channels * multiplier for multiplier in config.channel_multipliers]


def residual_block(config: MultiScaleVQConfig, channels_in: int, channels_out: int) -> ResidualBlock:
    """A residual block with the config's norm and dropout."""
    return ResidualBlock(
        channels_in,
        channels_out,
        norm_groups=config.norm_groups,
        norm_epsilon=config.norm_epsilon,
        dropout=config.dropout,
    )


def attention_block(config: MultiScaleVQConfig, channels: int) -> AttentionBlock:
    """An attention block with the config's norm."""
    return AttentionBlock(channels, norm_groups=config.norm_groups, norm_epsilon=config.norm_epsilon)
