"""Metrics between two log lines: means over items, however they are spread over micro-batches, steps and ranks."""

import pytest
import torch
import torch.distributed as dist

from megavar.config.parallel import ParallelConfig
from megavar.parallel import topology
from megavar.parallel.environment import environment
from megavar.recipes.base import Losses
from megavar.training.metrics import MetricAccumulator
from megavar.training.step import valid_of_step
from tests.distributed.harness import run_ranks


def scalar(value):
    return torch.tensor(float(value))


def uneven():
    mesh = topology.initialize(ParallelConfig(), environment())
    metrics = MetricAccumulator()
    rank = dist.get_rank()
    # Rank 0: 1 item worth 5, then 3 items worth 6 in all; rank 1: nothing, then 2 items worth 11.
    for total, count in (((5, 1), (6, 3)), ((0, 0), (11, 2)))[rank]:
        means = {"of two": (scalar(total), 2), "of none": (scalar(0), torch.tensor(0))}
        statistics = {"seen": torch.tensor([1, count])}
        metrics.add(Losses(scalar(0), {"loss": scalar(total)}, statistics, means), torch.tensor(count))
    values, statistics = metrics.reduce({"own": torch.tensor([rank + 1.0])})
    again, _ = metrics.reduce({})
    total = valid_of_step([torch.tensor(1), torch.tensor(3)] if rank == 0 else [torch.tensor(0), torch.tensor(2)], mesh)
    return values, {name: value.tolist() for name, value in statistics.items()}, again, float(total)


def test_every_item_weighs_the_same():
    for values, statistics, again, total in run_ranks(2, uneven):
        assert values == {"loss": pytest.approx(22 / 6), "of two": pytest.approx(22 / 8)}
        assert statistics == {"seen": [4.0, 6.0], "own": [3.0]}
        assert again == {}, "what has been read is forgotten"
        assert total == 6


def even():
    mesh = topology.initialize(ParallelConfig(), environment())
    assert valid_of_step([torch.tensor(0)], mesh) == 1, "a step without valid items divides by 1"
    with pytest.raises(AssertionError, match="an int says the same for every micro-batch"):
        valid_of_step([3, 4], mesh)
    # No collective: the other rank does not take part.
    return valid_of_step([6, 6, 6], mesh) if dist.get_rank() == 0 else None


def test_equal_numbers_need_no_exchange():
    assert run_ranks(2, even) == [36, None]
