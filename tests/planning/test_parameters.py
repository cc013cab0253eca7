"""Measured parameter counts are the published ones."""

import pytest

from megavar.config.generators.var import SCALES, VARConfig
from megavar.config.parallel import ParallelConfig
from megavar.planning.measure import Request, measure
from megavar.planning.workload import count_parameters
from tests.planning.models import MEPA, space_of

PUBLISHED = [
    (VARConfig(depth=12), 256, 133_186_960, None),
    (VARConfig(depth=16), 256, 310_283_520, None),
    (VARConfig(depth=20), 256, 600.917e6, None),
    (VARConfig(depth=24), 256, 1033.399e6, None),
    (VARConfig(depth=30), 256, 2010.020e6, None),
    (VARConfig(depth=36, shared_adaptive_norm=True), 512, 2353.894e6, None),
    (VARConfig(depth=12, experts=MEPA), 256, 529.9e6, 246.60e6),
    (VARConfig(depth=16, experts=MEPA), 256, 1250.5e6, 579.01e6),
    (VARConfig(depth=20, experts=MEPA), 256, 2.44e9, 1.126e9),
]
SMALL = VARConfig(depth=4, width=64, heads=4, experts=MEPA)


@pytest.fixture(scope="module")
def costs():
    requests = [Request(config, space_of(SCALES[resolution])) for config, resolution, _, _ in PUBLISHED]
    return measure([*requests, Request(SMALL, space_of((1, 2)))])


@pytest.mark.parametrize("number", range(len(PUBLISHED)))
def test_counts_are_the_published_ones(costs, number):
    config, resolution, total, activated = PUBLISHED[number]
    counted = count_parameters(config, space_of(SCALES[resolution]), costs[number])
    assert counted.total == pytest.approx(total, rel=2e-3 if total == 2.44e9 else 1e-4)
    assert counted.activated == (counted.total if activated is None else pytest.approx(activated, rel=5e-4))


def test_pipeline_stages_hold_the_whole_model_together(costs):
    cost = costs[-1]
    whole = cost.parameters(ParallelConfig(), 0)
    for layout in (ParallelConfig(pipeline=2), ParallelConfig(pipeline=2, virtual_pipeline=2)):
        held = [cost.parameters(layout, rank) for rank in range(2)]
        assert sum(stage.replicated for stage in held) == whole.replicated
        assert sum(stage.experts for stage in held) == whole.experts
