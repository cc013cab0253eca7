"""Measured parameter counts of a rank equal what real ranks of every kind of layout hold."""

import pytest

from megavar.config.generators.var import VARConfig
from megavar.config.parallel import ParallelConfig
from megavar.planning.measure import Request, measure
from tests.distributed.harness import run_ranks
from tests.planning.models import MEPA, space_of

LAYOUTS = [
    ({"tensor": 2}, None, False), ({"tensor": 2, "sequence": True}, None, True),
    ({"pipeline": 2}, None, True), ({"pipeline": 2, "virtual_pipeline": 2}, None, False),
    ({"expert": 2}, MEPA, False), ({"tensor": 2, "expert": 2}, MEPA, False), ({"pipeline": 2}, MEPA, False),
]  # fmt: skip


def config_of(experts, shared):
    return VARConfig(depth=4, width=32, heads=4, classes=10, experts=experts, shared_adaptive_norm=shared)


def held():
    """Per layout: pipeline rank, scalars outside and inside experts."""
    from megavar.generators.base import Stage
    from megavar.generators.var import VAR
    from megavar.parallel.environment import environment
    from megavar.parallel.topology import initialize

    result = []
    for layout, experts, shared in LAYOUTS:
        parallel, config = ParallelConfig(**layout), config_of(experts, shared)
        place = initialize(parallel, environment())
        sizes = {True: 0, False: 0}
        for chunk in range(parallel.virtual_pipeline):
            stage = Stage.split(config.depth, parallel, place.pipeline_rank, chunk)
            model = VAR(config, space_of((1, 2)),
                        parallel=parallel, stage=stage)  # fmt: skip
            for name, parameter in model.named_parameters():
                sizes[".experts." in name] += parameter.numel()
        result.append((place.pipeline_rank, sizes[False], sizes[True]))
    return result


@pytest.mark.distributed
def test_each_rank_holds_what_was_counted():
    layouts = [ParallelConfig(**layout) for layout, _, _ in LAYOUTS]
    costs = measure(
        Request(config_of(experts, shared), space_of((1, 2)), layout.tensor, layout.sequence)
        for layout, (_, experts, shared) in zip(layouts, LAYOUTS, strict=True)
    )
    for rank in run_ranks(2, held):
        for layout, cost, (stage, replicated, experts) in zip(layouts, costs, rank, strict=True):
            counted = cost.parameters(layout, stage)
            assert (counted.replicated, counted.experts) == (replicated, experts), layout
