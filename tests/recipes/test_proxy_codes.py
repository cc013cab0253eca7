"""TiTok's two stages: predict the codes of a VQGAN, then fine-tune the decoder on pixels."""

import pytest
import torch
import torch.nn.functional as F

from megavar.config.recipes.tokenizer import TokenizerTrainingConfig
from megavar.errors import ConfigError
from megavar.recipes.tokenizer.recipe import TokenizerTraining
from tests.recipes.digit_images import TOKENIZER, digit_batch, digit_images
from tests.recipes.line_tokenizers import CPU, TITOK, VECTORS, first_stage, proxy, write_rows
from tests.recipes.test_tokenizer import means


def test_the_loss_is_the_cross_entropy_of_the_proxys_codes() -> None:
    made, batch = first_stage(quantizer_weight=2.0), digit_batch(0, 6)
    losses = means(made, batch, "autoencoder", 0)
    model, images = made.tokenizer, digit_images(0, 6)
    codes = proxy().tokens(proxy().encode(images))
    assert len(codes.unique()) > 4, "the proxy tells places apart"
    line = model.quantize(model.vectors(images))
    logits = model.decoder(line.features).flatten(2)
    brute = torch.stack([-logits[b, :, i].log_softmax(0)[codes[b, i]] for b in range(6) for i in range(16)]).mean()
    torch.testing.assert_close(losses.named["cross_entropy"], brute.detach())
    torch.testing.assert_close(losses.total, brute + 2 * (line.commitment + line.codebook))
    losses.total.backward()
    for name, parameter in model.named_parameters():
        frozen = made.rule("autoencoder", name).frozen
        assert frozen == name.startswith(("pixel_decoder.", "pixel_quantize."))
        assert frozen == (parameter.grad is None), name


def test_the_proxys_decoder_and_codes_are_the_tokenizers_from_the_start() -> None:
    """Whose own codes, given to its decoder, make the proxy's image."""
    model, codes = first_stage().tokenizer, proxy().tokens(proxy().encode(digit_images(0, 2)))
    certain = 100.0 * F.one_hot(codes.unflatten(1, (4, 4)), 16).permute(0, 3, 1, 2)
    made = model.pixel_decoder(model.pixel_quantize(certain))
    torch.testing.assert_close((2 * made - 1).clamp(-1, 1), proxy().decode(codes))


def test_both_stages_learn() -> None:
    """Codes first; then pixels, with tokens that do not change."""
    made = first_stage()
    optimizer = torch.optim.AdamW(made.tokenizer.parameters(), lr=3e-3, betas=(0.9, 0.99), weight_decay=0)
    errors = []
    for step in range(60):
        losses = means(made, digit_batch(16 * step % 512, 16), "autoencoder", step)
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
        errors.append(float(losses.named["cross_entropy"]))
    assert sum(errors[-5:]) < 0.75 * sum(errors[:5])
    second = TokenizerTraining(TokenizerTrainingConfig(trained="decoder", l2_weight=0.25), TITOK, 0, CPU, fresh=False)
    second.tokenizer.load_state_dict(made.tokenizer.state_dict())
    held_out = digit_images(1000, 16)
    tokens, before = second.tokenizer.tokens(second.tokenizer.encode(held_out)), error(second, held_out)
    for name, parameter in second.tokenizer.named_parameters():
        parameter.requires_grad_(not second.rule("autoencoder", name).frozen)
    trained = [parameter for parameter in second.tokenizer.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-3, weight_decay=0)
    for step in range(30):
        optimizer.zero_grad()
        means(second, digit_batch(16 * step % 512, 16), "autoencoder", step).total.backward()
        optimizer.step()
        second.after_step(step, write_rows)
    assert torch.equal(second.tokenizer.tokens(second.tokenizer.encode(held_out)), tokens)
    assert error(second, held_out) < 0.6 * before


def error(made: TokenizerTraining, images: torch.Tensor) -> float:
    decoded = made.tokenizer.decode(made.tokenizer.tokens(made.tokenizer.encode(images)))
    return float((decoded - images).square().mean())


def test_what_cannot_be_trained_so_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"trains VQ tokenizers by reconstruction, and tokenizer\.name=titok is"):
        TokenizerTraining(TokenizerTrainingConfig(), VECTORS, 0, CPU)


def test_the_second_stage_of_any_tokenizer_keeps_its_tokens() -> None:
    made = TokenizerTraining(TokenizerTrainingConfig(trained="decoder"), TOKENIZER, 0, CPU)
    trained = {name.split(".")[0] for name, _ in made.tokenizer.named_parameters()
               if not made.rule("autoencoder", name).frozen}  # fmt: skip
    assert trained == {"decoder", "post_quant_conv"}
    means(made, digit_batch(0, 4), "autoencoder", 0)
    made.after_step(0, lambda *rows: pytest.fail("no code is replaced"))
