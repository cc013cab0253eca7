import pytest
import torch
import torch.nn.functional as F

from megavar.config.recipes.tokenizer import AdversarialConfig
from megavar.errors import ConfigError
from megavar.recipes.base import frozen
from megavar.recipes.tokenizer import adversarial
from megavar.recipes.tokenizer.adversarial import LeCam, PatchDiscriminator, adaptive_weight
from tests.distributed.harness import run_ranks

CONFIG = AdversarialConfig(layers=2, base_channels=8, norm_groups=4)


def discriminator() -> PatchDiscriminator:
    torch.manual_seed(0)
    return PatchDiscriminator(CONFIG, 3, 16)


def test_patches_are_judged_one_by_one():
    judge = discriminator()
    images = torch.randn(2, 3, 16, 16)
    assert judge(images).shape == (2, 1, 2, 2)
    assert torch.allclose(judge(images)[:1], judge(images[:1]), atol=1e-6)  # no statistics over the batch


def test_images_too_small_for_the_layers_are_refused():
    with pytest.raises(ConfigError, match=r"layers is 3.*at least 24 pixels.*have 16"):
        PatchDiscriminator(CONFIG.model_copy(update={"layers": 3}), 3, 16)
    smallest = PatchDiscriminator(CONFIG.model_copy(update={"layers": 3}), 3, 24)
    assert smallest(torch.zeros(1, 3, 24, 24)).numel() == 1


def test_losses_of_both_sides():
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-0.5, -3.0])
    assert adversarial.discriminator_loss("hinge", real, fake).item() == pytest.approx(0.5 * (0.25 + 0.25))
    assert adversarial.reconstruction_realism_loss("hinge", fake).item() == pytest.approx(1.75)
    expected = 0.5 * (-F.logsigmoid(real).mean() - F.logsigmoid(-fake).mean())
    assert torch.allclose(adversarial.discriminator_loss("non_saturating", real, fake), expected)
    assert torch.allclose(adversarial.reconstruction_realism_loss("non_saturating", fake), -F.logsigmoid(fake).mean())


def setup(batch: slice):
    """A last convolution, its input, its output and two losses, for a part of a batch of 4."""
    torch.manual_seed(1)
    last = torch.nn.Conv2d(5, 3, 3, padding=1)
    h, target = torch.randn(4, 5, 8, 8)[batch], torch.randn(4, 3, 8, 8)[batch]
    images = last(h)
    return last, h, images, F.mse_loss(images, target), images.abs().mean()


def test_last_layer_gradient_is_the_gradient_of_the_weight():
    last, h, images, loss, _ = setup(slice(None))
    at_images, expected = torch.autograd.grad(loss, [images, last.weight])
    ours = adversarial.last_layer_gradient(at_images, h)
    assert torch.allclose(ours, expected, rtol=1e-4, atol=1e-7)


def weight_of_this_part(parts: int) -> float:
    rank = torch.distributed.get_rank() if parts > 1 else 0
    share = 4 // parts
    _, h, images, first, second = setup(slice(rank * share, (rank + 1) * share))
    gradients = [torch.autograd.grad(loss, images, retain_graph=True)[0] for loss in (first, second)]
    return float(adaptive_weight(*gradients, h, CONFIG))


def test_adaptive_weight_is_the_ratio_of_gradient_norms():
    last, _, _, first, second = setup(slice(None))
    norms = [torch.autograd.grad(loss, last.weight, retain_graph=True)[0].norm() for loss in (first, second)]
    assert weight_of_this_part(1) == pytest.approx(float(norms[0] / (norms[1] + 1e-4)), rel=1e-4)


def test_adaptive_weight_is_bounded():
    _, h, images, first, _ = setup(slice(None))
    (gradient,) = torch.autograd.grad(first, images)
    bounded = CONFIG.model_copy(update={"adaptive_maximum": 3.0})
    assert float(adaptive_weight(gradient * 1e6, gradient * 0, h, bounded)) == 3


def test_a_value_with_a_given_gradient():
    x = torch.randn(3, requires_grad=True)
    gradient = torch.tensor([1.0, -2.0, 3.0])
    value = adversarial.with_gradient(torch.tensor(7.0), x, gradient)
    value.backward()
    assert value.item() == 7
    assert torch.equal(x.grad, gradient)


@pytest.mark.distributed
def test_adaptive_weight_does_not_depend_on_the_number_of_ranks():
    alone = weight_of_this_part(1)
    for weight in run_ranks(2, weight_of_this_part, 2):
        assert weight == pytest.approx(alone, rel=1e-5)


def test_frozen_module_passes_gradients_to_its_input_only():
    judge = discriminator()
    images = torch.randn(1, 3, 16, 16, requires_grad=True)
    with frozen(judge):
        logits = judge(images)
    logits.sum().backward()
    assert images.grad.any()
    assert all(p.grad is None and p.requires_grad for p in judge.parameters())


def test_lecam_pulls_logits_towards_the_running_mean_of_the_other_kind():
    judge = discriminator()
    real, fake = torch.full((2, 1, 2, 2), 3.0), torch.full((2, 1, 2, 2), -1.0)
    lecam = LeCam(judge, decay=0.75)
    lecam.begin(1)
    assert lecam.loss(real, fake).item() == pytest.approx(3**2 + 1)
    lecam.begin(1)
    assert lecam.loss(real[:1] + 4, fake[:1]).item() == 7**2 + 1, "a step that was not applied leaves nothing"
    lecam.after_step(1)
    assert judge.mean_logits.tolist() == [0.25 * 7, -0.25]
    lecam.begin(2)
    assert lecam.loss(real, fake).item() == pytest.approx((3 + 0.25) ** 2 + (1.75 + 1) ** 2)
    assert lecam.loss(real[:1] - 6, fake[:1] - 3).item() == pytest.approx((1.75 + 4) ** 2), "the step's means stay"
    lecam.after_step(2)
    assert judge.mean_logits.tolist() == pytest.approx([0.75 * 1.75 + 0.25 * 1, -0.75 * 0.25 - 0.25 * 2])


def test_fresh_discriminator():
    judge = discriminator()
    judge.initialize(torch.Generator().manual_seed(1))
    first = judge.layers[0].weight.clone()
    judge.initialize(torch.Generator().manual_seed(1))
    assert torch.equal(judge.layers[0].weight, first)
    assert first.std().item() == pytest.approx(0.02, rel=0.1)
    slopes = [layer.negative_slope for layer in judge.layers if isinstance(layer, torch.nn.LeakyReLU)]
    assert slopes and set(slopes) == {0.2}, "pix2pix"
