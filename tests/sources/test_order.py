import pytest
import torch

from megavar.data.order import Order, micro_batch_positions, rank_batch_size
from megavar.errors import ConfigError


def test_every_epoch_visits_every_sample_once_in_its_own_order():
    order = Order(length=101, seed=3)
    epochs, indices = order.locate(0, 303)
    assert epochs.tolist() == [0] * 101 + [1] * 101 + [2] * 101
    for epoch in range(3):
        assert sorted(indices[epochs == epoch].tolist()) == list(range(101))
    assert not torch.equal(indices[:101], indices[101:202])


def test_any_window_equals_the_same_part_of_the_whole():
    order = Order(length=13, seed=0)
    epochs, indices = order.locate(0, 130)
    for start, stop in ((0, 1), (5, 13), (12, 14), (25, 80), (13, 26)):
        part_epochs, part_indices = Order(length=13, seed=0).locate(start, stop)
        assert torch.equal(part_epochs, epochs[start:stop])
        assert torch.equal(part_indices, indices[start:stop])


def test_seeds_give_different_orders_that_never_change():
    assert not torch.equal(Order(1000, 0).locate(0, 1000)[1], Order(1000, 1).locate(0, 1000)[1])
    # Resuming an old run depends on these numbers.
    assert Order(1000, 0).locate(0, 5)[1].tolist() == [658, 58, 177, 367, 481]


def test_orders_are_uniform():
    first = torch.stack([Order(8, seed).locate(0, 8)[1] for seed in range(2000)])
    for place in range(8):
        counts = torch.bincount(first[:, place], minlength=8)
        assert ((counts - 250) ** 2 / 250).sum() < 30  # chi-square, 7 degrees of freedom


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
def test_ranks_and_micro_batches_tile_the_step(ranks, micro_batch_size):
    ranges = [
        positions
        for rank in range(ranks)
        for positions in micro_batch_positions(
            5,
            global_batch_size=16,
            micro_batch_size=micro_batch_size,
            data_parallel_rank=rank,
            data_parallel_size=ranks,
        )
    ]
    assert [position for start, stop in ranges for position in range(start, stop)] == list(range(80, 96))


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(ConfigError, match="multiple of 12"):
        rank_batch_size(global_batch_size=16, micro_batch_size=4, data_parallel_size=3)
