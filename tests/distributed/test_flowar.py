"""FlowAR under every layout: the losses and norms of one process. Its inputs and samples by definition."""

import functools

import pytest
import torch
import torch.nn.functional as F

from megavar.conditions import Condition
from megavar.config.parallel import ParallelConfig
from megavar.config.procedures.flowar import FlowARSampling
from megavar.generators.inputs import FlowScaleInputs
from megavar.parallel import topology
from megavar.parallel.environment import environment
from megavar.sampling.noise import Noise
from megavar.sampling.procedures.flowar import NextScaleFlow as Sampler
from megavar.tokenizers.latent_scales import next_input
from tests.distributed import curves, flowing
from tests.distributed.curves import Setup
from tests.distributed.harness import run_ranks

pytestmark = pytest.mark.distributed
TOLERANCE = 1e-5
"""Relative, too: norms of the first steps are near 20, and float32 sums of a million squares hold five digits."""
LAYOUTS = [
    Setup(2, 0, dense=True, micro_batch_size=2),
    Setup(2, 2, dense=True, micro_batch_size=1),
    Setup(2, 3, dense=True),
    Setup(2, 1, dense=True, parallel={"tensor": 2}),
    Setup(2, 1, dense=True, parallel={"tensor": 2, "sequence": True, "recompute": "full"}),
    Setup(2, 1, dense=True, micro_batch_size=2, parallel={"pipeline": 2}),
    Setup(2, 2, parallel={"expert": 2}),
    Setup(2, 1, parallel={"tensor": 2, "sequence": True}),
]


@functools.cache
def reference(dense):
    return run_ranks(1, flowing.bare_values, Setup(dense=dense))[0]


@pytest.mark.parametrize("setup", LAYOUTS, ids=str)
def test_layouts_equal_one_process(setup):
    expected = reference(setup.dense)
    for values in run_ranks(setup.world_size, flowing.engine_values, setup):
        for kind, steps in expected.items():
            for number, step in enumerate(steps):
                compared = {name for name in step if name.startswith("loss")} | {"gradient_norm"}
                assert len(compared) == 2 + len(flowing.SCALES)
                for name in compared:
                    place = f"{kind}, step {number}: {name}"
                    assert values[kind][number][name] == pytest.approx(step[name], rel=TOLERANCE, abs=TOLERANCE), place


@pytest.mark.usefixtures("single_process")
@pytest.mark.parametrize("kind", flowing.KINDS)
def test_a_batch_is_prepared_by_its_definition(kind):
    recipe = flowing.build(Setup(dense=True), topology.initialize(ParallelConfig(), environment()), kind)
    recipe.config = recipe.config.model_copy(update={"posterior": "mean"})
    (batch,) = flowing.batches(0, 0, 1, curves.BATCH)
    inputs, tokenizer = recipe.prepare(batch, 0), recipe.tokenizer
    latent = F.avg_pool2d(batch.images, 2)
    maps = []
    for side in flowing.SCALES:
        if kind == "cross":  # of the reduced image
            reduced = F.interpolate(batch.images, (side * 4, side * 4), mode="area")
            maps.append(F.avg_pool2d(reduced, 2))
        else:
            maps.append(F.interpolate(latent, (side * 2, side * 2), mode="area"))
    torch.testing.assert_close(inputs.data, torch.cat([tokenizer.pack(one) for one in maps], 1))
    read = []
    for one, side in zip(maps, flowing.SCALES[1:]):
        if kind == "cross":  # decoded, enlarged, encoded again
            image = F.interpolate(one, scale_factor=2).clamp(-1, 1)
            image = F.interpolate(image, (side * 4, side * 4), mode="bicubic").clamp(-1, 1)
            read.append(F.avg_pool2d(image, 2))
        else:  # through the full side
            enlarged = F.interpolate(one, (6, 6), mode="bicubic")
            read.append(F.interpolate(enlarged, (2 * side, 2 * side), mode="area"))
    torch.testing.assert_close(inputs.model.features, torch.cat([tokenizer.pack(one) for one in read], 1))
    times = torch.cat([inputs.model.times[:, [k]].expand(-1, s * s) for k, s in enumerate(flowing.SCALES)], 1)
    mixed = (1 - times[..., None]) * inputs.data + times[..., None] * inputs.noise
    torch.testing.assert_close(inputs.model.noisy, mixed)
    assert 0 <= float(times.min()) < float(times.max()) < 1
    again = recipe.prepare(batch.split(3)[1], 0)  # draws belong to samples, not to places in a batch
    torch.testing.assert_close(again.model.noisy, inputs.model.noisy[3:6])


@pytest.mark.usefixtures("single_process")
@pytest.mark.parametrize("kind", flowing.KINDS)
def test_drawing_with_a_cache_equals_drawing_without(kind):
    recipe = flowing.build(Setup(dense=True), topology.initialize(ParallelConfig(), environment()), kind)
    model, tokenizer = recipe.generator.eval(), recipe.tokenizer
    sampler = Sampler(FlowARSampling(steps=4, guidance=3.0))
    labels, classes = torch.tensor([0, 3, 7]), model.choice.classes
    steps = list(sampler.steps(model, tokenizer, Condition(labels, classes=classes), Noise(1, torch.arange(3))))
    features = torch.cat([step.features for step in steps[1:]], 1).repeat(2, 1, 1)
    both = torch.cat([labels, torch.full_like(labels, classes)])
    with torch.no_grad():
        whole = model(FlowScaleInputs(both, features)).prediction
    torch.testing.assert_close(torch.cat([step.condition for step in steps], 1), whole, rtol=1e-5, atol=1e-5)
    true = [torch.randn_like(step.tokens) for step in steps]
    after = list(sampler.steps(model, tokenizer, Condition(labels, classes=classes), Noise(1, torch.arange(3)), true))
    torch.testing.assert_close(after[0].tokens, steps[0].tokens)
    for step, before, side in zip(after[1:], true, flowing.SCALES[1:]):
        through = model.choice.scale_inputs
        assert torch.equal(step.features, next_input(tokenizer, before, flowing.SCALES[-1], side, through))
        assert not torch.equal(step.tokens, before[:, : step.tokens.shape[1]])
    alone = sampler.draw(model, tokenizer, Condition(labels[1:2], classes=classes), Noise(1, torch.tensor([1])))
    torch.testing.assert_close(alone[0], steps[-1].tokens[1], rtol=1e-5, atol=1e-5)
