"""Every layout trains the same function: loss, gradient norm and routing agree with a bare loop on one process.

Clipping is active at every step, the balance loss is on, labels and paths are dropped.
"""

import functools

import pytest

from tests.distributed.curves import CLIPPING, Curve, Setup, bare_curve, engine_curve
from tests.distributed.harness import run_ranks

pytestmark = pytest.mark.distributed
TOLERANCE = 1e-5


@functools.cache
def reference(dense: bool = False, shared: bool = False, router: str = "scale_token") -> Curve:
    return run_ranks(1, bare_curve, Setup(dense=dense, shared=shared, router=router))[0]


def zero(ranks: int, *stages: int, **parallel: object) -> list[Setup]:
    return [Setup(ranks, stage, parallel=parallel) for stage in stages]


LAYOUTS = [
    *zero(1, 0, 1, 2, 3),
    *zero(2, 0, 1, 2, 3),
    *zero(4, 1, 2, 3),
    *zero(4, 0, 1, 2, 3, tensor=2),
    *zero(4, 1, 2, 3, tensor=2, sequence=True),
    *zero(2, 1, 2, 3, expert=2),
    *zero(2, 1, 2, expert=2, dispatcher="allgather"),
    *zero(4, 1, 2, 3, expert=4),
    *zero(4, 2, expert=2),
    *zero(4, 1, 2, 3, tensor=2, expert=2),
    *zero(4, 1, 3, tensor=2, expert=2, sequence=True),
    *zero(4, 1, 2, tensor=2, expert=2, dispatcher="allgather"),
    *zero(2, 1, tensor=2),
    Setup(2, 1, micro_batch_size=2, parallel={"pipeline": 2}),
    Setup(4, 1, micro_batch_size=2, parallel={"pipeline": 4}),
    Setup(4, 1, micro_batch_size=2, parallel={"pipeline": 2}),
    Setup(4, 1, micro_batch_size=2, parallel={"tensor": 2, "pipeline": 2}),
    Setup(4, 1, micro_batch_size=2, parallel={"tensor": 2, "pipeline": 2, "sequence": True}),
    Setup(4, 1, micro_batch_size=2, parallel={"pipeline": 2, "expert": 2}),
    Setup(2, 0, micro_batch_size=2, parallel={"pipeline": 2}),
    Setup(2, 1, micro_batch_size=2, parallel={"pipeline": 2, "virtual_pipeline": 2}),
    Setup(4, 1, micro_batch_size=2, parallel={"pipeline": 2, "virtual_pipeline": 2}),
    Setup(2, 1, micro_batch_size=2, taps=("embedding", "block.1", "block.2"), parallel={"pipeline": 2}),
    Setup(1, 1, micro_batch_size=2),
    Setup(2, 2, micro_batch_size=1),
    Setup(2, 3, micro_batch_size=1),
    *[Setup(2, stage, parallel={"recompute": mode}) for stage in (1, 3) for mode in ("selective", "full")],
    Setup(4, 1, micro_batch_size=2, parallel={"tensor": 2, "pipeline": 2, "recompute": "full"}),
    Setup(2, 1, offload=("optimizer",)),
    Setup(2, 2, offload=("optimizer",)),
    Setup(2, 3, offload=("optimizer", "param")),
    Setup(2, 0, dense=True, parallel={"tensor": 2}),  # with experts stage 0 runs as 1
    Setup(4, 1, dense=True, parallel={"tensor": 2, "sequence": True}),
    Setup(4, 1, dense=True, shared=True, micro_batch_size=2, parallel={"tensor": 2, "pipeline": 2}),
    Setup(2, 1, backend="grouped", parallel={"expert": 2}),
    Setup(2, 3, backend="grouped", parallel={"expert": 2}),
    Setup(
        4,
        1,
        router="zero_computation",
        micro_batch_size=2,
        parallel={"tensor": 2, "pipeline": 2, "virtual_pipeline": 2, "recompute": "full"},
    ),
    *[
        Setup(ranks, stage, router=router, micro_batch_size=2, parallel=parallel)
        for router in ("expert_choice", "zero_computation")
        for ranks, stage, parallel in (
            (2, 3, {"expert": 2, "recompute": "full"}),
            (4, 1, {"tensor": 2, "sequence": True, "pipeline": 2}),
        )
    ],
]


@pytest.mark.parametrize("setup", LAYOUTS, ids=str)
def test_layout_trains_the_same_function(setup: Setup) -> None:
    expected = reference(setup.dense, setup.shared, setup.router)
    assert min(expected.gradient_norm) > CLIPPING, "clipping must be active at every step"
    for curve in run_ranks(setup.world_size, engine_curve, setup):
        assert curve.loss == pytest.approx(expected.loss, abs=TOLERANCE)
        assert curve.gradient_norm == pytest.approx(expected.gradient_norm, abs=TOLERANCE)
        assert curve.load == expected.load


BF16 = [
    Setup(2, 1, precision="bf16"),
    Setup(2, 3, precision="bf16"),
    Setup(4, 1, precision="bf16", parallel={"tensor": 2}),
    Setup(4, 1, precision="bf16", micro_batch_size=2, parallel={"pipeline": 2, "expert": 2}),
]


@pytest.mark.parametrize("setup", BF16, ids=str)
def test_layouts_agree_in_bf16(setup: Setup) -> None:
    """bf16 rounds differently in every layout; its own error against float32 bounds the difference."""
    expected = reference()
    curve = run_ranks(setup.world_size, engine_curve, setup)[0]
    assert curve.loss == pytest.approx(expected.loss, rel=0.02)
    assert curve.gradient_norm == pytest.approx(expected.gradient_norm, rel=0.1)
