"""Vision transformers: DINOv2, DINOv3, MoCo v3, and those that we distil ourselves.

One pre-norm transformer covers them (Dosovitskiy et al. 2021, arXiv:2010.11929)::

    tokens = [class, registers, patches]                     positions learned (added) or rotary (patches only)
    tokens = tokens + scale_1 * attention(norm(tokens))      in every block; scales learned, or absent
    tokens = tokens + scale_2 * mlp(norm(tokens))            GELU, or SwiGLU
    features = norm(tokens)[patches]

It has no dropout and draws nothing. ``published.py`` knows the names in the authors' files.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megavar.config.teachers.vit import ViTShape, ViTTeacherChoice

ROTARY_BASE = 100.0
"""DINOv3's."""


class Attention(nn.Module):
    """Self-attention of all tokens."""

    def __init__(self, shape: ViTShape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.qkv = nn.Linear(shape.width, 3 * shape.width)
        self.projection = nn.Linear(shape.width, shape.width)

    def forward(self, tokens: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
        """[B, T, C]; rotary: cosines and sines [N, C / heads] of the last N tokens."""
        query, key, value = self.qkv(tokens).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if rotary is not None:
            query, key = turn(query, *rotary), turn(key, *rotary)
        return self.projection(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """GELU network, or SwiGLU."""

    def __init__(self, shape: ViTShape) -> None:
        super().__init__()
        self.gated = shape.gated
        self.rise = nn.Linear(shape.width, (2 if shape.gated else 1) * shape.feed_forward)
        self.fall = nn.Linear(shape.feed_forward, shape.width)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, T, C]."""
        risen = self.rise(tokens)
        if not self.gated:
            return self.fall(F.gelu(risen))
        gate, value = risen.chunk(2, -1)
        return self.fall(F.silu(gate) * value)


class Block(nn.Module):
    """Attention and feed-forward network, each normalized before and scaled after."""

    def __init__(self, shape: ViTShape) -> None:
        super().__init__()
        self.norm_1 = nn.LayerNorm(shape.width, shape.epsilon)
        self.attention = Attention(shape)
        self.norm_2 = nn.LayerNorm(shape.width, shape.epsilon)
        self.feed_forward = FeedForward(shape)
        if shape.layer_scale:
            self.scale_1 = nn.Parameter(torch.ones(shape.width))
            self.scale_2 = nn.Parameter(torch.ones(shape.width))
        self.scaled = shape.layer_scale

    def forward(self, tokens: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
        """[B, T, C]."""
        change = self.attention(self.norm_1(tokens), rotary)
        tokens = tokens + (self.scale_1 * change if self.scaled else change)
        change = self.feed_forward(self.norm_2(tokens))
        return tokens + (self.scale_2 * change if self.scaled else change)


class VisionTransformer(nn.Module):
    """Normalized images to tokens."""

    def __init__(self, shape: ViTShape) -> None:
        super().__init__()
        self.shape = shape
        self.patches = nn.Conv2d(3, shape.width, shape.patch, shape.patch)
        self.class_token = nn.Parameter(torch.zeros(1, 1, shape.width))
        if shape.registers:
            self.registers = nn.Parameter(torch.zeros(1, shape.registers, shape.width))
        if shape.stored_grid is not None:
            self.position = nn.Parameter(torch.zeros(1, 1 + shape.stored_grid**2, shape.width))
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.depth))
        self.norm = nn.LayerNorm(shape.width, shape.epsilon)

    @property
    def prefix(self) -> int:
        """Tokens before the patches."""
        return 1 + self.shape.registers

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W], multiples of the patch, to [B, prefix + N, C], normalized by the last norm."""
        patches = self.patches(images)
        grid = patches.shape[-2:]
        patches = patches.flatten(2).transpose(1, 2)
        start: Tensor = self.class_token
        rotary = None
        if self.shape.stored_grid is None:
            rotary = rotary_table(grid, self.shape.width // self.shape.heads, patches.device)
        else:
            start = start + self.position[:, :1]
            patches = patches + self._positions(grid)
        if self.shape.registers:  # they have no position
            start = torch.cat([start, self.registers], 1)
        tokens = torch.cat([start.to(patches.dtype).expand(len(patches), -1, -1), patches], 1)
        for block in self.blocks:
            tokens = block(tokens, rotary)
        return self.norm(tokens)

    def _positions(self, grid: torch.Size) -> Tensor:
        """[1, N, C] for the grid of these images."""
        stored = self.shape.stored_grid
        assert stored is not None
        if tuple(grid) == (stored, stored):
            return self.position[:, 1:]
        table = self.position[:, 1:].float().transpose(1, 2).unflatten(2, (stored, stored))
        resized = F.interpolate(table, tuple(grid), mode="bicubic", antialias=self.shape.antialias)
        return resized.flatten(2).transpose(1, 2)


class ViTTeacher(VisionTransformer):
    """A :class:`~megavar.teachers.base.Teacher`: prepares images as the network was trained with, keeps the patches."""

    def __init__(self, choice: ViTTeacherChoice) -> None:
        super().__init__(choice.shape)
        self.side, self.precision = choice.image_side, choice.precision

    def features(self, images: Tensor) -> Tensor:
        """See :meth:`megavar.teachers.base.Teacher.features`; resized bicubically where the side is another (REPA)."""
        images = images.float()
        if images.shape[-1] != self.side:
            images = F.interpolate(images, (self.side, self.side), mode="bicubic")
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            return self(normalized(images, self.shape))[:, self.prefix :].float()


def normalized(images: Tensor, shape: ViTShape) -> Tensor:
    """Images in [-1, 1] as a network of ``shape`` wants them."""
    mean, std = (images.new_tensor(values)[:, None, None] for values in (shape.mean, shape.std))
    return ((images + 1) / 2 - mean) / std


def rotary_table(grid: torch.Size, head_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines, float32 [N, head size], of the centres of patches in [-1, 1] (DINOv3 section 3.2)."""
    periods = ROTARY_BASE ** torch.arange(0, 1, 4 / head_size, device=device)
    centres = [(torch.arange(side, device=device) + 0.5) / side * 2 - 1 for side in grid]
    places = torch.stack(torch.meshgrid(*centres, indexing="ij"), -1).flatten(0, 1)
    angles = (2 * math.pi * places[:, :, None] / periods).flatten(1).repeat(1, 2)
    return angles.cos(), angles.sin()


def turn(values: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the last tokens of [B, heads, T, head size] by their angles."""
    before, turned = values.split([values.shape[2] - len(cos), len(cos)], 2)
    first, second = turned.chunk(2, -1)
    turned = turned * cos + torch.cat([-second, first], -1) * sin
    return torch.cat([before, turned.to(before.dtype)], 2)
