"""DINO's loss, centre and average by their formulas; views; what is refused; what comes out knows classes."""

import math

import pytest
import torch
from torch import nn

from megavar.config.loading import load_config
from megavar.config.recipes.self_distillation import CropsConfig, SelfDistillationConfig
from megavar.config.teachers.self_distilled import ViTConfig
from megavar.data.batch import Batch
from megavar.errors import ConfigError
from megavar.recipes.self_distillation import Said, SelfDistillation, _check, crop

VIT = ViTConfig(width=16, depth=1, heads=2, patch=4, grid=4)


def recipe(**values) -> SelfDistillation:
    config = SelfDistillationConfig(network=VIT, prototypes=6, **values)
    return SelfDistillation(config, steps=10, seed=0, device=torch.device("cpu"))


def batch(number: int, epoch: int = 0) -> Batch:
    ids = torch.arange(number)
    images = torch.rand(number, 3, 16, 16, generator=torch.Generator().manual_seed(2)) * 2 - 1
    return Batch(images, ids, ids, torch.full_like(ids, epoch))


def test_loss_by_loops_in_float64() -> None:
    distillation = recipe(student_temperature=0.2, teacher_temperature=0.05)
    distillation.network.centre.copy_(torch.linspace(-0.1, 0.2, 6))
    student, average = torch.randn(4, 3, 6), torch.randn(2, 3, 6) / 5
    losses = distillation.loss(Said(student, average), None)
    s, t = student.double() / 0.2, (average.double() - distillation.network.centre.double()) / 0.05
    expected = 0.0
    for image in range(3):
        terms = [-(t[a, image].softmax(-1) * s[b, image].log_softmax(-1)).sum() for a in range(2) for b in range(4)
                 if a != b]  # fmt: skip
        assert len(terms) == 6
        expected += float(sum(terms)) / 6
    assert float(losses.total) == pytest.approx(expected, rel=1e-5)


def test_centre_and_average_move_by_their_formulas() -> None:
    distillation = recipe(center_momentum=0.7, average_momentum=0.9)
    network = distillation.network
    with torch.no_grad():
        for _, student in network.pairs():
            student.add_(1.0)
    distillation.passes("teacher", 4)
    said = torch.randn(2, 5, 6)
    distillation.loss(Said(torch.randn(4, 5, 6, requires_grad=True), said), None)
    before = [average.clone() for average, _ in network.pairs()]
    distillation.after_step(4, lambda *rows: None)
    torch.testing.assert_close(network.centre, 0.3 * said.mean((0, 1)))
    momentum = 1 - 0.1 * (math.cos(math.pi * 4 / 10) + 1) / 2
    for old, (average, _) in zip(before, network.pairs(), strict=True):
        torch.testing.assert_close(average, old + (1 - momentum))


def test_only_the_student_is_trained_and_only_its_matrices_decay() -> None:
    network = recipe().network
    rules = {name: network.rule(name) for name, _ in network.named_parameters()}
    trained = {name for name, rule in rules.items() if not rule.frozen}
    assert trained == {name for name in rules if name.startswith("heads.student.")} and len(trained) < len(rules)
    layers = network.heads["student"].named_modules()
    matrices = {f"heads.student.{name}.weight" for name, layer in layers if isinstance(layer, (nn.Linear, nn.Conv2d))}
    assert {name for name in trained if rules[name].decays} == matrices


def test_views_are_functions_of_the_sample() -> None:
    distillation = recipe()
    large, small = distillation.prepare(batch(6), 0)
    assert large.shape == (2, 6, 3, 16, 16) and small.shape == (2, 6, 3, 8, 8)
    again, _ = distillation.prepare(batch(4), 3)
    assert torch.equal(again, large[:, :4])
    other, _ = distillation.prepare(batch(6, epoch=1), 0)
    assert not torch.equal(other, large) and not torch.equal(large[0], large[1])


def test_a_crop_of_everything_is_the_image() -> None:
    plain = CropsConfig(brightness=0.0, contrast=0.0)
    images, drawn = batch(2).require_images(), torch.full((2, 6), 0.3)
    torch.testing.assert_close(crop(images, drawn, 16, (1.0, 1.0), plain), images, rtol=0, atol=1e-5)
    mirrored = crop(images, drawn, 16, (1.0, 1.0), CropsConfig(brightness=0.0, contrast=0.0, flip=True))
    torch.testing.assert_close(mirrored, images.flip(-1), rtol=0, atol=1e-5)
    quarter = crop(images, torch.tensor([[0.0, 0.0, 0.0, 1, 0.5, 0.5]] * 2), 8, (0.25, 0.25), plain)
    torch.testing.assert_close(quarter, images[:, :, :8, :8], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.precision=bf16", "Set fp32"),
        ("deepspeed=configs/deepspeed/zero3.json", "Use stage 0 to 2"),
        ("recipe.network.grid=8", "has 8 patches of 4 pixels along a side, 32 pixels"),
        ("recipe.crops.local_side=6", "not a multiple of recipe.network.patch=4"),
    ],
)
def test_what_it_cannot_do_is_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _check(load_config("configs/mepa/teacher_digits.yaml", [override]))
