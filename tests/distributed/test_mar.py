"""MAR under layouts: the losses and norms of one process. Its masks and its drawing by definition."""

import functools

import pytest
import torch

from megavar.conditions import Condition
from megavar.config.parallel import ParallelConfig
from megavar.config.procedures.mar import MARSampling
from megavar.parallel import topology
from megavar.parallel.environment import environment
from megavar.sampling.noise import Noise
from megavar.sampling.procedures.mar import MaskedDecoding
from tests.distributed import curves, masking
from tests.distributed.curves import Setup
from tests.distributed.harness import run_ranks
from tests.distributed.querying import SPACE, batches

TOLERANCE = 1e-5
LAYOUTS = [
    Setup(2, 2, dense=True, micro_batch_size=2),
    Setup(2, 1, dense=True, parallel={"tensor": 2, "sequence": True}),
    Setup(2, 1, dense=True, micro_batch_size=2, parallel={"pipeline": 2}),
]


@functools.cache
def reference():
    return run_ranks(1, masking.bare_values, Setup(dense=True))[0]


@pytest.mark.distributed
@pytest.mark.parametrize("setup", LAYOUTS, ids=str)
def test_layouts_equal_one_process(setup):
    expected = reference()
    for values in run_ranks(setup.world_size, masking.engine_values, setup):
        for kind, steps in expected.items():
            for number, step in enumerate(steps):
                for name in ("loss", "loss/noise", "loss/variance", "gradient_norm"):
                    place = f"{kind}, step {number}: {name}"
                    assert values[kind][number][name] == pytest.approx(step[name], rel=TOLERANCE, abs=TOLERANCE), place


@pytest.mark.usefixtures("single_process")
def test_masks_are_a_function_of_step_and_sample_and_hide_their_tokens():
    recipe = masking.build(Setup(dense=True), topology.initialize(ParallelConfig(), environment()), "class")
    (batch,) = batches(0, 0, 1, curves.BATCH)
    counts = {step: recipe.prepare(batch, step).model.masked.sum(1).unique().tolist() for step in range(6)}
    assert all(len(found) == 1 and 7 <= found[0] <= 9 for found in counts.values())  # ceil(0.7 x 9) to 9
    inputs = recipe.prepare(batch, 0)
    assert recipe.valid(batch, 0) == int(inputs.model.masked.sum())
    assert torch.equal(recipe.prepare(batch.split(3)[1], 0).model.masked, inputs.model.masked[3:6])
    model, given = recipe.generator.eval(), inputs.model
    given.noisy, given.sample_keys = None, None
    before = model(given).prediction
    given.tokens = torch.where(given.masked[..., None], given.tokens + 9, given.tokens)
    torch.testing.assert_close(model(given).prediction, before, rtol=0, atol=1e-6)


@pytest.mark.usefixtures("single_process")
def test_a_sample_depends_on_its_own_condition_and_noise_alone():
    recipe = masking.build(Setup(dense=True), topology.initialize(ParallelConfig(), environment()), "class")
    decoding = MaskedDecoding(MARSampling(iterations=4, steps=5, spacing="strided", guidance=2.0))
    labels, classes = torch.tensor([0, 3, 7]), recipe.classes
    model, tokenizer = recipe.generator.eval(), recipe.tokenizer
    whole = decoding.draw(model, tokenizer, Condition(labels, classes=classes), Noise(1, torch.arange(3)))
    alone = decoding.draw(model, tokenizer, Condition(labels[1:2], classes=classes), Noise(1, torch.tensor([1])))
    torch.testing.assert_close(alone[0], whole[1], rtol=1e-4, atol=1e-4)
    assert decoding.left(SPACE.length) == [8, 6, 3, 1]
