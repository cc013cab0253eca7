"""Taps and heads under every layout, with another length every step: values and gradients are those of one process."""

import functools

import pytest

from tests.distributed import steps, tapped
from tests.distributed.curves import CLIPPING, Setup
from tests.distributed.harness import run_ranks

pytestmark = pytest.mark.distributed

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
    return run_ranks(1, steps.bare_steps, Setup(dense=dense, shared=shared), tapped.CASE)[0]


@pytest.mark.parametrize("setup", LAYOUTS, ids=str)
def test_taps_and_heads_are_those_of_one_process(setup):
    expected = reference(setup.dense, setup.shared)
    assert min(step["gradient_norm"] for step in expected) > CLIPPING
    assert {len(step["taps"]) for step in expected} == {len(tapped.TAPS)}
    ranks = run_ranks(setup.world_size, steps.engine_steps, setup, tapped.CASE)
    steps.assert_same(setup, ranks, expected)
