"""Training of FlexVAR's tokenizer: full and smaller images, as written out; every code comes into use."""

import pytest
import torch
import torch.nn.functional as F

from megavar.config.recipes.tokenizer import CodebookConfig, TokenizerTrainingConfig
from megavar.config.tokenizers.llamagen_vq import LlamaGenVQConfig
from megavar.errors import ConfigError
from megavar.recipes.tokenizer.recipe import TokenizerTraining
from tests.recipes.digit_images import TOKENIZER, digit_batch
from tests.recipes.test_tokenizer import CPU, write_rows

FLEXVAR = LlamaGenVQConfig(
    scales=(1, 2, 3, 4), vocabulary_size=64, code_dimension=8, latent_channels=16, base_channels=8,
    channel_multipliers=(1, 2, 2), residual_blocks=1, norm_groups=4,
)  # fmt: skip


def recipe(**options) -> TokenizerTraining:
    return TokenizerTraining(TokenizerTrainingConfig(**options), FLEXVAR, 0, CPU)


def run(made: TokenizerTraining, step: int, count: int = 8):
    """Losses of every pass of a step, as means over the batch."""
    batch = digit_batch(count * step % 512, count)
    inputs = made.prepare(batch, step)
    passes = made.passes("autoencoder", step)
    return inputs, [one.loss(one.forward(made.tokenizer, inputs), inputs) for one in passes]


def test_a_step_is_the_mean_over_full_and_smaller_images():
    made = recipe(smaller_images=2)
    assert made.smaller_sides(0) == [2, 3]  # there are no others: a single position is no image
    inputs, losses = run(made, 0)
    found = sum(one.total for one in losses) / len(inputs.images)
    model, wanted = made.tokenizer, []
    for side in (4, 2, 3):
        features = F.interpolate(model.quant_conv(model.encoder(inputs.images)), size=(side, side), mode="area")
        z = F.normalize(features, dim=1)
        codes = F.normalize(model.quantize.embedding.weight, dim=1)
        nearest = torch.cdist(z.permute(0, 2, 3, 1).flatten(0, 2), codes).argmin(1)
        code = codes[nearest].view(len(z), side, side, -1).permute(0, 3, 1, 2)
        images = model.decoder(model.post_quant_conv(z + (code - z).detach()))
        original = F.interpolate(inputs.images, size=images.shape[-2:], mode="area")
        error = (images - original).square().mean()
        wanted.append(error + (code - z.detach()).square().mean() + 0.25 * (code.detach() - z).square().mean())
    torch.testing.assert_close(found, torch.stack(wanted).mean())
    for gradient, expected in zip(*(torch.autograd.grad(loss, list(model.parameters())) for loss in
                                    (found, torch.stack(wanted).mean()))):  # fmt: skip
        torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-4)


def test_training_reconstructs_digits_at_every_scale():
    made = recipe(smaller_images=1, codebook=CodebookConfig(revive_every=10, usage_decay=0.9))
    optimizer = torch.optim.AdamW(made.tokenizer.parameters(), lr=3e-3, betas=(0.9, 0.99), weight_decay=0)
    errors, smaller, statistics = [], [], {}
    for step in range(80):
        _, losses = run(made, step, 16)
        optimizer.zero_grad()
        (sum(one.total for one in losses) / 16).backward()
        torch.nn.utils.clip_grad_norm_(made.tokenizer.parameters(), 1.0)
        optimizer.step()
        made.after_step(step, write_rows)
        errors.append(float(losses[0].named["squared_error"]) / 16)
        smaller += [float(value) / count for value, count in losses[1].means.values()]
        if step >= 75:
            statistics = {k: statistics.get(k, 0) + v for k, v in losses[0].statistics.items()}
    assert sum(errors[-5:]) < 0.35 * sum(errors[:5]) and sum(smaller[-5:]) < 0.5 * sum(smaller[:5])
    metrics = made.summarize(statistics)
    assert metrics["codes_used/all_scales"] > 0.5 and metrics["perplexity/scale_04"] > 8
    assert {tuple(made.smaller_sides(step)) for step in range(20)} == {(2,), (3,)}


def test_scales_that_are_residuals_are_no_images_by_themselves():
    with pytest.raises(ConfigError, match=r"smaller_images=1, but tokenizer\.name=multiscale_vq has 0 coarser scales"):
        TokenizerTraining(TokenizerTrainingConfig(smaller_images=1), TOKENIZER, 0, CPU)
