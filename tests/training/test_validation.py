"""The validation loss of every family: what the recipe's passes give, computed directly, also over a pipeline."""

from types import SimpleNamespace

import pytest
import torch

from megavar.config.loading import load_config
from megavar.config.parallel import ParallelConfig
from megavar.errors import ConfigError
from megavar.parallel import topology
from megavar.parallel.environment import environment
from megavar.training.validation import ValidationObserver, due
from tests.distributed import curves, flowing, masking, querying, refined, test_rear, test_scalear
from tests.distributed.curves import BATCH, Setup
from tests.distributed.harness import run_ranks

pytestmark = pytest.mark.distributed
FAMILIES = {
    "STMoE-VAR": (curves.build, curves.batches),
    "SAR on FlexVAR": (lambda setup, mesh: refined.build(setup, mesh, "released"), refined.batches),
    "student forcing": (lambda setup, mesh: refined.build(setup, mesh, "full"), refined.batches),
    "hybrid": (lambda setup, mesh: test_scalear.build(setup, mesh, "hybrid"), refined.batches),
    "FlowAR": (lambda setup, mesh: flowing.build(setup, mesh, "spatial"), flowing.batches),
    "reAR on RAR": (lambda setup, mesh: test_rear.build(setup, mesh, "rar"), test_rear.batches),
    "AliTok": (lambda setup, mesh: test_rear.build(setup, mesh, "alitok"), test_rear.batches),
    "MAR": (lambda setup, mesh: masking.build(setup, mesh, "class"), querying.batches),
    "QueryAR": (lambda setup, mesh: querying.build(setup, mesh, "sample"), querying.batches),
}
STEPS = 9
"""Of the whole run, at whose end the recipes' schedules are looked at."""


def measured(setup):
    """Runs on every rank."""
    mesh = topology.initialize(ParallelConfig(**setup.parallel), environment())
    found = {}
    for family, (build, batches) in FAMILIES.items():
        recipe, size = build(setup, mesh), setup.micro_batch_size
        loop = curves.engine_loop(setup, recipe, mesh)
        observer = ValidationObserver(
            4, 2, lambda micro, batches=batches: [list(batches(n, mesh.data_rank, mesh.data, micro)) for n in (0, 1)]
        )
        observer.watched = SimpleNamespace(
            engines=loop.engines, recipe=recipe, topology=mesh, micro_batch_size=size, total_steps=STEPS
        )
        values, samples = observer.measure()
        assert samples == 2 * BATCH and observer.measure() == (values, samples), "the same each time"
        found[family] = values
        loop.engines["generator"].destroy()
    return found


def computed():
    """One process, no engine: named losses of two batches over what counts in them."""
    mesh = topology.initialize(ParallelConfig(), environment())
    found = {}
    for family, (build, batches) in FAMILIES.items():
        recipe, totals, counts = build(Setup(dense=True), mesh), {}, {}
        model = recipe.modules()["generator"].eval()
        for number in (0, 1):
            (batch,), step = batches(number, 0, 1, BATCH), STEPS - 1 - number
            inputs, valid = recipe.prepare(batch, step), int(recipe.valid(batch, step))
            for one in recipe.passes("generator", step):
                with torch.no_grad():
                    output = one.forward(model, inputs)
                    if one.loss is not None:
                        losses = one.loss(output, inputs)
                        named = {name: (value, valid) for name, value in losses.named.items()} | losses.means
                        for name, (value, count) in named.items():
                            totals[name] = totals.get(name, 0.0) + float(value)
                            counts[name] = counts.get(name, 0) + int(count)
                    if one.carry is not None:
                        inputs = one.following(inputs, one.carry(output, inputs))
        found[family] = {name: totals[name] / counts[name] for name in totals if counts[name]}
    return found


def test_every_family_is_measured_as_computed_directly_also_over_a_pipeline():
    (expected,) = run_ranks(1, computed)
    for found in run_ranks(2, measured, Setup(2, 1, dense=True, micro_batch_size=2, parallel={"pipeline": 2})):
        for family in FAMILIES:
            assert "loss" in expected[family]
            assert found[family] == pytest.approx(expected[family], rel=1e-4, abs=1e-5), family


def test_it_is_due_at_the_first_line_after_each_interval_and_at_the_end():
    at = [step for step in range(3, 31, 3) if due(step, interval=10, lines=3, total=29)]
    assert at == [12, 21, 30] and due(29, interval=10, lines=3, total=29)
    assert [step for step in range(5, 31, 5) if due(step, interval=10, lines=5, total=30)] == [10, 20, 30]


@pytest.mark.parametrize("config", ["quickstart/tokenizer", "demo/titok_stage1", "demo/teacher", "vgt/demo_ae_stage1"])
def test_what_trains_no_generator_is_refused_with_a_sentence(config):
    with pytest.raises(ConfigError, match=r"the recipe .* trains a (tokenizer|teacher): remove it"):
        load_config(f"configs/{config}.yaml", ["validation={interval: 10, samples: 16}"])
