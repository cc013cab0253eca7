import math

import pytest
import torch

from megavar.config.recipes.tokenizer import CodebookConfig
from megavar.parallel.seeds import random_bits
from megavar.recipes.tokenizer.codebook import CodebookUpkeep, _quotas, usage_metrics
from megavar.tokenizers.multiscale_vq import MultiScaleQuantizer
from tests.distributed.harness import run_ranks
from tests.recipes.digit_images import TOKENIZER

CONFIG = CodebookConfig(revive_every=2, draw_from_data=False, usage_decay=0.5)
SAMPLES = 8


def quantizer() -> MultiScaleQuantizer:
    torch.manual_seed(0)
    made = MultiScaleQuantizer(TOKENIZER)
    torch.nn.init.normal_(made.embedding.weight)
    made.embedding.weight.data[20:] += 1000  # twelve codes that nothing is near to
    return made


def features(step: int) -> torch.Tensor:
    return torch.randn(SAMPLES, 8, 4, 4, generator=torch.Generator().manual_seed(step))


def run(rank: int, world: int, micro_batches: int, config: CodebookConfig, *, fresh: bool = False, steps: int = 4):
    """Some steps on this rank's part of the batch: codebook, usage averages and last replacement."""
    made = quantizer()
    upkeep = CodebookUpkeep(config, made, seed=7, fresh=fresh)
    replacement = None
    for step in range(steps):
        mine = torch.arange(SAMPLES).chunk(world)[rank]
        for part in mine.chunk(micro_batches):
            upkeep.observe(step, made(features(step)[part]), random_bits(7, "sample", part))
        replacement = upkeep.after_step(step)
        if replacement is not None:
            with torch.no_grad():
                made.embedding.weight[replacement.rows] = replacement.vectors
    return made.embedding.weight.detach(), made.ema_vocab_hit_SV, replacement


def on_this_rank(world: int, micro_batches: int, config: CodebookConfig, fresh: bool):
    return run(torch.distributed.get_rank(), world, micro_batches, config, fresh=fresh)


def test_dead_codes_take_vectors_of_the_batch_and_live_ones_stay():
    made = quantizer()
    before = made.embedding.weight.detach().clone()
    upkeep = CodebookUpkeep(CONFIG, made, seed=7, fresh=False)
    hits = torch.zeros(32)
    for step in range(2):
        output = made(features(step))
        upkeep.observe(step, output, torch.arange(SAMPLES))
        replacement = upkeep.after_step(step)
        assert (replacement is None) == (step == 0)
        hits = hits + output.usage.sum(0)
    unused = set((hits < 0.1 * hits.mean()).nonzero().flatten().tolist())
    assert set(range(20, 32)) <= set(replacement.rows.tolist())
    assert torch.equal(made.embedding.weight, before)  # writing is the caller's
    vectors = output.targets.reshape(-1, 8)
    same = (replacement.vectors[:, None] == vectors).all(-1)
    assert same.any(1).all()
    assert len(set(same.int().argmax(1).tolist())) == len(replacement.rows)  # no vector twice
    assert {row for row in replacement.rows.tolist() if row < 20} <= unused


def test_revived_codes_come_evenly_from_all_scales_and_are_used():
    made = quantizer()
    upkeep = CodebookUpkeep(CONFIG, made, seed=7, fresh=False)
    for step in (0, 1):
        output = made(features(step))
        upkeep.observe(step, output, torch.arange(SAMPLES))
        replacement = upkeep.after_step(step)
    nearest = torch.cdist(replacement.vectors, output.targets.reshape(-1, 8)).argmin(1) % 21
    scale = torch.bucketize(nearest, torch.tensor([1, 5]), right=True)
    counts = torch.bincount(scale, minlength=3)
    assert counts.max() - counts.min() <= 1
    with torch.no_grad():
        made.embedding.weight[replacement.rows] = replacement.vectors
    assert made(features(1)).usage.sum(0)[20:].any()


def test_a_remainder_goes_to_the_scale_whose_turn_it_is_and_a_shortage_to_the_finer_ones():
    assert [_quotas(8, [9, 9, 9], first) for first in range(3)] == [[3, 3, 2], [2, 3, 3], [3, 2, 3]]
    assert _quotas(9, [1, 9, 9], 0) == [1, 5, 3] and _quotas(9, [1, 2, 3], 0) == [1, 2, 3]


def test_revived_codes_get_time_to_prove_themselves():
    made = quantizer()
    upkeep = CodebookUpkeep(CONFIG, made, seed=7, fresh=False)
    for step in (0, 1):
        upkeep.observe(step, made(features(step)), torch.arange(SAMPLES))
        replacement = upkeep.after_step(step)
    hits = made.ema_vocab_hit_SV.sum(0)
    assert (hits[replacement.rows] > CONFIG.dead_below * hits.mean()).all()


