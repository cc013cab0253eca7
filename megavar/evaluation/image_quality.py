"""Per-image similarity of pairs of images: PSNR, SSIM, and LPIPS on AlexNet."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from megavar.errors import CheckpointError
from megavar.weight_file import differences, read_state_dict

SSIM_WINDOW = 7
_ALEXNET = ((64, 11, 4, 2), (192, 5, 1, 2), (384, 3, 1, 1), (256, 3, 1, 1), (256, 3, 1, 1))
"""Channels, kernel, stride, padding of AlexNet's convolutions (torchvision's variant)."""
_ALEXNET_POSITIONS = (0, 3, 6, 8, 10)  # inside torchvision's `features`, which names the keys
_POOL_BEFORE = (1, 2)  # stages that begin with a max pool


def psnr(first: Tensor, second: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each pair of float images [B, 3, H, W] in [0, 1]: float64 [B].

    ``10 log10(1 / MSE)`` with the error averaged over all 3HW values; infinite for identical images.
    """
    error = (first.double() - second.double()).square().mean(dim=(1, 2, 3))
    return -10 * error.log10()


def ssim(first: Tensor, second: Tensor, *, data_range: float = 1.0) -> Tensor:
    """Structural similarity of each pair of float images [B, 3, H, W] in [0, 1]: float64 [B].

    scikit-image's definition and defaults: uniform 7x7 window, sample covariance, borders left out, mean over channels.
    ``data_range=2`` is what LlamaGen and VGT pass for images in [0, 1]; it inflates the score (0.47 becomes 0.59).
    """
    x, y = first.double(), second.double()

    def local_mean(values: Tensor) -> Tensor:
        return functional.avg_pool2d(values, SSIM_WINDOW, stride=1)

    sample = SSIM_WINDOW**2 / (SSIM_WINDOW**2 - 1)
    mean_x, mean_y = local_mean(x), local_mean(y)
    variance_x = sample * (local_mean(x * x) - mean_x * mean_x)
    variance_y = sample * (local_mean(y * y) - mean_y * mean_y)
    covariance = sample * (local_mean(x * y) - mean_x * mean_y)
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return (luminance * structure).mean(dim=(1, 2, 3))


class AlexNetDistance(nn.Module):
    """LPIPS on AlexNet (Zhang et al. 2018), the backbone most papers report; VGG is in ``tokenizers.perceptual``.

    ``forward(first, second) -> float32 [B]`` of images [B, 3, H, W] in [-1, 1], sides of at least 63 pixels.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, alexnet_weights: str, lpips_weights: str) -> None:
        """Read torchvision's ``alexnet`` state dict and the LPIPS package's ``v0.1/alex.pth``.

        Raises:
            CheckpointError: a file is missing or holds something else.
        """
        super().__init__()
        self.convolutions = nn.ModuleList()
        channels = 3
        for width, kernel, stride, padding in _ALEXNET:
            self.convolutions.append(nn.Conv2d(channels, width, kernel, stride, padding))
            channels = width
        named = nn.ModuleDict({str(place): conv for place, conv in zip(_ALEXNET_POSITIONS, self.convolutions)})
        given = {
            name.removeprefix("features."): tensor
            for name, tensor in read_state_dict(alexnet_weights, "AlexNet weights").items()
            if name.startswith("features.")
        }
        _check(alexnet_weights, named.state_dict(), given, "torchvision.models.alexnet, ImageNet weights")
        named.load_state_dict(given)
        linear = read_state_dict(lpips_weights, "LPIPS weights")
        names = [f"lin{number}.model.1.weight" for number in range(len(_ALEXNET))]
        expected = {name: torch.empty(1, layer[0], 1, 1) for name, layer in zip(names, _ALEXNET)}
        _check(lpips_weights, expected, linear, "lpips/weights/v0.1/alex.pth of the LPIPS package")
        self.linear = nn.ParameterList(linear[name].float() for name in names)
        self.register_buffer("shift", torch.tensor((-0.030, -0.088, -0.188)).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor((0.458, 0.448, 0.450)).view(1, 3, 1, 1))
        self.eval().requires_grad_(False)

    def features(self, images: Tensor) -> list[Tensor]:
        """Unit-length features of the five stages: [B, C_l, H_l, W_l]."""
        h = (images - self.shift) / self.scale
        found = []
        for number, convolution in enumerate(self.convolutions):
            h = convolution(functional.max_pool2d(h, 3, 2) if number in _POOL_BEFORE else h).relu()
            found.append(functional.normalize(h, dim=1, eps=1e-10))
        return found

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Distance of each pair."""
        distance = torch.zeros(len(first), device=first.device)
        for weight, one, other in zip(self.linear, self.features(first), self.features(second)):
            distance = distance + ((one - other).square() * weight).sum(dim=1).mean(dim=(1, 2))
        return distance


def _check(path: str, expected: dict[str, Tensor], given: dict[str, Tensor], remedy: str) -> None:
    problems = differences(expected, given)
    if problems:
        raise CheckpointError(f"{path} holds other tensors: {'; '.join(problems)}. Give the state dict of {remedy}.")
