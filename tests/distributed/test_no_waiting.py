"""The passes of a training step wait for no device, in any layout whose experts are not spread over ranks.

Megatron-core's dispatchers read on the host how many tokens travel to other ranks. What DeepSpeed does in ``step`` is
its own: it reads the gradient norm.
"""

import pytest

from megavar.config.parallel import ParallelConfig
from megavar.parallel import topology
from megavar.parallel.environment import environment
from megavar.training.engine import Engine
from tests.distributed import curves
from tests.distributed.curves import Setup
from tests.distributed.harness import run_ranks
from tests.transformer.test_no_waiting import Waits

pytestmark = pytest.mark.distributed


def waits_of_engine(setup):
    """Of all passes of a training step on this rank, through Megatron-core's schedules and DeepSpeed's hooks."""
    mesh = topology.initialize(ParallelConfig(**setup.parallel), environment())
    loop, mode, run = curves.engine_loop(setup, curves.build(setup, mesh), mesh), Waits(), Engine.run

    def watched(self, *arguments, **options):
        with mode:
            return run(self, *arguments, **options)

    Engine.run = watched  # in a process of its own
    loss = loop.step(0)["loss"]
    return mode.found, mode.calls, loss


@pytest.mark.parametrize("setup", [
    Setup(2, 1, backend="grouped"), Setup(2, 2, dense=True),
    Setup(1, 1, 4, parallel={"recompute": "selective"}, dense=True),
    Setup(1, 1, 4, parallel={"recompute": "full"}, backend="grouped"),
    Setup(2, 1, parallel={"tensor": 2}, backend="grouped"),
    Setup(2, 1, parallel={"tensor": 2, "sequence": True}, backend="grouped"),
    Setup(2, 1, 4, parallel={"pipeline": 2}, backend="grouped"),
], ids=str)  # fmt: skip
def test_the_passes_of_a_layout_wait_for_nothing(setup):
    for found, calls, loss in run_ranks(setup.world_size, waits_of_engine, setup):
        assert found == [] and calls > 100 and loss > 0
