"""AliTok's stages and phases: losses, what is trained when, codes that move, and that it learns."""

import math
from itertools import pairwise

import pytest
import torch

from megavar.config.recipes.alitok import RELEASED, AliTokTrainingConfig, PhaseConfig
from megavar.config.recipes.tokenizer import AdversarialConfig
from megavar.errors import CheckpointError, ConfigError
from megavar.frozen import check_usable
from megavar.recipes.tokenizer.alitok import AliTokTraining, Timetable
from megavar.recipes.tokenizer.clustering import ClusteredCodebook
from megavar.tokenizers.alitok import AliTok
from megavar.tokenizers.line import LineQuantizer
from tests.distributed.harness import run_ranks
from tests.recipes.digit_images import digit_batch, digit_images
from tests.recipes.line_tokenizers import ALITOK, CPU, PHASES, STAGED, staged, write_rows
from tests.recipes.test_tokenizer import means


def test_the_released_phases_share_the_run() -> None:
    timetable = Timetable(RELEASED, 650_000)
    assert timetable.ends == [50_000, 250_000, 350_000, 400_000, 550_000, 650_000]
    assert timetable.second_stage == 350_000
    assert Timetable(RELEASED, 650).ends == [50, 250, 350, 400, 550, 650]
    made = AliTokTraining(AliTokTrainingConfig(), ALITOK, 0, CPU, steps=650)
    rates = [made.rate_factor(step) for step in (0, 49, 50, 150, 249, 250, 349, 350, 649)]
    expected = [1, 1, 1, math.sqrt(0.2), 0.2, 0.2, 0.02, 1, 0.02]
    assert rates == pytest.approx(expected, rel=0.03)
    assert not made.active("discriminator", 300), "none is configured"


def test_phases_say_what_is_trained_and_heard() -> None:
    made = staged(40)
    assert [made.active("discriminator", step) for step in (0, 9, 10, 19, 20, 30, 39)] == [
        False, False, True, True, False, True, True,
    ]  # fmt: skip
    rules = {name: made.rule("autoencoder", name) for name, _ in made.tokenizer.named_parameters()}
    for name, rule in rules.items():
        of_result = name.startswith("decoder.")
        assert (rule.first_step, rule.end_step) == ((20, math.inf) if of_result else (0, 20)), name
    assert rules["encoder.transformer.0.mlp.c_fc.weight"].decays and not rules["quantize.embedding.weight"].decays
    only = AliTokTrainingConfig(phases=PHASES[:1])
    assert staged(8, only).rule("autoencoder", "decoder.ln_pre.weight").frozen


def test_losses_of_both_stages() -> None:
    """In [0, 1] as the authors compute them: l2_weight 0.25."""
    made = staged(40, STAGED.model_copy(update={"l2_weight": 0.25}))
    images, model = digit_images(0, 4), made.tokenizer
    first = means(made, digit_batch(0, 4), "autoencoder", 0)
    line = model.quantize(model.vectors(images))
    picture = model.heads["causal_decoder"](line.features)
    target = (images + 1) / 2
    row = torch.cat([target[:, :, :4, :4], target[:, :, :4, :]], -1)
    assert picture.strip.shape == row.shape == (4, 3, 4, 20)
    pixels, strip = (picture.images - target).square().mean(), (picture.strip - row).square().mean()
    expected = pixels + 10 * 5 / 16 * strip + line.commitment + line.codebook
    torch.testing.assert_close(first.total, expected)
    first.total.backward()
    assert all((p.grad is None) == name.startswith("decoder.") for name, p in model.named_parameters())
    model.zero_grad()
    second = means(made, digit_batch(0, 4), "autoencoder", 20)
    torch.testing.assert_close(
        second.total, (model.decoder(line.features).images - target).square().mean() + line.commitment + line.codebook
    )
    second.total.backward()
    assert all((p.grad is not None) == name.startswith("decoder.") for name, p in model.named_parameters())


def test_causal_decoding_makes_tokens_help_those_after_them_only() -> None:
    made = staged(40)
    with torch.no_grad():
        for parameter in made.tokenizer.parameters():
            parameter.mul_(8 if parameter.ndim > 1 else 1)  # so that nothing is rounded away
    made.passes("autoencoder", 0)
    ids = torch.randint(0, 64, (1, 21), generator=torch.Generator().manual_seed(0))
    other = ids.clone()
    other[:, 13] = (other[:, 13] + 7) % 64  # token 8 of the grid: third row, first column
    changed = [(made.tokenizer.decode(ids) != made.tokenizer.decode(other)).any((0, 1))]
    made.passes("autoencoder", 20)
    changed.append((made.tokenizer.decode(ids) != made.tokenizer.decode(other)).any((0, 1)))
    assert not changed[0][:8].any() and changed[0][8:].float().mean() > 0.9
    assert changed[1].float().mean() > 0.9


