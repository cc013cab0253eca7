"""LPIPS: perceptual distance of images on the features of a classifier (Zhang et al. 2018, arXiv:1801.03924).

    features = activations of a network after the last ReLU of each of its five stages
    d(x, y)  = sum over stages, mean over positions of  w . (x_l / |x_l| - y_l / |y_l|)^2      (channel-wise unit norm)

VGG-16 is what tokenizers are trained with, AlexNet what most papers report. Both weight files are read from disk:
torchvision's state dict of the network, and the LPIPS package's weights ``w`` of every channel.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megavar.errors import CheckpointError
from megavar.weight_file import differences, read_state_dict


class Convolution(NamedTuple):
    """A convolution before a ReLU."""

    position: int
    """Inside torchvision's ``features``: names its keys."""
    width: int
    kernel: int = 3
    stride: int = 1
    padding: int = 1


@dataclass(frozen=True)
class FeatureNetwork:
    """Five stages of convolutions, some of which begin with a max pool."""

    name: str
    stages: tuple[tuple[Convolution, ...], ...]
    pool: int
    """Kernel of the pools, whose stride is 2."""
    pooled: tuple[int, ...]
    """Stages that begin with a pool."""
    published: str
    """Where torchvision has the weights."""
    linear: str
    """Name of the LPIPS package's file."""


def _vgg_stage(first: int, *widths: int) -> tuple[Convolution, ...]:
    return tuple(Convolution(first + 2 * number, width) for number, width in enumerate(widths))


VGG16 = FeatureNetwork(
    "VGG-16",
    (
        _vgg_stage(0, 64, 64),
        _vgg_stage(5, 128, 128),
        _vgg_stage(10, 256, 256, 256),
        _vgg_stage(17, 512, 512, 512),
        _vgg_stage(24, 512, 512, 512),
    ),
    pool=2,
    pooled=(1, 2, 3, 4),
    published="torchvision.models.vgg16, ImageNet weights",
    linear="lpips/weights/v0.1/vgg.pth",
)
"""Simonyan and Zisserman 2015, configuration D. Images of at least 16 pixels."""
ALEXNET = FeatureNetwork(
    "AlexNet",
    (
        (Convolution(0, 64, 11, 4, 2),),
        (Convolution(3, 192, 5, 1, 2),),
        (Convolution(6, 384),),
        (Convolution(8, 256),),
        (Convolution(10, 256),),
    ),
    pool=3,
    pooled=(1, 2),
    published="torchvision.models.alexnet, ImageNet weights",
    linear="lpips/weights/v0.1/alex.pth",
)
"""torchvision's variant of Krizhevsky 2014. Images of at least 63 pixels."""
_SHIFT = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)
"""LPIPS' normalization of images in [-1, 1]: ImageNet's mean and deviation in that range."""
_UNIT_EPSILON = 1e-10


class PerceptualDistance(nn.Module):
    """LPIPS with frozen weights."""

    shift: Tensor
    scale: Tensor

    def __init__(self, network: FeatureNetwork, weights: str, linear: str, *, keys: tuple[str, str]) -> None:
        """Read the weights.

        Args:
            weights: torchvision's state dict of ``network``; its classifier is ignored.
            linear: the LPIPS package's file for it.
            keys: of the configuration that name both files, for errors.

        Raises:
            CheckpointError: a file is missing or holds something else.
        """
        super().__init__()
        self.stages = nn.ModuleList(_build_stages(network, weights, keys[0]))
        self.linear = nn.ParameterList(_read_linear(network, linear, keys[1]))
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
        """Distance of each pair: float [B, 3, H, W] in [-1, 1] twice -> float32 [B].

        The gradient reaches ``reconstruction`` only.
        """
        with torch.no_grad():
            targets = self.features(images)
        distance = torch.zeros(len(images), device=images.device)
        for weight, ours, target in zip(self.linear, self.features(reconstruction), targets):
            distance = distance + ((ours - target).square() * weight).sum(dim=1).mean(dim=(1, 2)).float()
        return distance


def _build_stages(network: FeatureNetwork, path: str, key: str) -> list[nn.Module]:
    """The convolutional stages with the weights of a torchvision state dict."""
    stages: list[nn.Module] = []
    numbered: dict[str, nn.Module] = {}
    channels = 3
    for number, convolutions in enumerate(network.stages):
        layers: list[nn.Module] = [nn.MaxPool2d(network.pool, 2)] if number in network.pooled else []
        for place, width, kernel, stride, padding in convolutions:
            convolution = nn.Conv2d(channels, width, kernel, stride, padding)
            layers += [convolution, nn.ReLU()]
            numbered[str(place)], channels = convolution, width
        stages.append(nn.Sequential(*layers))
    what = f"{network.name} weights"
    tensors = read_state_dict(path, f"{what} ({key})")
    named = nn.ModuleDict(numbered)
    prefix = "features."
    features = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    _check(what, path, named.state_dict(), features, network.published)
    named.load_state_dict(features)
    return stages


def _read_linear(network: FeatureNetwork, path: str, key: str) -> list[nn.Parameter]:
    """LPIPS' weight of every channel of the five stages, [1, C_l, 1, 1]."""
    tensors = read_state_dict(path, f"LPIPS weights ({key})")
    names = [f"lin{number}.model.1.weight" for number in range(len(network.stages))]
    expected = {name: torch.empty(1, stage[-1].width, 1, 1) for name, stage in zip(names, network.stages)}
    _check("LPIPS weights", path, expected, tensors, f"{network.linear} of the LPIPS package")
    return [nn.Parameter(tensors[name].float()) for name in names]


def _check(what: str, path: str, expected: dict[str, Tensor], given: dict[str, Tensor], remedy: str) -> None:
    problems = differences(expected, given)
    if problems:
        raise CheckpointError(f"{path} does not hold {what}: {'; '.join(problems)}. Give the state dict of {remedy}.")
