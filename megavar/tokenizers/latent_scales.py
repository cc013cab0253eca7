"""The scales of a continuous latent map: what FlowAR predicts at each, and from what (``flowar.py:349-367``).

    map of scale k     = area(latent, s_k)                                   its own side: the latent itself
    input of scale k+1 = area(bicubic(map of scale k, full side), s_{k+1})   always through the full side
                       | encode(bicubic(decode(map of scale k), s_{k+1}))    through images

Tokens are float32 [B, s^2, C] of a :class:`~megavar.tokenizers.base.LatentMap`, sides are in tokens.
"""

import math
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from megavar.tokenizers.base import LatentMap


def reduced(tokenizer: LatentMap, tokens: Tensor, side: int) -> Tensor:
    """Tokens of a coarser scale: means over areas of the map, reduced before it is packed."""
    whole = tokenizer.unpack(tokens)
    pixels = side * whole.shape[-1] // math.isqrt(tokens.shape[1])
    return tokenizer.pack(F.interpolate(whole, (pixels, pixels), mode="area"))


def next_input(
    tokenizer: LatentMap, tokens: Tensor, full: int, side: int, through: Literal["latent", "image"] = "latent"
) -> Tensor:
    """What the next scale, of this side, reads of the tokens of the one before it, float32 [B, side^2, C].

    Args:
        full: side of the last scale.
    """
    if through == "image":
        pixels = side * tokenizer.stride
        images = F.interpolate(tokenizer.decode(tokens), (pixels, pixels), mode="bicubic")
        return tokenizer.tokens(tokenizer.encode(images.clamp(-1, 1)))
    coarse = tokenizer.unpack(tokens)
    pixels = full * coarse.shape[-1] // math.isqrt(tokens.shape[1])
    enlarged = F.interpolate(coarse, (pixels, pixels), mode="bicubic")
    return reduced(tokenizer, tokenizer.pack(enlarged), side)
