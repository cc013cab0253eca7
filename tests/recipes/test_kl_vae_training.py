"""Variational autoencoders, and TiTok that makes pixels: what is minimized, and that it is learned."""

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from megavar.config.recipes.kl_vae import KLVAETrainingConfig
from megavar.config.recipes.tokenizer import CodebookConfig, TokenizerTrainingConfig
from megavar.config.tokenizers.vision import VisionTransformerConfig
from megavar.errors import ConfigError
from megavar.recipes.tokenizer.kl_vae import KLVAETraining
from megavar.recipes.tokenizer.recipe import TokenizerTraining
from tests.recipes.digit_images import digit_batch, digit_images
from tests.recipes.line_tokenizers import CPU, TITOK, VECTORS, write_rows
from tests.recipes.test_tokenizer import means

SHALLOW = VisionTransformerConfig(width=32, depth=1, heads=2)
QUICK = {"encoder": SHALLOW, "decoder": SHALLOW, "initial_std": 0.25}
PIXELS = TITOK.model_copy(update={"legacy": False, "commitment_weight": 0.02})


def test_the_loss_is_the_error_of_a_sample_and_the_divergence() -> None:
    made, batch = KLVAETraining(KLVAETrainingConfig(kl_weight=0.01, l2_weight=0.25), VECTORS, 0, CPU), digit_batch(3, 4)
    losses, inputs, model = means(made, batch, "autoencoder", 0), made.prepare(batch, 0), made.tokenizer
    posterior = model.posterior(model.vectors(inputs.images))
    drawn = posterior.mean + (0.5 * posterior.log_variance).exp() * inputs.normal
    target = (inputs.images + 1) / 2  # in [0, 1], as the authors compute errors: l2_weight 0.25
    error = (model.picture(drawn)[0] - target).square().mean()
    apart = kl_divergence(Normal(posterior.mean, posterior.deviation), Normal(0.0, 1.0)).sum((1, 2))
    torch.testing.assert_close(losses.named["divergence"], apart.mean().detach())
    torch.testing.assert_close(losses.total, error + 0.01 * apart.mean())
    losses.total.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    alone = made.prepare(digit_batch(5, 1), 0).normal
    assert torch.equal(alone[0], inputs.normal[2]), "noise is the sample's, whatever batch it is in"
    latents = model.encode(inputs.images)
    torch.testing.assert_close(model.sample(latents, inputs.normal), drawn)
    assert torch.equal(model.tokens(latents), posterior.mean)


@pytest.mark.parametrize("kind", ["ids", "vectors"])
def test_a_titok_that_makes_pixels_learns(kind: str) -> None:
    """In one stage, without a proxy: held-out digits are nearer to what their own tokens make than to others' images.

    For long only the mean image is learned, whatever the tokens are: layers of large weights, and codes that hardly
    pull, shorten that.
    """
    made: TokenizerTraining | KLVAETraining
    if kind == "ids":
        upkeep = CodebookConfig(revive_every=10)
        made = TokenizerTraining(TokenizerTrainingConfig(codebook=upkeep), PIXELS.model_copy(update=QUICK), 0, CPU)
    else:
        made = KLVAETraining(KLVAETrainingConfig(kl_weight=1e-5), VECTORS.model_copy(update=QUICK), 0, CPU)
        with torch.no_grad():
            made.tokenizer.encoder.conv_out.bias[8:] = -6.0  # deviations of 0.05 to begin with
    optimizer = torch.optim.AdamW(made.tokenizer.parameters(), lr=5e-3, betas=(0.9, 0.99), weight_decay=0)
    held_out = digit_images(1000, 32)
    for step in range(240 if kind == "ids" else 160):
        optimizer.zero_grad()
        means(made, digit_batch(16 * step % 512, 16), "autoencoder", step).total.backward()
        torch.nn.utils.clip_grad_norm_(made.tokenizer.parameters(), 1.0)
        optimizer.step()
        made.after_step(step, write_rows)
    decoded = made.tokenizer.decode(made.tokenizer.tokens(made.tokenizer.encode(held_out)))
    error, others = ((decoded.roll(shift, 0) - held_out).square().mean() for shift in (0, 1))
    assert error < 0.9 * others, f"{error:.3f}, and {others:.3f} from other tokens"


def test_tokenizers_without_posteriors_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"tokenizer\.name=titok as configured has none\. Choose tokenizer"):
        KLVAETraining(KLVAETrainingConfig(), PIXELS, 0, CPU)
