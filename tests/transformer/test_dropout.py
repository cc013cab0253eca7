"""Dropout is a function of what it drops, and drops what it should."""

import pytest
import torch

from megavar.parallel import seeds
from megavar.transformer.context import ForwardContext
from megavar.transformer.dropout import dropout, prepare_dropout
from megavar.transformer.sequence import SequenceLayout

ROWS, CHANNELS = 64, 50


def dropped(keys, *, rows=ROWS, channels=CHANNELS, seed=0, stream="a", block=0, rate=0.25, first=0):
    context = ForwardContext(SequenceLayout((rows,)), seed=seed, sample_keys=torch.tensor(keys))
    ones = torch.ones(rows, len(keys), channels)
    prepare_dropout(context, stream, block, block + 2, rate)
    return dropout(ones, context, stream=stream, rate=rate, first_channel=first)


def test_the_mean_stays_and_every_place_draws_anew():
    masks = [
        dropped([3, 8, 9]), dropped([3, 8, 9], seed=1), dropped([3, 8, 9], stream="b"), dropped([3, 8, 9], block=1),
        dropped([4, 7, 1]),
    ]  # fmt: skip
    for mask in masks:
        assert mask.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
        assert mask.mean() == pytest.approx(1.0, abs=0.03)
        for dimension in range(3):  # no row, sample or channel is special
            assert (mask.mean([d for d in range(3) if d != dimension]) - 1).abs().max() < 0.25
    neighbours = [masks[0].roll(1, dimension) for dimension in (0, 2)]
    flat = torch.stack([mask.flatten() for mask in masks + neighbours])
    assert torch.corrcoef(flat).fill_diagonal_(0).abs().max() < 0.05


def test_a_sample_drops_the_same_elements_in_any_batch():
    together = dropped([3, 8, 9])
    assert torch.equal(dropped([9, 3]), together[:, [2, 0]])


@pytest.mark.parametrize(("first", "count"), [(0, 50), (0, 25), (25, 25), (3, 5), (49, 1)])
def test_any_share_of_the_channels_drops_its_part(first, count):
    assert torch.equal(dropped([3, 8], channels=count, first=first), dropped([3, 8])[..., first : first + count])


def test_without_samples_or_rate_nothing_is_dropped():
    hidden = torch.randn(4, 2, 3)
    context = ForwardContext(SequenceLayout((4,)))
    prepare_dropout(context, "a", 0, 1, 0.5)
    assert dropout(hidden, context, stream="a", rate=0.5) is hidden
    context.sample_keys = torch.arange(2)
    prepare_dropout(context, "a", 0, 1, 0.0)
    assert dropout(hidden, context, stream="a", rate=0.0) is hidden


def test_nothing_comes_through_a_rate_of_almost_one():
    assert (dropped([1], rate=0.999999) > 0).float().mean() < 1e-3


def test_types_stay():
    context = ForwardContext(SequenceLayout((4,)), sample_keys=torch.arange(2))
    prepare_dropout(context, "a", 0, 1, 0.5)
    for dtype in (torch.float32, torch.bfloat16):
        assert dropout(torch.ones(4, 2, 3, dtype=dtype), context, stream="a", rate=0.5).dtype == dtype


def test_lanes_are_uniform_and_any_range_is_a_part_of_the_whole():
    numbers = seeds.lanes(torch.tensor([[1], [2]]), 0, 40000).float().flatten()
    assert abs(numbers.mean()) < 150 and abs(numbers.std() - 65536 / 12**0.5) < 150
    bits = torch.tensor([5, -9])
    assert torch.equal(seeds.lanes(bits, 6, 11), seeds.lanes(bits, 0, 40)[:, 6:17])


def test_bits_are_those_of_a_draw_with_all_keys_at_once():
    """Blocks start their draws together; each element still depends on (seed, stream, block, sample, position)."""
    position = torch.arange(ROWS)[:, None]
    bits = seeds.random_bits(5, "a", 3, torch.tensor([[3, 8, 9]]), position)
    kept = seeds.lanes(bits, 0, CHANNELS) >= round(0.25 * 65536) - 32768
    assert torch.equal(dropped([3, 8, 9], seed=5, block=3) > 0, kept)
