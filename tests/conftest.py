"""Fixtures shared by all tests."""

import os
import random

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_BUILD_OPS", "0")
os.environ.setdefault("WANDB_MODE", "offline")

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests import leftovers

torch.set_num_threads(1)
# Entering FakeTensorMode (planning) makes torch believe in a CUDA device. If a process has its first backward after it,
# autograd starts threads for the device, and no process that is forked later can run a backward ("Unable to handle
# autograd's threading in combination with fork-based multiprocessing"): a test of planning and one with a backward
# would break all tests on ranks after them. So the first backward is here. tests/distributed/test_harness.py shows it.
torch.ones(1, requires_grad=True).sum().backward()


@pytest.fixture(autouse=True, scope="module")
def own_environment() -> Iterator[None]:
    """What a file's tests leave in the environment ends with them: ranks, W&B's service, ..."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(autouse=True, scope="module")
def nothing_left_behind(own_environment: None) -> Iterator[None]:
    """A file that changes its process for the files after it is an error of that file, in any order of files."""
    before = leftovers.state()
    yield
    left = leftovers.differences(before, leftovers.state())
    assert not left, "this file leaves behind " + "; ".join(left)


@pytest.fixture
def single_process() -> Iterator[None]:
    """Process groups of one rank, destroyed afterwards so that forked ranks inherit none."""
    from megavar.config.parallel import ParallelConfig
    from megavar.parallel import topology
    from megavar.parallel.environment import Environment

    topology.initialize(ParallelConfig(), Environment(0, 1, 0, "single"))
    yield
    topology.shutdown()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Large files first, so that both workers end together; last what needs the real Slurm, whose jobs are timed.

    ``MEGAVAR_TEST_ORDER=7`` puts the files into another order, which follows from the number.
    """
    seed = os.environ.get("MEGAVAR_TEST_ORDER")
    files = sorted({item.path for item in items})
    if seed is not None:
        random.Random(seed).shuffle(files)
    size_of = Counter(item.path for item in items) if seed is None else Counter[Path]()
    place = {path: number for number, path in enumerate(files)}
    items.sort(key=lambda item: (item.path.parent.name == "slurm", -size_of[item.path], place[item.path]))
