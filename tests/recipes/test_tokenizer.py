import dataclasses
import math

import pytest
import torch

from megavar.config.recipes.tokenizer import (
    AdversarialConfig,
    CodebookConfig,
    PerceptualConfig,
    TokenizerTrainingConfig,
)
from megavar.errors import ConfigError
from megavar.recipes.base import Losses
from megavar.recipes.tokenizer.adversarial import reconstruction_realism_loss
from megavar.recipes.tokenizer.recipe import TokenizerTraining
from tests.recipes.digit_images import TOKENIZER, digit_batch, digit_images

CPU = torch.device("cpu")
ADVERSARIAL = AdversarialConfig(layers=2, base_channels=8, norm_groups=4, start_step=3, lecam_weight=0.1)


def recipe(tokenizer=TOKENIZER, seed: int = 0, **options) -> TokenizerTraining:
    return TokenizerTraining(TokenizerTrainingConfig(**options), tokenizer, seed, CPU)


def losses_of(made: TokenizerTraining, name: str, step: int, count: int = 4):
    return means(made, digit_batch(0, count), name, step)


def means(made: TokenizerTraining, batch, name: str, step: int) -> Losses:
    """The losses as means over the batch."""
    inputs = made.prepare(batch, step)
    (only,) = made.passes(name, step)
    losses, count = only.loss(only.forward(made.modules()[name], inputs), inputs), made.valid(batch, step)
    assert count == len(batch)
    named = {key: value / count for key, value in losses.named.items()}
    return dataclasses.replace(losses, total=losses.total / count, named=named)


def write_rows(parameter, rows, values, moves=None):
    assert moves is None
    with torch.no_grad():
        parameter[rows] = values


def test_training_reconstructs_digits_with_every_scale_in_use():
    codebook = CodebookConfig(revive_every=10, usage_decay=0.9)
    made = recipe(codebook=codebook)
    optimizer = torch.optim.AdamW(made.tokenizer.parameters(), lr=3e-3, betas=(0.9, 0.99), weight_decay=0)
    errors, statistics = [], {}
    for step in range(80):
        losses = means(made, digit_batch(16 * step % 512, 16), "autoencoder", step)
        optimizer.zero_grad()
        losses.total.backward()
        torch.nn.utils.clip_grad_norm_(made.tokenizer.parameters(), 1.0)
        optimizer.step()
        made.after_step(step, write_rows)
        errors.append(float(losses.named["squared_error"]))
        if step >= 75:
            statistics = {k: statistics.get(k, 0) + v for k, v in losses.statistics.items()}
    assert errors[0] > 0.6
    assert sum(errors[-5:]) / 5 < 0.2
    metrics = made.summarize(statistics)
    assert metrics["psnr"] == pytest.approx(10 * math.log10(4 / (sum(errors[-5:]) / 5)), abs=1e-3)
    assert metrics["perplexity/scale_01"] > 2
    assert metrics["perplexity/scale_02"] > 4
    assert metrics["perplexity/scale_04"] > 8
    held_out = digit_images(1000, 32)
    tokens = made.tokenizer.tokens(made.tokenizer.encode(held_out))
    assert (made.tokenizer.decode(tokens) - held_out).square().mean() < 0.25


def test_total_is_the_weighted_sum_of_the_named_losses():
    made = recipe(l1_weight=0.5, l2_weight=2.0, quantizer_weight=3.0)
    named = losses_of(made, "autoencoder", 0).named
    expected = 0.5 * named["absolute_error"] + 2 * named["squared_error"] + 3 * named["quantizer"]
    assert torch.allclose(named["loss"], expected)
    assert not any(value.requires_grad for value in named.values())


def test_the_perceptual_loss_has_its_weight():
    made = recipe(l1_weight=0.0)
    files = {"vgg16_weights": "unused", "lpips_weights": "unused"}
    made.config = made.config.model_copy(update={"perceptual": PerceptualConfig(weight=0.25, **files)})
    made.perceptual = lambda images, originals: (images - originals).abs().amax((1, 2, 3)) + torch.arange(4.0)
    named = losses_of(made, "autoencoder", 0).named
    assert named["perceptual"] > 1.5, "the mean over the images"
    expected = made.config.l2_weight * named["squared_error"] + 0.25 * named["perceptual"]
    assert torch.allclose(named["loss"], expected + made.config.quantizer_weight * named["quantizer"])


def test_step_0_draws_the_codebook_from_data():
    made = recipe()
    before = made.tokenizer.quantizer.embedding.weight.detach().clone()
    losses_of(made, "autoencoder", 0, count=32)
    made.after_step(0, write_rows)
    assert (made.tokenizer.quantizer.embedding.weight != before).any(dim=1).all()
    assert made.tokenizer.quantizer.embedding.weight.requires_grad


def test_the_trainer_decides_how_codes_are_written():
    made, written = recipe(), []
    losses_of(made, "autoencoder", 0, count=32)
    made.after_step(0, lambda *given: written.append(given))
    ((parameter, rows, values, moves),) = written
    assert moves is None
    assert parameter is made.tokenizer.quantizer.embedding.weight
    assert rows.tolist() == list(range(32))
    assert values.shape == (32, 8)


def test_evaluation_leaves_the_codebook_alone():
    made = recipe()
    with torch.no_grad():
        losses_of(made, "autoencoder", 0)
    made.after_step(0, write_rows)
    assert not made.tokenizer.quantizer.ema_vocab_hit_SV.any()


def test_fresh_parameters_depend_on_the_seed_alone():
    torch.manual_seed(1)
    first = recipe(seed=3).tokenizer.state_dict()
    torch.manual_seed(2)
    same, other = recipe(seed=3).tokenizer.state_dict(), recipe(seed=4).tokenizer.state_dict()
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["encoder.conv_in.weight"], other["encoder.conv_in.weight"])