def clustered(rank: int, world: int) -> list[torch.Tensor]:
    """The codes after each of three steps on this rank's samples, in micro-batches."""
    quantizer = LineQuantizer(3, 6, 2, normalized=False, commitment_weight=0.25)
    torch.nn.init.normal_(quantizer.embedding.weight, generator=torch.Generator().manual_seed(1))
    upkeep, codes = ClusteredCodebook(quantizer, 0.99), [quantizer.embedding()]
    for step in range(3):
        own = vectors_of(step).chunk(world)[rank]
        for part in own.split(1):
            upkeep.observe(step, quantizer.watched(quantizer(part)), torch.arange(1))
        moved = upkeep.after_step(step)
        assert moved is not None
        write_rows(quantizer.embedding.weight, *moved)
        codes.append(quantizer.embedding())
    return codes


def vectors_of(step: int) -> torch.Tensor:
    return torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(step))


def clustered_here() -> list[torch.Tensor]:
    return clustered(torch.distributed.get_rank(), 2)


@pytest.mark.distributed
def test_clustered_codes_by_brute_force() -> None:
    """On one rank and on two."""
    for found in (clustered(0, 1), *run_ranks(2, clustered_here)):
        share = torch.zeros(6)
        for step, (codes, moved) in enumerate(pairwise(found)):
            flat = vectors_of(step).flatten(0, 1)
            share = 0.99 * share + 0.01 * torch.bincount(torch.cdist(flat, codes).argmin(1), minlength=6) / 12
            for v in range(6):
                move = math.exp(-float(share[v]) * 6 * 10 / (1 - 0.99) - 1e-3)
                nearest = flat[(flat - codes[v]).norm(dim=1).argmin()]
                torch.testing.assert_close(moved[v], (1 - move) * codes[v] + move * nearest, atol=1e-5, rtol=1e-4)


def test_it_learns_and_stage_two_keeps_the_tokens() -> None:
    steps, made = 80, staged(80)
    groups = {kind: [p for n, p in made.tokenizer.named_parameters() if n.startswith("decoder.") == (kind == "second")]
              for kind in ("first", "second")}  # fmt: skip
    optimizers = {kind: torch.optim.AdamW(group, weight_decay=0) for kind, group in groups.items()}
    held_out, errors, tokens = digit_images(1000, 32), {}, []
    for step in range(steps):
        kind = "first" if made.phase(step).stage == 1 else "second"
        optimizers[kind].param_groups[0]["lr"] = 5e-3 * made.rate_factor(step)
        optimizers[kind].zero_grad()
        losses = means(made, digit_batch(16 * step % 512, 16), "autoencoder", step)
        losses.total.backward()
        optimizers[kind].step()
        made.after_step(step, write_rows)
        errors.setdefault(kind, []).append(float(losses.named["squared_error"]))
        if step in (39, 79):
            tokens.append(made.tokenizer.tokens(made.tokenizer.encode(held_out)))
    for kind, curve in errors.items():
        assert sum(curve[-5:]) < 0.6 * sum(curve[:5]), kind
    assert torch.equal(tokens[0], tokens[1]) and len(tokens[0].unique()) > 4
    result = AliTok(ALITOK)
    result.trained_stage.fill_(1)
    with pytest.raises(CheckpointError, match="in which images are made by the causal"):
        check_usable(result)
    result.load_state_dict({n: v for n, v in made.tokenizer.state_dict().items() if not n.startswith("heads.")})
    check_usable(result)
    assert torch.equal(result.decode(tokens[1]), made.tokenizer.decode(tokens[1]))
    assert (result.decode(tokens[1]) - held_out).square().mean() < 0.4


def test_contradictions_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"adaptive balances gradients at a last 3x3 convolution"):
        staged(8, AliTokTrainingConfig(adversarial=AdversarialConfig(layers=2, base_channels=8, norm_groups=4)))
    with pytest.raises(ConfigError, match=r"Set tokenizer\.prefix=5, or recipe\.strip_weight=0"):
        AliTokTraining(STAGED, ALITOK.model_copy(update={"prefix": 3}), 0, CPU, steps=8)
    with pytest.raises(ValueError, match="all phases of stage 1 come before"):
        AliTokTrainingConfig(phases=(PhaseConfig(length=1, stage=2), PhaseConfig(length=1, stage=1)))
