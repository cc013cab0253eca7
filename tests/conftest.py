"""Fixtures shared by all tests."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_BUILD_OPS", "0")
os.environ.setdefault("WANDB_MODE", "offline")

from collections import Counter
from collections.abc import Iterator

import pytest
import torch

torch.set_num_threads(1)
# A process whose first backward is one of fake tensors (planning) starts autograd's device threads, and no process that
# is forked from it later can run a backward ("Unable to handle autograd's threading in combination with fork-based
# multiprocessing"). So the first one is real, whatever file comes first. tests/distributed/test_harness.py shows it.
torch.ones(1, requires_grad=True).sum().backward()


@pytest.fixture(autouse=True, scope="module")
def own_environment() -> Iterator[None]:
    """What a file's tests leave in the environment ends with them: ranks, W&B's service, ..."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


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
    """Large files first, so that both workers end together; last what needs the real Slurm, whose jobs are timed."""
    size_of = Counter(item.path for item in items)
    items.sort(key=lambda item: (item.path.parent.name == "slurm", -size_of[item.path]))
