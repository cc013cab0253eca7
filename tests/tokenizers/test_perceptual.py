"""The perceptual loss with random weight files in the formats of torchvision and of the LPIPS package."""

from pathlib import Path

import pytest
import torch
import torchvision

from megavar.errors import CheckpointError
from megavar.tokenizers.perceptual import ALEXNET, VGG16, FeatureNetwork, PerceptualDistance

CHANNELS = (64, 128, 256, 512, 512)


def build(weights: str, linear: str, network: FeatureNetwork = VGG16) -> PerceptualDistance:
    return PerceptualDistance(network, weights, linear, keys=("the.network", "the.linear"))


@pytest.fixture(scope="module")
def reference() -> torch.nn.Module:
    torch.manual_seed(0)
    return torchvision.models.vgg16(weights=None).features.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def linear() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1) for i, c in enumerate(CHANNELS)}


@pytest.fixture(scope="module")
def files(tmp_path_factory, reference, linear) -> tuple[Path, Path]:
    directory = tmp_path_factory.mktemp("weights")
    features = {f"features.{name}": tensor for name, tensor in reference.state_dict().items()}
    torch.save(features | {"classifier.0.weight": torch.zeros(2, 2)}, directory / "vgg16.pth")
    torch.save(linear, directory / "lpips.pth")
    return directory / "vgg16.pth", directory / "lpips.pth"


@pytest.fixture(scope="module")
def distance(files) -> PerceptualDistance:
    return build(*map(str, files))


def images(seed: int, side: int = 16) -> torch.Tensor:
    return torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_equals_the_definition_on_torchvisions_network(distance, reference, linear):
    x, y = images(0, 32), images(1, 32)

    def activations(image):
        mean, deviation = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
        h, taps = (image - mean.view(1, 3, 1, 1)) / deviation.view(1, 3, 1, 1), []
        for index, layer in enumerate(reference):
            h = layer(h)
            if index in (3, 8, 15, 22, 29):  # relu1_2, relu2_2, relu3_3, relu4_3, relu5_3
                taps.append(h / (h.square().sum(1, keepdim=True).sqrt() + 1e-10))
        return taps

    expected = sum(
        (weight * (a - b) ** 2).sum(1).mean((1, 2))
        for weight, a, b in zip(linear.values(), activations(x), activations(y))
    )
    assert torch.allclose(distance(x, y), expected, rtol=1e-4)


def test_gradient_reaches_the_reconstruction_only_and_weights_are_frozen(distance):
    x, y = images(0).requires_grad_(), images(1).requires_grad_()
    distance(x, y).sum().backward()
    assert x.grad.any()
    assert y.grad is None
    assert not any(p.requires_grad for p in distance.parameters())


def test_equal_images_have_distance_zero_and_flat_ones_finite_gradients(distance):
    x = images(0)
    assert distance(x, x).tolist() == [0, 0]
    flat = torch.zeros(1, 3, 16, 16, requires_grad=True)
    distance(flat, images(1)[:1]).sum().backward()
    assert flat.grad.isfinite().all()


def test_grey_images(distance):
    grey = images(0)[:, :1]
    assert torch.allclose(distance(grey, grey.flip(2)), distance(grey.repeat(1, 3, 1, 1), grey.flip(2)))


def test_missing_or_wrong_files_are_named(files, tmp_path):
    vgg, lpips = map(str, files)
    with pytest.raises(CheckpointError, match=r"the\.network\).*absent.pth does not exist"):
        build(str(tmp_path / "absent.pth"), lpips)
    with pytest.raises(CheckpointError, match=r"the\.linear\).*absent.pth does not exist"):
        build(vgg, str(tmp_path / "absent.pth"))
    with pytest.raises(CheckpointError, match=r"does not hold VGG-16 weights: keys missing.*torchvision.models.vgg16"):
        build(lpips, lpips)
    with pytest.raises(CheckpointError, match=r"does not hold LPIPS weights: .*lin0.model.1.weight.*LPIPS package"):
        build(vgg, vgg)


@pytest.fixture(scope="module")
def alexnet_files(tmp_path_factory):
    directory = tmp_path_factory.mktemp("alexnet")
    torch.manual_seed(0)
    network = torchvision.models.alexnet(weights=None)
    torch.save(network.state_dict(), directory / "alexnet.pth")
    linear = {f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1) for i, c in enumerate((64, 192, 384, 256, 256))}
    torch.save(linear, directory / "alex.pth")
    return directory, network.eval(), linear


def test_alexnet_distance_is_its_definition_on_torchvisions_network(alexnet_files):
    directory, network, linear = alexnet_files
    distance = build(str(directory / "alexnet.pth"), str(directory / "alex.pth"), ALEXNET)
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.rand(2, 3, 64, 64, generator=generator) * 2 - 1 for _ in range(2))
    assert torch.equal(distance(x, x), torch.zeros(2))
    expected = torch.zeros(2)
    shift, scale = torch.tensor([-0.03, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.45])
    features = [(z - shift.view(1, 3, 1, 1)) / scale.view(1, 3, 1, 1) for z in (x, y)]
    stage = 0
    for layer in network.features[:12]:
        features = [layer(z) for z in features]
        if isinstance(layer, torch.nn.ReLU):
            one, other = (z / z.norm(dim=1, keepdim=True) for z in features)
            expected += ((one - other) ** 2 * linear[f"lin{stage}.model.1.weight"]).sum(1).mean((1, 2))
            stage += 1
    assert stage == 5
    torch.testing.assert_close(distance(x, y), expected)
