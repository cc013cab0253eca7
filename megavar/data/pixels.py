"""The two ways an image is represented, and the conversions between them."""

from typing import Literal

import torch
from torch import Tensor

Rounding = Literal["round", "truncate", "half_up"]
"""From floats to bytes, as published evaluations do it. ``round``: to the nearest level, ours. ``truncate``: ADM, REPA,
RAR, VGT; darkens generated images by half a level and corrupts 63 of 256 exact levels. ``half_up``: LlamaGen's
floor(127.5 x + 128); differs from ``round`` on ties."""


def to_float(images: Tensor) -> Tensor:
    """Convert stored images to model inputs.

    Args:
        images: uint8, any shape, 0..255.

    Returns:
        float32 of the same shape and device in [-1, 1]: ``x / 127.5 - 1``.
    """
    return images.to(torch.float32).div_(127.5).sub_(1.0)


def to_uint8(images: Tensor) -> Tensor:
    """Convert model outputs to stored images, the inverse of :func:`to_float`.

    Args:
        images: floating point, any shape; values outside [-1, 1] are clamped.

    Returns:
        uint8 of the same shape and device, rounded to the nearest level (truncation would darken every image).
    """
    return images.to(torch.float32).mul(127.5).add_(127.5).round_().clamp_(0, 255).to(torch.uint8)


def quantize(images: Tensor, rule: Rounding) -> Tensor:
    """Float images in [-1, 1] (values outside are clamped) to uint8, by ``rule``."""
    if rule == "round":
        return to_uint8(images)
    x = images.to(torch.float32)
    if rule == "truncate":
        return ((x + 1) / 2 * 255).clamp(0, 255).to(torch.uint8)
    return (127.5 * x + 128).clamp(0, 255).to(torch.uint8)