def test_usage_average():
    made = quantizer()
    upkeep = CodebookUpkeep(CodebookConfig(revive_every=0, usage_decay=0.75), made, seed=7, fresh=False)
    usage = [made(features(step)).usage for step in range(3)]
    for step in range(3):
        upkeep.observe(step, made(features(step)), torch.arange(SAMPLES))
        assert upkeep.after_step(step) is None
    expected = 0.75 * (0.75 * usage[0] + 0.25 * usage[1]) + 0.25 * usage[2]
    assert torch.allclose(made.ema_vocab_hit_SV, expected)


def test_fresh_codebook_is_drawn_from_the_first_batch_only_once():
    config = CodebookConfig(revive_every=0)
    made = quantizer()
    upkeep = CodebookUpkeep(config, made, seed=7, fresh=True)
    upkeep.observe(0, made(features(0)), torch.arange(SAMPLES))
    assert upkeep.after_step(0).rows.tolist() == list(range(32))
    upkeep.observe(1, made(features(1)), torch.arange(SAMPLES))
    assert upkeep.after_step(1) is None
    loaded = CodebookUpkeep(config, quantizer(), seed=7, fresh=False)
    loaded.observe(0, made(features(0)), torch.arange(SAMPLES))
    assert loaded.after_step(0) is None


def test_more_dead_codes_than_vectors_leaves_the_rest_alone():
    made = quantizer()
    upkeep = CodebookUpkeep(CodebookConfig(), made, seed=7, fresh=True)
    upkeep.observe(0, made(features(0)[:1]), torch.arange(1))
    rows = upkeep.after_step(0).rows
    assert len(set(rows.tolist())) == len(rows) == 1 + 4 + 16


def test_no_revival_after_its_end_and_none_from_vectors_that_are_not_finite():
    config = CodebookConfig(revive_every=1, revive_until=1, draw_from_data=False)
    made = quantizer()
    upkeep = CodebookUpkeep(config, made, seed=7, fresh=False)
    upkeep.observe(0, made(features(0) * math.nan), torch.arange(SAMPLES))
    assert upkeep.after_step(0) is None
    upkeep.observe(1, made(features(1)), torch.arange(SAMPLES))
    assert upkeep.after_step(1) is None


@pytest.mark.parametrize("fresh", [False, True])
def test_micro_batches_do_not_matter(fresh):
    config = CONFIG.model_copy(update={"draw_from_data": fresh})
    codes, usage, _ = run(0, 1, 1, config, fresh=fresh)
    split_codes, split_usage, _ = run(0, 1, 4, config, fresh=fresh)
    assert torch.equal(codes, split_codes)
    assert torch.equal(usage, split_usage)


@pytest.mark.distributed
@pytest.mark.parametrize("world", [2, 4])
def test_ranks_do_not_matter(world):
    config = CONFIG.model_copy(update={"draw_from_data": True, "dead_below": 0.5})
    codes, usage, last = run(0, 1, 1, config, fresh=True)
    for other_codes, other_usage, other_last in run_ranks(world, on_this_rank, world, 2, config, True):
        assert torch.allclose(codes, other_codes, atol=1e-6)
        assert torch.equal(usage, other_usage)
        assert torch.equal(last.rows, other_last.rows)


def copies_on_two_ranks():
    """Both ranks hold all samples, as under tensor parallelism."""
    return run(0, 1, 1, CONFIG)


@pytest.mark.distributed
def test_ranks_that_hold_copies_do_not_change_the_draw():
    codes, _, _ = run(0, 1, 1, CONFIG)
    for other, _, _ in run_ranks(2, copies_on_two_ranks):
        assert torch.equal(codes, other)


def test_usage_metrics():
    usage = torch.zeros(2, 4)
    usage[0, 1] = 6  # collapsed
    usage[1] = torch.tensor([1.0, 1.0, 2.0, 0.0])
    metrics = usage_metrics(usage, ("scale_01", "scale_02"))
    assert metrics["perplexity/scale_01"] == pytest.approx(1)
    assert metrics["perplexity/scale_02"] == pytest.approx(2**1.5)
    assert metrics["codes_used/scale_01"] == 0.25
    assert metrics["codes_used/scale_02"] == 0.75
    assert metrics["codes_used/all_scales"] == 0.75
    assert metrics["perplexity/all_scales"] == pytest.approx(math.exp(0.1 * math.log(10) + 0.7 * math.log(10 / 7)
                                                                      + 0.2 * math.log(5)))  # fmt: skip
