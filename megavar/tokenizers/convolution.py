"""Convolutional building blocks of VQGAN's autoencoder (Esser et al. 2021), which VAR's and LlamaGen's share.

Feature maps are [B, C, H, W]. Attribute names are the published checkpoints' key names.
Sources: FoundationVision/VAR models/basic_vae.py; FoundationVision/LlamaGen tokenizer/tokenizer_image/vq_model.py.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megavar.tokenizers.dropout import SampleDropout


def activated(x: Tensor) -> Tensor:
    """silu(x), in the place of ``x`` where no gradient needs it: feature maps may be hundreds of megabytes."""
    return F.silu(x, inplace=not x.requires_grad)


def channels_last(x: Tensor) -> Tensor:
    """``x`` with the channels of a pixel side by side, on a CPU: its convolutions work in that order, and copy every
    feature map that comes in another."""
    return x.contiguous(memory_format=torch.channels_last) if x.device.type == "cpu" else x


class ResidualBlock(nn.Module):
    """``shortcut(x) + conv2(silu(norm2(conv1(silu(norm1(x))))))``: [B, C_in, H, W] -> [B, C_out, H, W].

    The shortcut is a 1x1 convolution if the width changes, else the identity.
    """

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        *,
        norm_groups: int = 32,
        norm_epsilon: float = 1e-6,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(norm_groups, channels_in, eps=norm_epsilon)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(norm_groups, channels_out, eps=norm_epsilon)
        self.dropout = SampleDropout(dropout)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        self.nin_shortcut = nn.Identity() if channels_in == channels_out else nn.Conv2d(channels_in, channels_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block."""
        h = self.conv1(activated(self.norm1(x)))
        h = self.conv2(self.dropout(activated(self.norm2(h))))
        return h + self.nin_shortcut(x) if h.requires_grad else h.add_(self.nin_shortcut(x))


class AttentionBlock(nn.Module):
    """``x + proj_out(attention(qkv(norm(x))))``, one head over all H*W positions: [B, C, H, W] -> [B, C, H, W]."""

    def __init__(self, channels: int, *, norm_groups: int = 32, norm_epsilon: float = 1e-6) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(norm_groups, channels, eps=norm_epsilon)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block; the softmax scale is 1 / sqrt(C)."""
        batch, channels, height, width = x.shape
        qkv = self.qkv(self.norm(x)).view(batch, 3, channels, height * width).transpose(2, 3).contiguous()
        query, key, value = qkv.split(1, dim=1)  # each [B, 1 head, H*W, C]
        mixed = F.scaled_dot_product_attention(query, key, value)
        return x + self.proj_out(mixed.squeeze(1).transpose(1, 2).reshape(x.shape))


class SplitAttentionBlock(nn.Module):
    """:class:`AttentionBlock` with three convolutions instead of a fused one, as VQGAN and LlamaGen store it."""

    def __init__(self, channels: int, *, norm_groups: int = 32, norm_epsilon: float = 1e-6) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(norm_groups, channels, eps=norm_epsilon)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block; the softmax scale is 1 / sqrt(C)."""
        h = self.norm(x)
        query, key, value = (project(h).flatten(2).mT[:, None] for project in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(query, key, value)  # [B, 1 head, H*W, C]
        return x + self.proj_out(mixed[:, 0].mT.reshape(x.shape))


class Downsample(nn.Module):
    """Halve the resolution: zero-pad right and bottom by one, then a 3x3 convolution with stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H/2, W/2]."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double the resolution: nearest neighbour, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, 2H, 2W]."""
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


@torch.no_grad()
def initialize_layers(model: nn.Module, generator: torch.Generator | None = None) -> None:
    """Draw fresh convolutions, weights and biases uniform in +-1/sqrt(fan in); set norms to one and zero."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            bound = 1 / math.sqrt(module.weight[0].numel())
            module.weight.uniform_(-bound, bound, generator=generator)
            if module.bias is not None:
                module.bias.uniform_(-bound, bound, generator=generator)
        elif isinstance(module, nn.GroupNorm):
            module.weight.fill_(1.0)
            module.bias.zero_()
