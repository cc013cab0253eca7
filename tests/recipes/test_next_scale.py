"""The training rules of VAR and MEPA by hand: whose class is dropped, and what the losses are sums of."""

import pytest
import torch
import torch.nn.functional as F

from megavar.config.recipes.mepa import MEPAConfig
from megavar.data.batch import Batch
from megavar.generators.base import GeneratorOutput
from megavar.parallel import seeds
from megavar.recipes.base import Losses, routing_metrics
from megavar.recipes.next_scale import NextScale
from tests.distributed.curves import CLASSES, SCALES, VOCABULARY

TOKENS = sum(side * side for side in SCALES)


class Distance:
    """A term: how far a tap is from what it should be, one value per image."""

    name, weight, taps = "distance", 0.3, ("block.1",)

    def head(self, space):
        return None

    def prepare(self, batch, inputs):
        return inputs.model.labels.float()

    def loss(self, tapped, output, targets):
        distances = (tapped["block.1"].mean((1, 2)) - targets).abs()
        return Losses(distances.sum(), {"squared": distances.square().sum()})


def recipe(pyramid, label_drop=0.0, label_smoothing=0.0, seed=3, terms=()):
    config = MEPAConfig(tokenizer_weights="unused", label_smoothing=label_smoothing)
    generator = torch.nn.Identity()
    return NextScale(config, generator, pyramid, classes=CLASSES, label_drop=label_drop, seed=seed, terms=terms)


def batch(samples, epoch=2):
    ids = torch.as_tensor(samples)
    tokens = seeds.random_bits(1, "tokens", ids[:, None], torch.arange(TOKENS)) % VOCABULARY
    return Batch(None, ids % CLASSES, ids, torch.full_like(ids, epoch), tokens=tokens)


def dropped(made, samples, epoch=2):
    labels = made.prepare(batch(samples, epoch), 0).model.labels
    kept = labels == torch.as_tensor(samples) % CLASSES
    assert torch.equal(labels[~kept], torch.full_like(labels[~kept], CLASSES)), "what is dropped becomes no class"
    return ~kept


@pytest.mark.parametrize("rate", [0.1, 0.25])
def test_classes_are_dropped_at_their_rate_by_seed_epoch_and_sample(pyramid, rate):
    samples, made = torch.arange(4000), recipe(pyramid, rate)
    first = dropped(made, samples)
    assert first.float().mean() == pytest.approx(rate, abs=4 * (rate * (1 - rate) / 4000) ** 0.5)
    expected = [float(seeds.uniform(3, "label_drop", 2, number)) < rate for number in range(50)]
    assert first[:50].tolist() == expected, "each sample by its own number, whatever is beside it"
    for other in (dropped(made, samples, epoch=3), dropped(recipe(pyramid, rate, seed=4), samples)):
        both = (first & other).float().mean()
        assert both == pytest.approx(rate**2, abs=0.02), "epochs and seeds are independent"


def test_nothing_or_everything_is_dropped_at_the_ends(pyramid):
    assert not dropped(recipe(pyramid, 0.0), torch.arange(100)).any()
    assert dropped(recipe(pyramid, 1.0), torch.arange(100)).all()


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_losses_are_sums_over_all_tokens(pyramid, single_process, label_smoothing):
    made, given = recipe(pyramid, label_smoothing=label_smoothing), batch([4, 7])
    logits = torch.randn(TOKENS, 2, VOCABULARY, generator=torch.Generator().manual_seed(0)).mul(3).transpose(0, 1)
    logits[0, :5].scatter_(1, given.tokens[0, :5, None], 99.0)  # five tokens of the first two scales are right
    inputs = made.prepare(given, 0)
    losses = made.loss(GeneratorOutput(logits), inputs)
    options = {"reduction": "none", "label_smoothing": label_smoothing}
    per_token = F.cross_entropy(logits.flatten(0, 1), given.tokens.flatten(), **options).view(2, TOKENS)
    torch.testing.assert_close(losses.total, per_token.sum())
    assert made.valid(given, 0) == 2 * TOKENS
    assert losses.per_image is None and set(losses.named) == {"loss", "accuracy"}
    torch.testing.assert_close(losses.named["loss"], per_token.sum())
    hits = logits.argmax(-1) == given.tokens
    assert hits.sum() >= 5 and losses.named["accuracy"] == hits.sum()
    start = 0
    for side in SCALES:
        part = slice(start, start := start + side * side)
        assert [count for _, count in (losses.means[f"{what}/scale_{side:02d}"] for what in ("loss", "accuracy"))] == [
            2 * side * side
        ] * 2
        torch.testing.assert_close(losses.means[f"loss/scale_{side:02d}"][0], per_token[:, part].sum())
        assert losses.means[f"accuracy/scale_{side:02d}"][0] == hits[:, part].sum()


def test_a_term_adds_its_weight_times_a_sum_over_images(pyramid, single_process):
    made, given = recipe(pyramid, terms=(Distance(),)), batch([4, 7, 9])
    logits, tap = torch.zeros(3, TOKENS, VOCABULARY), torch.arange(3.0)[:, None, None].expand(3, TOKENS, 6)
    losses = made.loss(GeneratorOutput(logits, {"block.1": tap}), made.prepare(given, 0))
    assert losses.per_image == pytest.approx(0.3 * (4 + 6 + 7))
    assert losses.total == pytest.approx(3 * TOKENS * torch.tensor(VOCABULARY).log().item())
    assert losses.means["loss/distance"] == (pytest.approx(17.0), 3)
    assert losses.means["distance/squared"] == (pytest.approx(16.0 + 36 + 49), 3)


def test_routing_is_logged_as_shares_and_means_over_passes():
    """Two blocks, two scales, three experts; the first block ran in four passes, the second in two."""
    load = torch.tensor([[[4.0, 0, 2], [2, 6, 2]], [[8, 0, 0], [0, 0, 0]]])
    statistics = {"load": load, "balance": torch.tensor([6.0, 5.0]), "passes": torch.tensor([4.0, 2.0])}
    found = routing_metrics(statistics, ("0", "1", "zero"))
    assert found == {
        "balance": pytest.approx((1.5 + 2.5) / 2),
        "expert_share/0": pytest.approx(14 / 24),
        "expert_share/1": pytest.approx(6 / 24),
        "expert_share/zero": pytest.approx(4 / 24),
        "expert_share/largest_in_a_layer": 1.0,
        "expert_share/smallest_in_a_layer": 0.0,
    }
    assert routing_metrics({}, ()) == {}
    # Of ten tokens two met no expert, five one and three two.
    met = {"met": torch.tensor([[[1, 2, 0], [0, 3, 1]], [[1, 0, 0], [0, 0, 2]]])}
    varying = routing_metrics(statistics | met, ("0", "1", "zero"))
    assert (varying["experts_per_token/mean"], varying["experts_per_token/none"]) == pytest.approx((1.1, 0.2))
    assert {name: varying[name] for name in found} == found
