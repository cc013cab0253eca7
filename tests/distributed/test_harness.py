import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist

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


FAKE_BEFORE_REAL = """
import os, sys, torch
from torch._subclasses import FakeTensorMode

def backward():
    torch.ones(1, requires_grad=True).sum().backward()

with FakeTensorMode():
    torch.ones(1)
backward()
child = os.fork()
if child == 0:
    try:
        backward()
    except RuntimeError as error:
        os._exit(7 if "fork" in str(error) else 8)
    os._exit(0)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there autograd has threads in any case")
@pytest.mark.parametrize(("before", "code"), [("", 7), ("import tests.conftest", 0)])
def test_ranks_can_run_a_backward_whatever_file_comes_first(before, code):
    """The first case is why tests/conftest.py runs a backward when it is imported."""
    assert subprocess.run([sys.executable, "-c", f"{before}\n{FAKE_BEFORE_REAL}"], check=False).returncode == code
