"""The scales of a continuous latent map: what FlowAR predicts at each, and from what (``flowar.py:349-367``).

    map of scale k    = area(latent, s_k)                          its own side: the latent itself
    input of scale k+1 = area(bicubic(map of scale k, full side), s_{k+1})       always through the full side

Maps are float32 [B, c, h, w]; sides are in pixels of the map, that is tokens times the side of a patch.
"""

import torch.nn.functional as F
from torch import Tensor


def shrunk(latent: Tensor, side: int) -> Tensor:
    """Means over areas, [B, c, side, side]."""
    return F.interpolate(latent, (side, side), mode="area")


def next_input(coarse: Tensor, full: int, side: int) -> Tensor:
    """What the scale of this side reads of the one before it, [B, c, side, side].

    Args:
        full: side of the last scale.
    """
    return shrunk(F.interpolate(coarse, (full, full), mode="bicubic"), side)
