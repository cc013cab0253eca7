"""TiTok's discriminator and perceptual distance by their definitions."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torchvision.models.convnext import CNBlockConfig, ConvNeXt

from megavar.config.recipes.tokenizer import AdversarialConfig
from megavar.errors import CheckpointError
from megavar.recipes.tokenizer.blurred import Blur, BlurredDiscriminator
from megavar.tokenizers.logit_distance import LogitDistance


def test_the_published_discriminator_has_the_published_shapes() -> None:
    judge = BlurredDiscriminator(AdversarialConfig(network="blurred", base_channels=128), 3)
    convolutions = [tuple(p.shape) for p in judge.parameters() if p.ndim == 4]
    assert convolutions == [
        (128, 3, 5, 5), (128, 128, 3, 3), (256, 128, 3, 3), (512, 256, 3, 3), (512, 512, 1, 1), (1, 512, 5, 5),
    ]  # fmt: skip
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    logits = judge(images)
    assert logits.shape == (2, 1, 16, 16)
    torch.testing.assert_close(logits[:1], judge(images[:1]))  # no statistics over the batch


def test_blurring_weighs_four_by_four_places() -> None:
    x, line = torch.randn(1, 2, 6, 6, dtype=torch.float64), (1, 3, 3, 1)
    padded = F.pad(x, (1, 1, 1, 1))
    expected = torch.zeros(1, 2, 3, 3, dtype=torch.float64)
    for i in range(3):
        for j in range(3):
            for a in range(4):
                for b in range(4):
                    expected[:, :, i, j] += padded[:, :, 2 * i + a, 2 * j + b] * line[a] * line[b] / 64
    torch.testing.assert_close(Blur()(x), expected)


def small() -> torch.nn.Module:
    """A ConvNeXt of torchvision's with few blocks."""
    sizes = [CNBlockConfig(8, 16, 1), CNBlockConfig(16, None, 1)]
    return ConvNeXt(sizes, stochastic_depth_prob=0.4)


def test_the_distance_of_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(torchvision.models, "convnext_small", small)
    network = small().eval()
    torch.save(network.state_dict(), tmp_path / "convnext.pth")
    distance = LogitDistance(str(tmp_path / "convnext.pth"), key="recipe.convnext.weights")
    ours, theirs = (torch.rand(1, 3, 32, 32) * 2 - 1 for _ in range(2))
    ours.requires_grad_()
    found = distance(ours, theirs)

    def logits(images: torch.Tensor) -> torch.Tensor:
        resized = F.interpolate((images + 1) / 2, size=224, mode="bilinear", align_corners=False, antialias=True)
        mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        return network((resized - mean.view(1, 3, 1, 1)) / deviation.view(1, 3, 1, 1))

    with torch.no_grad():
        torch.testing.assert_close(found, F.mse_loss(logits(ours), logits(theirs))[None], rtol=1e-3, atol=1e-6)
    found.sum().backward()
    assert ours.grad is not None and ours.grad.any()
    torch.save({"features.0.0.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"does not hold ConvNeXt-S weights.*torchvision\.models\.convnext_small"):
        LogitDistance(str(tmp_path / "other.pth"), key="recipe.convnext.weights")
