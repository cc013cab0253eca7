"""Passes under the engine, one by one: what is made when, what is let go, and what wrong use says."""

import gc
import weakref

import pytest
import torch

from megavar.config.parallel import ParallelConfig
from megavar.errors import ConfigError
from megavar.parallel.topology import initialize
from megavar.recipes.base import Losses, Pass
from megavar.training.engine import Divisors
from megavar.training.micro_batches import MicroBatches
from tests.distributed.harness import run_ranks
from tests.training import tiny


class Inputs:
    """Something that can be watched."""

    def __init__(self, number):
        self.number = number


def test_every_input_is_made_once_when_it_is_asked_for():
    made = []
    batches = MicroBatches(3, lambda number: made.append(number) or Inputs(number))
    assert batches.peek(0) is batches.peek(0) and made == [0]
    quick, slow = batches.readers(2, keep=False)
    first = [next(quick) for _ in range(3)]
    assert made == [0, 1, 2] and [number for number, _ in first] == [0, 1, 2]
    watched = [weakref.ref(item) for _, item in first]
    items = [item for _, item in first]
    assert [item for _, item in slow] == items
    del first, items
    assert [reference() for reference in watched] == [None] * 3
    with pytest.raises(AssertionError, match="micro-batch 1 have been let go"):
        batches.peek(1)


def test_inputs_that_are_needed_again_are_kept():
    made = []
    batches = MicroBatches(2, lambda number: made.append(number) or Inputs(number))
    (first,) = batches.readers(1, keep=True)
    (second,) = batches.readers(1, keep=False)
    assert [item for _, item in first] == [item for _, item in second]
    assert made == [0, 1]


def _two_graphs(stage):
    """Whether outputs of the first pass live when the second begins; inputs of the second pass; their gradients."""
    engine, topology, size = tiny.build_engine(stage, micro_batch=2)
    outputs, alive, seen = [], [], []

    def forward(model, item):
        if item[0] == "second":
            gc.collect()
            alive.append(sum(reference() is not None for reference in outputs))
        output = model(item[1])
        if item[0] == "first":
            outputs.append(weakref.ref(output))
        return output

    def loss(output, item):
        return Losses(tiny.loss_of(output, item[2]) * len(item[2]))

    def following(item, carried):
        assert not carried.requires_grad
        seen.append(carried)
        return "second", carried[:, :1] + item[1], item[2]

    first = Pass(forward, loss, carry=lambda output, item: output.softmax(-1), following=following)
    items = [("first", *item) for item in tiny.local_micro_batches(0, topology, size)]
    engine.run([first, Pass(forward, loss)], MicroBatches.of(items), Divisors(tiny.GLOBAL_BATCH, tiny.GLOBAL_BATCH))
    norm = float(engine.step(tiny.LEARNING_RATE, tiny.WEIGHT_DECAY).gradient_norm)
    return alive, len(seen), norm


def expected_norm():
    model = tiny.Model()
    x, target = tiny.batch(0)
    first = model(x)
    second = model(first.detach().softmax(-1)[:, :1] + x)
    (tiny.loss_of(first, target) + tiny.loss_of(second, target)).backward()
    return float(torch.nn.utils.clip_grad_norm_(model.parameters(), tiny.CLIP))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_gradients_of_passes_add_up_and_graphs_do_not(stage):
    for alive, followed, norm in run_ranks(2, _two_graphs, stage):
        assert alive == [0, 0] and followed == 2
        assert norm == pytest.approx(expected_norm(), rel=1e-5)


def _no_pipeline():
    initialize(ParallelConfig(), tiny.environment())
    with pytest.raises(ConfigError) as caught:
        tiny.build_engine(1, 4, parallel=ParallelConfig(pipeline=2))
    return str(caught.value)


def test_a_module_that_cannot_be_cut_into_stages_says_so():
    message = run_ranks(2, _no_pipeline)[0]
    assert "parallel.pipeline=2, but model (Model) cannot be cut into pipeline stages" in message


def test_what_is_carried_is_for_a_following_pass():
    with pytest.raises(AssertionError, match="need each other"):
        Pass(lambda model, item: model(item), None, carry=lambda output, item: output)
