"""Fixtures shared by all tests."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_BUILD_OPS", "0")
os.environ.setdefault("WANDB_MODE", "offline")

from collections.abc import Iterator

import pytest
import torch

torch.set_num_threads(1)


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
    """One worker runs a file from its first test to its last, and all that need the real Slurm, after everything else.

    These wait most of the time, for processes that should not have to share two cores with other tests.
    """
    items.sort(key=_needs_slurm)
    for item in items:
        item.add_marker(pytest.mark.xdist_group("slurm" if _needs_slurm(item) else str(item.path)))


def _needs_slurm(item: pytest.Item) -> bool:
    return item.path.parent.name == "slurm"
