"""Files for LPIPS with random weights, in the formats of torchvision and of the LPIPS package."""

from pathlib import Path

import torch
import torchvision

from megavar.config.evaluation import PerceptualWeights

CHANNELS = {"lpips_vgg": (64, 128, 256, 512, 512), "lpips_alex": (64, 192, 384, 256, 256)}
ALEXNET = {0: (64, 3, 11), 3: (192, 64, 5), 6: (384, 192, 3), 8: (256, 384, 3), 10: (256, 256, 3)}


def write_perceptual_files(directory: Path) -> dict[str, PerceptualWeights]:
    """Where they are, by the network's key."""
    torch.manual_seed(0)
    alexnet = {f"{place}.weight": torch.randn(o, i, k, k) * 0.05 for place, (o, i, k) in ALEXNET.items()}
    alexnet |= {f"{place}.bias": torch.zeros(shape[0]) for place, shape in ALEXNET.items()}
    vgg = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["D"]).state_dict()
    given = {}
    for name, features in (("lpips_vgg", vgg), ("lpips_alex", alexnet)):
        torch.save({f"features.{key}": tensor for key, tensor in features.items()}, directory / f"{name}.pth")
        linear = {f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1) for i, c in enumerate(CHANNELS[name])}
        torch.save(linear, directory / f"{name}-linear.pth")
        paths = {"backbone": str(directory / f"{name}.pth"), "linear": str(directory / f"{name}-linear.pth")}
        given[name] = PerceptualWeights(**paths)
    return given
