"""From float images to bytes: the rules that published evaluations used."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from megavar.data.pixels import to_uint8

Rounding = Literal["round", "truncate", "half_up"]
"""``round``: to the nearest level, ours. ``truncate``: ADM, REPA, RAR, VGT; darkens generated images by half a level
and corrupts 63 of 256 exact levels. ``half_up``: LlamaGen's floor(127.5 x + 128); differs from ``round`` on ties."""


def quantize(images: Tensor, rule: Rounding) -> Tensor:
    """Float images in [-1, 1] (values outside are clamped) to uint8, by ``rule``."""
    if rule == "round":
        return to_uint8(images)
    x = images.to(torch.float32)
    if rule == "truncate":
        return ((x + 1) / 2 * 255).clamp(0, 255).to(torch.uint8)
    return (127.5 * x + 128).clamp(0, 255).to(torch.uint8)
