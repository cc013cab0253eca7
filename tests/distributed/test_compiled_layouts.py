"""Compiled blocks train the same function under the layouts that allow them, through DeepSpeed and the schedules."""

import pytest
import torch

from megavar.config.parallel import ParallelConfig
from megavar.parallel import topology
from megavar.parallel.environment import environment
from megavar.transformer.compilation import compile_blocks
from tests.distributed import curves
from tests.distributed.curves import Setup
from tests.distributed.harness import run_ranks

pytestmark = pytest.mark.distributed


def losses(setup, compiled):
    """Loss and gradient norm of three steps, and how many graphs were compiled for them."""
    from torch._dynamo.utils import counters

    counters.clear()  # ranks are forked from a process in which other tests may have compiled something
    mesh = topology.initialize(ParallelConfig(**setup.parallel), environment())
    recipe = curves.build(setup, mesh)
    if compiled:
        compile_blocks(recipe.modules()["generator"], "aot_eager", torch.device("cpu"))
    loop = curves.engine_loop(setup, recipe, mesh)
    steps = [loop.step(step) for step in range(3)]
    return [(step["loss"], float(step["gradient_norm"])) for step in steps], counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("setup", [
    Setup(2, 2, 2, backend="grouped"),
    Setup(2, 1, 4, backend="grouped", parallel={"pipeline": 2, "recompute": "full"}),
    Setup(2, 1, backend="grouped", parallel={"expert": 2}),
], ids=str)  # fmt: skip
def test_a_layout_trains_the_same_function_when_compiled(setup):
    expected = run_ranks(setup.world_size, losses, setup, False)
    for (found, graphs), (plain, none) in zip(run_ranks(setup.world_size, losses, setup, True), expected):
        assert graphs > 0 and none == 0
        for own, other in zip(found, plain):
            assert own == pytest.approx(other, rel=1e-5)
