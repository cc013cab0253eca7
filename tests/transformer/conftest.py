"""Fixtures of the tests of blocks and experts."""

import gc
from collections.abc import Iterator

import pytest

from megavar.config.parallel import ParallelConfig
from megavar.parallel import topology
from megavar.parallel.environment import Environment


@pytest.fixture(scope="module")
def one_process() -> Iterator[None]:
    """Process groups of one rank for all tests of a module (``single_process`` makes new ones for every test)."""
    topology.initialize(ParallelConfig(), Environment(0, 1, 0, "single"))
    yield
    topology.shutdown()
    gc.collect()  # models hold groups, too, and a process forked later must not be the one to destroy them
