"""Taps and heads under every layout, with another length every step: values and gradients are those of one process."""

import functools

import pytest
import torch

from tests.distributed import tapped
from tests.distributed.curves import CLIPPING, Setup
from tests.distributed.harness import run_ranks

pytestmark = pytest.mark.distributed
TOLERANCE = 1e-5

LAYOUTS = [
    *[Setup(2, stage, dense=True) for stage in (0, 1, 2, 3)],
    Setup(2, 3, dense=True, micro_batch_size=2, parallel={"recompute": "full"}),
    Setup(2, 1, dense=True, micro_batch_size=2, parallel={"pipeline": 2}),
    Setup(4, 1, micro_batch_size=2, parallel={"pipeline": 4}),
    Setup(2, 1, dense=True, micro_batch_size=2, parallel={"pipeline": 2, "virtual_pipeline": 2}),
    Setup(2, 1, dense=True, parallel={"tensor": 2}),
    Setup(2, 1, dense=True, parallel={"tensor": 2, "sequence": True}),
    Setup(4, 3, parallel={"tensor": 2, "sequence": True, "expert": 2}),
    Setup(4, 1, dense=True, shared=True, micro_batch_size=2, parallel={"tensor": 2, "sequence": True, "pipeline": 2}),
]


@functools.cache
def reference(dense, shared):
    return run_ranks(1, tapped.bare_steps, Setup(dense=dense, shared=shared))[0]


@pytest.mark.parametrize("setup", LAYOUTS, ids=str)
def test_taps_and_heads_are_those_of_one_process(setup):
    expected = reference(setup.dense, setup.shared)
    assert min(step["norm"] for step in expected) > CLIPPING
    ranks = run_ranks(setup.world_size, tapped.engine_steps, setup)
    for number, step in enumerate(expected):
        seen = 0
        replicas = {}
        for rank in ranks:
            found = rank[number]
            assert found["norm"] == pytest.approx(step["norm"], abs=TOLERANCE)
            if not found["loss"]:
                continue  # not on the last stage
            seen += 1
            replicas[found["first"]] = sum(found["loss"]) / len(found["loss"])
            assert found["taps"].keys() == set(tapped.TAPS)
            for name, value in found["taps"].items():
                whole = step["taps"][name][found["first"] : found["first"] + len(value)]
                torch.testing.assert_close(value, whole, rtol=1e-4, atol=1e-5, msg=f"step {number}, {name}")
        assert seen == setup.world_size // setup.parallel.get("pipeline", 1)
        assert sum(replicas.values()) / len(replicas) == pytest.approx(step["loss"], abs=TOLERANCE)
