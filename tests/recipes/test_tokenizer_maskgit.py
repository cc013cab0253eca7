"""A raster VQGAN of MaskGIT's layout learns to reconstruct by the recipe of all VQ tokenizers."""

import torch

from megavar.config.recipes.tokenizer import CodebookConfig
from megavar.config.tokenizers.maskgit_vqgan import MaskGITVQGANConfig
from megavar.tokenizers.base import Codebook
from tests.recipes.digit_images import digit_batch, digit_images
from tests.recipes.test_tokenizer import means, recipe, write_rows

VQGAN = MaskGITVQGANConfig(side=4, vocabulary_size=32, code_dimension=8, base_channels=8, norm_groups=4,
                           image_channels=1, channel_multipliers=(1, 2), residual_blocks=1)  # fmt: skip


def test_it_learns_to_reconstruct() -> None:
    side = digit_images(0, 1).shape[-1]
    config = VQGAN.model_copy(update={"side": side // 2, "image_channels": digit_images(0, 1).shape[1]})
    made = recipe(config, codebook=CodebookConfig(revive_every=10, usage_decay=0.9))
    assert isinstance(made.tokenizer, Codebook)
    optimizer = torch.optim.AdamW(made.tokenizer.parameters(), lr=3e-3, betas=(0.9, 0.99), weight_decay=0)
    errors = []
    for step in range(40):
        losses = means(made, digit_batch(16 * step % 512, 16), "autoencoder", step)
        optimizer.zero_grad()
        losses.total.backward()
        torch.nn.utils.clip_grad_norm_(made.tokenizer.parameters(), 1.0)
        optimizer.step()
        made.after_step(step, write_rows)
        errors.append(float(losses.named["squared_error"]))
    assert sum(errors[-5:]) / 5 < 0.3 * errors[0]
    held_out = digit_images(1000, 32)
    decoded = made.tokenizer.decode(made.tokenizer.tokens(made.tokenizer.encode(held_out)))
    assert (decoded - held_out).square().mean() < 0.3 * errors[0]