def test_a_codebook_that_was_given_is_kept():
    """``tests/checkpoint/test_beginning.py`` gives one to a whole run."""
    made = TokenizerTraining(TokenizerTrainingConfig(), TOKENIZER, 0, CPU, fresh=False)
    before = made.tokenizer.quantizer.embedding.weight.clone()
    losses_of(made, "autoencoder", 0)
    made.after_step(0, write_rows)
    assert torch.equal(made.tokenizer.quantizer.embedding.weight, before)


def test_discriminator_starts_at_its_step():
    made = recipe(adversarial=ADVERSARIAL)
    assert list(made.modules()) == ["autoencoder", "discriminator"]
    assert [made.active("discriminator", step) for step in (0, 2, 3, 4)] == [False, False, True, True]
    assert all(made.active("autoencoder", step) for step in (0, 3))
    assert "realism" not in losses_of(made, "autoencoder", 2).named
    assert "realism" in losses_of(made, "autoencoder", 3).named
    assert list(recipe().modules()) == ["autoencoder"]
    assert not recipe().active("discriminator", 10**6)


def test_adversarial_loss_is_weighted_against_the_reconstruction():
    made = recipe(adversarial=ADVERSARIAL)
    inputs = made.prepare(digit_batch(0, 4), 3)
    output = made.tokenizer(inputs.images)
    losses = means(made, digit_batch(0, 4), "autoencoder", 3)
    parameters = list(made.tokenizer.parameters())
    last = made.tokenizer.decoder.conv_out.weight
    realism = reconstruction_realism_loss("hinge", made.discriminator(output.images))
    squared = (output.images - inputs.images).square().mean()
    norms = [torch.autograd.grad(loss, last, retain_graph=True)[0].norm() for loss in (squared, realism)]
    weight = 0.5 * norms[0] / (norms[1] + 1e-4)
    expected = squared + output.quantized.loss + weight * realism
    assert torch.allclose(losses.named["adaptive_weight"], weight, rtol=1e-4)
    assert torch.allclose(losses.total, expected, rtol=1e-4)
    for ours, theirs in zip(
        torch.autograd.grad(losses.total, parameters, retain_graph=True), torch.autograd.grad(expected, parameters)
    ):
        assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-6)
    assert all(p.grad is None for p in made.discriminator.parameters())


def test_adversarial_loss_can_be_evaluated_without_gradient():
    made = recipe(adversarial=ADVERSARIAL)
    with torch.no_grad():
        named = losses_of(made, "autoencoder", 3).named
    assert torch.allclose(named["loss"], named["squared_error"] + named["quantizer"] + 0.5 * named["realism"])


def test_a_constant_adversarial_weight():
    made = recipe(adversarial=ADVERSARIAL.model_copy(update={"adaptive": False}))
    assert losses_of(made, "autoencoder", 3).named["adaptive_weight"] == 0.5


def test_discriminator_learns_from_images_and_reconstructions_without_touching_the_autoencoder():
    made = recipe(adversarial=ADVERSARIAL)
    optimizer = torch.optim.AdamW(made.discriminator.parameters(), lr=1e-3)
    values = []
    for _ in range(25):
        losses = losses_of(made, "discriminator", 3)
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
        made.after_step(3, write_rows)
        values.append(float(losses.named["discriminator"]))
    assert values[-1] < 0.5 * values[0]
    assert losses.named["logits/real"] > 0 > losses.named["logits/fake"]
    assert losses.named["lecam"] > 0
    assert all(p.grad is None for p in made.tokenizer.parameters())
    state = made.discriminator.state_dict()
    assert state["mean_logits"].any()  # LeCam's means are saved with the module


def test_discriminator_that_does_not_fit_the_images_is_refused():
    with pytest.raises(ConfigError, match="layers is 3"):
        recipe(adversarial=ADVERSARIAL.model_copy(update={"layers": 3}))


def test_weight_decay_applies_to_convolutions_only():
    made = recipe(adversarial=ADVERSARIAL)
    decayed = {name for name, _ in made.tokenizer.named_parameters() if made.rule("autoencoder", name).decays}
    convolutions = {f"{name}.weight" for name, m in made.tokenizer.named_modules() if isinstance(m, torch.nn.Conv2d)}
    assert decayed == convolutions
    assert "quantize.embedding.weight" not in decayed


def test_keys_tell_samples_and_epochs_apart():
    made = recipe()
    batch = digit_batch(0, 8)
    keys = made.prepare(batch, 0).keys
    assert len(set(keys.tolist())) == 8
    later = made.prepare(type(batch)(batch.images, batch.labels, batch.sample_ids, batch.epochs + 1), 0).keys
    assert not set(keys.tolist()) & set(later.tolist())


def test_token_caches_are_refused():
    batch = digit_batch(0, 2)
    tokens = type(batch)(
        None, batch.labels, batch.sample_ids, batch.epochs, tokens=torch.zeros(2, 21, dtype=torch.int64)
    )
    with pytest.raises(ConfigError, match="needs images"):
        recipe().prepare(tokens, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"l1_weight": 0.0, "l2_weight": 0.0}, "at least one pixel loss"),
        ({"adversarial": {"norm_groups": 7}}, "not a multiple of norm_groups 7"),
        ({"perceptual": {"weight": 1.0}}, "vgg16_weights"),
        ({"codebook": {"dead_below": 1.5}}, "less than 1"),
    ],
)
def test_contradicting_configurations_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TokenizerTrainingConfig(**options)
