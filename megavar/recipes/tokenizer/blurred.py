"""The discriminator of TiTok, AliTok and VGT-AE: convolutions whose maps are blurred before they are halved.

Source: bytedance/1d-tokenizer ``modeling/modules/discriminator.py``; blurring: Zhang 2019 (arXiv:1904.11486).
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megavar.config.recipes.tokenizer import AdversarialConfig
from megavar.tokenizers.convolution import initialize_layers

_LOGITS = 16
_SLOPE = 0.1


class Blur(nn.Module):
    """[B, C, H, W] -> [B, C, H/2, W/2]: the binomial filter 1 3 3 1 along both sides, every second place."""

    kernel: Tensor

    def __init__(self) -> None:
        super().__init__()
        line = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
        self.register_buffer("kernel", line[:, None] * line, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Blur and halve."""
        kernel = self.kernel.to(x.dtype).expand(x.shape[1], 1, 4, 4)
        return F.conv2d(F.pad(x, (1, 1, 1, 1)), kernel, stride=2, groups=x.shape[1])


class BlurredDiscriminator(nn.Module):
    """Judges patches: float [B, C, H, W] in [-1, 1] -> logits [B, 1, 16, 16], positive for real.

    ``layers`` halvings; a logit is computed of the largest values near it. Holds LeCam's running means of the logits of
    real and reconstructed images.
    """

    mean_logits: Tensor

    def __init__(self, config: AdversarialConfig, image_channels: int) -> None:
        super().__init__()
        widths = [config.base_channels, *(config.base_channels * min(2**index, 8) for index in range(config.layers))]
        layers: list[nn.Module] = [nn.Conv2d(image_channels, widths[0], 5, padding=2), nn.LeakyReLU(_SLOPE)]
        for channels_in, channels in pairwise(widths):
            layers += [
                nn.Conv2d(channels_in, channels, 3, padding=1),
                Blur(),
                nn.GroupNorm(config.norm_groups, channels),
                nn.LeakyReLU(_SLOPE),
            ]
        layers += [
            nn.AdaptiveMaxPool2d((_LOGITS, _LOGITS)),
            nn.Conv2d(widths[-1], widths[-1], 1),
            nn.LeakyReLU(_SLOPE),
            nn.Conv2d(widths[-1], 1, 5, padding=2),
        ]
        self.layers = nn.Sequential(*layers)
        self.register_buffer("mean_logits", torch.zeros(2))
        self.initialize()

    @torch.no_grad()
    def initialize(self, generator: torch.Generator | None = None) -> None:
        """Fresh parameters, torch's default for convolutions."""
        initialize_layers(self, generator)
        self.mean_logits.zero_()

    def forward(self, images: Tensor) -> Tensor:
        """Judge. Computes in the type of the parameters, on images in [0, 1]."""
        return self.layers((images.to(next(self.parameters()).dtype) + 1) / 2)
