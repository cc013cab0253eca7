"""One engine for every ZeRO stage: the same curve as plain torch, whatever the stage, ranks and accumulation."""

import pytest
import torch
import torch.distributed as dist

from megavar.parallel import topology as topology_module
from tests.distributed.harness import run_ranks
from tests.loops import run_pass
from tests.training import tiny

STEPS = 5


def train(stage, micro_batch=None, zero=None, precision="fp32"):
    engine, topology, micro_batch = tiny.build_engine(stage, micro_batch, zero=zero, precision=precision)
    curve = []
    for step in range(STEPS):
        losses = []

        def loss(output, item, losses=losses):
            value = tiny.loss_of(output, item[1])
            losses.append(value.detach())
            return value

        def forward(model, item):
            return model(item[0].to(next(engine.module.parameters()).dtype))

        run_pass(engine, tiny.local_micro_batches(step, topology, micro_batch), forward, loss)
        result = engine.step(tiny.LEARNING_RATE, tiny.WEIGHT_DECAY)
        mean = torch.stack(losses).mean()
        dist.all_reduce(mean)
        assert result.applied
        curve.append((mean.item() / topology.world_size, float(result.gradient_norm)))
    return curve


def assert_equal_curves(curve, expected, tolerance=1e-5):
    assert max(norm for _, norm in expected) > tiny.CLIP, "clipping must be active"
    for (loss, norm), (expected_loss, expected_norm) in zip(curve, expected, strict=True):
        assert loss == pytest.approx(expected_loss, rel=tolerance)
        assert norm == pytest.approx(expected_norm, rel=tolerance)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("ranks", [1, 2])
def test_every_stage_equals_plain_torch(stage, ranks):
    for curve in run_ranks(ranks, train, stage):
        assert_equal_curves(curve, tiny.reference(STEPS))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_accumulation_changes_nothing(stage):
    assert_equal_curves(run_ranks(2, train, stage, 1)[0], tiny.reference(STEPS))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_offload_changes_nothing(stage):
    zero = {"offload_optimizer": {"device": "cpu"}}
    if stage == 3:
        zero["offload_param"] = {"device": "cpu"}
    assert_equal_curves(run_ranks(2, train, stage, 2, zero)[0], tiny.reference(STEPS))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bfloat16_follows_float32(stage):
    assert_equal_curves(run_ranks(2, train, stage, 2, None, "bf16")[0], tiny.reference(STEPS), tolerance=2e-2)


def two_runs_in_one_process():
    first = train(1)
    topology_module.shutdown()
    return first, train(1)


def test_a_second_run_in_one_process_is_the_same():
    from tests.distributed.harness import run_ranks as run

    first, second = run(1, two_runs_in_one_process)[0]
    assert first == second
