import time

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.distributed.harness import RankFailure, run_ranks


def _sum(offset):
    value = torch.tensor(float(dist.get_rank() + offset))
    dist.all_reduce(value)
    return value


def _one_raises():
    if dist.get_rank() == 1:
        raise ValueError("planted")
    dist.barrier()


def _one_hangs():
    if dist.get_rank() == 0:
        time.sleep(60)


def test_results_come_back_in_rank_order():
    assert [value.item() for value in run_ranks(2, _sum, 10)] == [21.0, 21.0]
    assert run_ranks(3, dist.get_rank) == [0, 1, 2]


def test_the_first_traceback_and_its_rank_reach_the_test():
    with pytest.raises(RankFailure, match=r"rank 1 of 2 raised(.|\n)*planted"):
        run_ranks(2, _one_raises)


def test_a_hanging_rank_is_ended_and_its_stack_shown():
    with pytest.raises(RankFailure, match="_one_hangs"):
        run_ranks(2, _one_hangs, timeout=1.5)


def _gradient():
    value = torch.ones(3, requires_grad=True)
    value.square().sum().backward()
    return value.grad.tolist()


def test_ranks_compute_gradients_after_a_backward_of_fake_tensors():
    """In whatever order test files run (see tests/conftest.py)."""
    with FakeTensorMode():
        torch.ones(3, requires_grad=True).sum().backward()
    assert run_ranks(1, _gradient) == [[2.0, 2.0, 2.0]]
