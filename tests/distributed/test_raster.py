"""A generator without scales trains the same under every layout: conditions per position, rotary positions, dropout."""

import functools

import pytest
import torch

from megavar.config.parallel import ParallelConfig
from megavar.generators.base import Stage
from megavar.transformer.cache import KeyValueCache
from tests.distributed import raster, steps
from tests.distributed.curves import Setup
from tests.distributed.harness import run_ranks

LAYOUTS = [
    Setup(2, 3),
    Setup(2, 1, parallel={"tensor": 2}),
    Setup(2, 2, parallel={"tensor": 2, "sequence": True, "recompute": "full"}),
    Setup(2, 1, micro_batch_size=2, parallel={"pipeline": 2}),
    Setup(2, 1, micro_batch_size=2, parallel={"pipeline": 2, "virtual_pipeline": 2}),
    Setup(4, 1, micro_batch_size=2, parallel={"tensor": 2, "sequence": True, "pipeline": 2}),
]
KINDS = ["per_position", "rotary"]


@functools.cache
def reference(kind):
    return run_ranks(1, steps.bare_steps, Setup(), raster.case_of(kind))[0]


@pytest.mark.distributed
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("setup", LAYOUTS, ids=str)
def test_layout_trains_the_same_function(setup, kind):
    ranks = run_ranks(setup.world_size, steps.engine_steps, setup, raster.case_of(kind))
    steps.assert_same(setup, ranks, reference(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_token_by_token_gives_the_predictions_of_all_at_once(kind, single_process):
    model = raster.case_of(kind).build(Setup(), ParallelConfig(), Stage(0, raster.DEPTH, True, True)).eval()
    given = model.example(3)
    expected, cache = model(given).prediction, KeyValueCache(raster.SPACE.length)
    for place in range(raster.SPACE.length):
        newest = raster.RasterInputs(given.labels, given.ids[:, place : place + 1], start=place)
        found = model.step(newest, cache)
        torch.testing.assert_close(found, expected[:, place : place + 1], rtol=1e-5, atol=1e-5)
