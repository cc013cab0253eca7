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


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """One worker runs a file from its first test to its last.

    One also runs all folders that fork up to four ranks in most of their tests: two such tests at once have too few
    cores. Another runs what needs the real Slurm, after everything else, because its jobs are timed.
    """
    items.sort(key=lambda item: _group(item) == "slurm")
    for item in items:
        item.add_marker(pytest.mark.xdist_group(_group(item)))


def _group(item: pytest.Item) -> str:
    return {"checkpoint": "ranks", "distributed": "ranks", "slurm": "slurm"}.get(item.path.parent.name, str(item.path))
