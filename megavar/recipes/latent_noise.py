"""Noise on latents that a decoder learns to live with (VGT Eq. 5; sigma-VAE, LatentLM; NextStep-1)."""

from typing import Literal

from torch import Tensor


def disturbance(kind: Literal["uniform", "fixed"], strength: float, normal: Tensor, uniform: Tensor) -> Tensor:
    """What is added to latents, of the shape of ``normal``.

    Args:
        kind: ``fixed``: ``strength`` is the deviation, Eq. 5. ``uniform``: the deviation is uniform in
            [0, ``strength``), drawn for every sample (VGT's code).
        normal: standard normal numbers, [B, ...].
        uniform: in [0, 1), [B].
    """
    if kind == "fixed":
        return strength * normal
    return strength * uniform.to(normal).view(-1, *[1] * (normal.ndim - 1)) * normal
