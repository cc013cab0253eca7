"""LPIPS: perceptual distance of images on VGG-16 features (Zhang et al. 2018, arXiv:1801.03924).

    features = VGG-16 activations after the last ReLU of each of the five stages
    d(x, y)  = sum over stages, mean over positions of  w . (x_l / |x_l| - y_l / |y_l|)^2      (channel-wise unit norm)

Both weight files are read from disk: torchvision's ``vgg16`` state dict and the LPIPS package's ``v0.1/vgg.pth``.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megavar.config.recipes.tokenizer import PerceptualConfig
from megavar.errors import CheckpointError
from megavar.weight_file import differences, read_state_dict

_STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
"""Output channels of the convolutions of VGG-16's stages (Simonyan and Zisserman 2015, configuration D)."""
_SHIFT = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)
"""LPIPS' normalization of images in [-1, 1]: ImageNet's mean and deviation in that range."""
_UNIT_EPSILON = 1e-10


class PerceptualDistance(nn.Module):
    """LPIPS with frozen weights."""

    shift: Tensor
    scale: Tensor

    def __init__(self, config: PerceptualConfig) -> None:
        """Read the weights.

        Raises:
            CheckpointError: a file is missing or holds something else.
        """
        super().__init__()
        self.stages = nn.ModuleList(_build_stages(config.vgg16_weights))
        self.linear = nn.ParameterList(_read_linear(config.lpips_weights))
        self.register_buffer("shift", torch.tensor(_SHIFT).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor(_SCALE).view(1, 3, 1, 1))
        self.eval().requires_grad_(False)

    def features(self, images: Tensor) -> list[Tensor]:
        """Unit-length features of images [B, 1 or 3, H, W] in [-1, 1] at the five stages: [B, C_l, H_l, W_l]."""
        h = (images.expand(-1, 3, -1, -1) - self.shift) / self.scale
        result = []
        for stage in self.stages:
            h = stage(h)
            result.append(F.normalize(h, dim=1, eps=_UNIT_EPSILON))
        return result

    def forward(self, reconstruction: Tensor, images: Tensor) -> Tensor:
        """Distance of each pair: float [B, 3, H, W] in [-1, 1] twice, sides of at least 16 pixels -> float32 [B].

        The gradient reaches ``reconstruction`` only.
        """
        with torch.no_grad():
            targets = self.features(images)
        distance = torch.zeros(len(images), device=images.device)
        for weight, ours, target in zip(self.linear, self.features(reconstruction), targets):
            distance = distance + ((ours - target).square() * weight).sum(dim=1).mean(dim=(1, 2)).float()
        return distance


def _build_stages(path: str) -> list[nn.Module]:
    """VGG-16's five convolutional stages with the weights of a torchvision state dict."""
    stages: list[nn.Module] = []
    numbered: dict[str, nn.Module] = {}
    position, channels = 0, 3  # position: index inside torchvision's `features`, which names the keys
    for number, widths in enumerate(_STAGES):
        layers: list[nn.Module] = [nn.MaxPool2d(2)] if number else []
        position += bool(number)
        for width in widths:
            convolution = nn.Conv2d(channels, width, 3, padding=1)
            layers += [convolution, nn.ReLU()]
            numbered[str(position)] = convolution
            position, channels = position + 2, width
        stages.append(nn.Sequential(*layers))
    tensors = read_state_dict(path, "VGG-16 weights (recipe.perceptual.vgg16_weights)")
    network = nn.ModuleDict(numbered)
    features = {
        name.removeprefix("features."): tensor for name, tensor in tensors.items() if name.startswith("features.")
    }
    _check("VGG-16 weights", path, network.state_dict(), features, "torchvision.models.vgg16, ImageNet weights")
    network.load_state_dict(features)
    return stages


def _read_linear(path: str) -> list[nn.Parameter]:
    """LPIPS' weight of every channel of the five stages, [1, C_l, 1, 1]."""
    tensors = read_state_dict(path, "LPIPS weights (recipe.perceptual.lpips_weights)")
    names = [f"lin{number}.model.1.weight" for number in range(len(_STAGES))]
    expected = {name: torch.empty(1, widths[-1], 1, 1) for name, widths in zip(names, _STAGES)}
    _check("LPIPS weights", path, expected, tensors, "lpips/weights/v0.1/vgg.pth of the LPIPS package")
    return [nn.Parameter(tensors[name].float()) for name in names]


def _check(what: str, path: str, expected: dict[str, Tensor], given: dict[str, Tensor], remedy: str) -> None:
    problems = differences(expected, given)
    if problems:
        raise CheckpointError(f"{path} does not hold {what}: {'; '.join(problems)}. Give the state dict of {remedy}.")
