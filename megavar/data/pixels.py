"""The two ways an image is represented, and the conversion between them."""

import torch
from torch import Tensor


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
