"""TiTok's perceptual distance: how far apart a classifier's logits of two images are.

    d(x, y) = mean over classes (f(x) - f(y))^2        f: ConvNeXt-S on images of 224 pixels

Source: bytedance/1d-tokenizer ``modeling/modules/perceptual_loss.py`` (``convnext_s``). The weights are torchvision's.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megavar.errors import CheckpointError
from megavar.weight_file import differences, read_state_dict

_SIDE = 224
_MEAN = (0.485, 0.456, 0.406)
_DEVIATION = (0.229, 0.224, 0.225)


class LogitDistance(nn.Module):
    """ConvNeXt-S with frozen weights."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, weights: str, *, key: str) -> None:
        """Read the weights.

        Args:
            weights: torchvision's state dict of ``convnext_small``.
            key: of the configuration that names the file, for errors.

        Raises:
            CheckpointError: the file is missing or holds something else.
        """
        super().__init__()
        from torchvision.models import convnext_small

        self.network = convnext_small()
        tensors = read_state_dict(weights, f"ConvNeXt-S weights ({key})")
        problems = differences(self.network.state_dict(), tensors)
        if problems:
            raise CheckpointError(
                f"{weights} does not hold ConvNeXt-S weights: {'; '.join(problems)}. Give the state dict of "
                f"torchvision.models.convnext_small, ImageNet weights."
            )
        self.network.load_state_dict(tensors)
        self.register_buffer("mean", torch.tensor(_MEAN).view(1, 3, 1, 1))
        self.register_buffer("deviation", torch.tensor(_DEVIATION).view(1, 3, 1, 1))
        self.eval().requires_grad_(False)

    def logits(self, images: Tensor) -> Tensor:
        """Of images [B, 1 or 3, H, W] in [-1, 1]: [B, 1000]."""
        images = F.interpolate(images.expand(-1, 3, -1, -1), size=(_SIDE, _SIDE), mode="bilinear", antialias=True)
        logits: Tensor = self.network(((images + 1) / 2 - self.mean) / self.deviation)
        return logits

    def forward(self, reconstruction: Tensor, images: Tensor) -> Tensor:
        """Distance of each pair: float [B, 3, H, W] in [-1, 1] twice -> float32 [B].

        The gradient reaches ``reconstruction`` only.
        """
        with torch.no_grad():
            target = self.logits(images)
        return (self.logits(reconstruction) - target).square().mean(1).float()
