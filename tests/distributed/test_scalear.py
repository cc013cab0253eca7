"""SAR's hybrid under layouts: losses, norms and drawn ids of one process.

Its first call uses parameters that the others do not, and the other way round: ZeRO-3 must not mix their gradients with
those of the step before.
"""

import functools

import pytest
import torch

from megavar.config.experts.base import ExpertsChoice
from megavar.config.generators.scalear import ScaleARConfig
from megavar.config.recipes.masked_scales import MaskedScalesConfig
from megavar.generators.base import Stage
from megavar.generators.scalear import ScaleAR
from megavar.recipes.masked_scales import MaskedScales
from tests.distributed import curves, refined
from tests.distributed.curves import Setup
from tests.distributed.harness import run_ranks

pytestmark = pytest.mark.distributed
STEPS, TOLERANCE = 2, 1e-5
SCHEDULES = {
    "teacher": {},
    "full": {"schedule": "full", "rollout": {"guidance": 2.0, "top_k": 20}},
    "interleave": {"schedule": "interleave", "rollout": {"guidance": 1.2, "top_k": 20}},
    "alternate": {"schedule": "alternate", "rollout": {"guidance": 1.2, "top_k": 20}},
    "hybrid": {"schedule": "hybrid", "true_until": 3, "rollout": {"sampled": False}},
}
LAYOUTS = [
    Setup(2, 2, dense=True, micro_batch_size=2),
    Setup(2, 3, dense=True, micro_batch_size=2),
    Setup(2, 1, dense=True, parallel={"tensor": 2, "sequence": True}),
    Setup(2, 1, dense=True, micro_batch_size=2, parallel={"pipeline": 2}),
    Setup(2, 1, parallel={"expert": 2}),
]


def build(setup, mesh, schedule):
    frozen = refined.tokenizer((2, 3, 4, refined.LAST))
    config = ScaleARConfig(
        depth=4, width=32, heads=4, classes=curves.CLASSES, drop_path=0.2, label_drop=0.2, initial_gamma=0.3,
        initial_head=1.0, position_side=8, history="causal" if schedule == "interleave" else "none",
        experts=None if setup.dense else ExpertsChoice.make(number=4, top_k=2, balance_coefficient=0.05),
    )  # fmt: skip
    stage = Stage.split(4, mesh.config, mesh.pipeline_rank, 0)
    generator = ScaleAR(config, frozen.space, parallel=mesh.config, stage=stage, seed=11)
    recipe = MaskedScalesConfig(tokenizer_weights="unused", **SCHEDULES[schedule])
    return MaskedScales(recipe, generator, frozen, classes=config.classes, label_drop=0.2, seed=5)


def engine_values(setup):
    """Runs on every rank."""
    return curves.engine_runs(setup, SCHEDULES, build, refined.batches, STEPS, refined.drawn_of)


def bare_values(setup):
    return curves.bare_runs(setup, SCHEDULES, build, refined.batches, STEPS, refined.drawn_of)


@functools.cache
def reference(dense):
    return run_ranks(1, bare_values, Setup(dense=dense))[0]


@pytest.mark.parametrize("setup", LAYOUTS, ids=str)
def test_layouts_equal_one_process(setup):
    expected = reference(setup.dense)
    by_rank = run_ranks(setup.world_size, engine_values, setup)
    assert curves.compare_draws(by_rank, expected) > 2000
    for values in by_rank:
        for schedule, steps in expected.items():
            for number, step in enumerate(steps):
                for name in ("loss", "gradient_norm"):
                    place = f"{schedule}, step {number}: {name}"
                    assert values[schedule][number][name] == pytest.approx(step[name], abs=TOLERANCE), place


def test_schedules_differ():
    """Otherwise the comparison above would say nothing of the calls."""
    losses = [steps[1]["loss"] for steps in reference(True).values()]
    assert torch.tensor(losses).unique().numel() == len(SCHEDULES)
