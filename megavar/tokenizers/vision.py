"""Vision transformer blocks of tokenizers, as CLIP's: TiTok's and its relatives'. Sequences are [B, L, C].

Attribute names are those of published files. Source: bytedance/1d-tokenizer ``modeling/modules/blocks.py``.
"""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megavar.config.tokenizers.vision import VisionTransformerConfig


class Attention(nn.Module):
    """Self-attention of all heads at once; the softmax scale is 1 / sqrt(C / heads)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, causal: bool = False) -> Tensor:
        """[B, L, C] -> [B, L, C]."""
        query, key, value = self.in_proj(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=causal)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """``x + attention(ln_1(x))``, then ``x + mlp(ln_2(x))`` with exact GELU; norms have epsilon 1e-5."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        layers = [("c_fc", nn.Linear(width, 4 * width)), ("gelu", nn.GELU()), ("c_proj", nn.Linear(4 * width, width))]
        self.mlp = nn.Sequential(OrderedDict[str, nn.Module](layers))

    def forward(self, x: Tensor, causal: bool = False) -> Tensor:
        """[B, L, C] -> [B, L, C]."""
        x = x + self.attn(self.ln_1(x), causal)
        return x + self.mlp(self.ln_2(x))


def blocks(sizes: VisionTransformerConfig) -> nn.ModuleList:
    """``sizes.depth`` blocks."""
    return nn.ModuleList([Block(sizes.width, sizes.heads) for _ in range(sizes.depth)])


def pixels(patches: Tensor, side: int) -> Tensor:
    """[B, side * side * C, h, w] -> [B, C, h * side, w * side]; channels are (row, column, colour)."""
    batch, channels, height, width = patches.shape
    parts = patches.view(batch, side, side, channels // side**2, height, width)
    return parts.permute(0, 3, 4, 1, 5, 2).reshape(batch, -1, height * side, width * side)


@torch.no_grad()
def initialize_layers(model: nn.Module, generator: torch.Generator | None, std: float) -> None:
    """Draw fresh layers as TiTok does: linear layers and convolutions normal with deviation ``std``, cut at twice of
    it, and zero biases; norms one and zero."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std, generator=generator)
            if module.bias is not None:
                module.bias.zero_()
        elif isinstance(module, nn.LayerNorm):
            module.weight.fill_(1.0)
            module.bias.zero_()
