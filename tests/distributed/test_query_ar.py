"""QueryAR under every layout: the losses and norms of one process. Its inputs and its drawing by definition."""

import functools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from megavar.conditions import Condition
from megavar.config.parallel import ParallelConfig
from megavar.config.procedures.query_ar import QuerySampling
from megavar.data.text import Text
from megavar.parallel import topology
from megavar.parallel.environment import environment
from megavar.sampling.noise import Noise
from megavar.sampling.procedures.query_ar import QueryDecoding
from tests.distributed import curves, querying
from tests.distributed.curves import Setup
from tests.distributed.harness import run_ranks
from tests.distributed.querying import EMPTY, SPACE, TEXT

TOLERANCE = 1e-5
"""Relative, too."""
LAYOUTS = [
    Setup(2, 0, dense=True, micro_batch_size=2),
    Setup(2, 1, dense=True, parallel={"recompute": "full"}),
    Setup(2, 2, dense=True, micro_batch_size=1),
    Setup(2, 3, dense=True),
    Setup(2, 1, dense=True, parallel={"tensor": 2}),
    Setup(2, 1, dense=True, parallel={"tensor": 2, "sequence": True}),
    Setup(2, 1, dense=True, micro_batch_size=2, parallel={"pipeline": 2}),
    Setup(4, 1, dense=True, micro_batch_size=2, parallel={"tensor": 2, "sequence": True, "pipeline": 2}),
    Setup(4, 1, dense=True, micro_batch_size=2, parallel={"tensor": 2, "pipeline": 2}),
    Setup(2, 1, parallel={"expert": 2}),
    Setup(2, 1, parallel={"tensor": 2, "sequence": True}),
]


@functools.cache
def reference(dense):
    return run_ranks(1, querying.bare_values, Setup(dense=dense))[0]


@pytest.mark.distributed
@pytest.mark.parametrize("setup", LAYOUTS, ids=str)
def test_layouts_equal_one_process(setup):
    expected = reference(setup.dense)
    for values in run_ranks(setup.world_size, querying.engine_values, setup):
        for kind, steps in expected.items():
            for number, step in enumerate(steps):
                for name in ("loss", "gradient_norm"):
                    place = f"{kind}, step {number}: {name}"
                    assert values[kind][number][name] == pytest.approx(step[name], rel=TOLERANCE, abs=TOLERANCE), place


def recipe_of(kind="batch", side=querying.SIDE):
    space = replace(SPACE, sides=(side,), length=side * side, image_side=4 * side)
    return querying.build(Setup(dense=True), topology.initialize(ParallelConfig(), environment()), kind, space)


@pytest.mark.usefixtures("single_process")
@pytest.mark.parametrize("kind", querying.KINDS)
def test_a_batch_is_prepared_by_its_definition(kind):
    recipe = recipe_of(kind)
    (batch,) = querying.batches(0, 0, 1, curves.BATCH)
    inputs = recipe.prepare(batch, 0)
    order, model = inputs.order, inputs.model
    assert torch.equal(order.sort(1).values, torch.arange(SPACE.length).expand_as(order))
    one = bool((order == order[0]).all())
    assert one == (kind == "batch")
    assert not torch.equal(recipe.prepare(batch, 1).order, order) or kind == "sample"
    torch.testing.assert_close(inputs.data, batch.latents.gather(1, order[..., None].expand(-1, -1, querying.CHANNELS)))
    assert torch.equal(model.places, order.repeat_interleave(2, 1))
    assert torch.equal(model.latents[:, model.holds], inputs.data) and model.holds.tolist() == [False, True] * 9
    mixed = (1 - model.times[..., None]) * inputs.data + model.times[..., None] * inputs.noise
    torch.testing.assert_close(model.noisy, mixed)
    assert model.text.shape[1] == TEXT + 2 and model.text[:, -2:].unique(dim=0).tolist() == [[7, 8]]
    dropped = (model.text[:, :TEXT] == EMPTY.ids).all(1)
    assert 0 < int(dropped.sum()) < len(batch)
    assert torch.equal(model.text[~dropped, :TEXT], batch.text_ids[~dropped])
    assert model.valid[dropped].sum(1).unique().tolist() == [2 + 2 + 2 * SPACE.length]
    later = batch.split(3)[1]  # draws belong to samples, not to places in a batch
    torch.testing.assert_close(recipe.prepare(later, 0).model.noisy, model.noisy[3:6])


def condition(captions=((3, 4, 5), (9,), (11, 12, 13, 14, 15, 16))):
    mask = torch.tensor([[place < len(words) for place in range(TEXT)] for words in captions])
    ids = torch.tensor([[*words, *[0] * (TEXT - len(words))] for words in captions])
    return Condition(torch.full((len(captions),), -1), text=Text(ids, mask), empty_text=EMPTY)


def drawn(recipe, noise=None, given=None, **settings):
    decoding = QueryDecoding(QuerySampling(**({"steps": 3, "guidance": 2.0, "order": "sample"} | settings)))
    given = given or condition()
    noise = noise or Noise(1, torch.arange(len(given)))
    return list(decoding.steps(recipe.generator.eval(), recipe.tokenizer, given, noise)), decoding


@pytest.mark.usefixtures("single_process")
@pytest.mark.parametrize(("size", "side"), [(1, 3), (2, 3), (4, 3), (16, 8)])
def test_the_context_of_a_group_is_the_training_sequence(size, side):
    """Conditions while drawing are those of one pass over the sequence that was drawn: all of a group's first query,
    and all queries in groups of one."""
    recipe = recipe_of(side=side)
    steps, _ = drawn(recipe, tokens_per_step=size)
    order, data = (torch.cat([getattr(step, part) for step in steps], 1).repeat(2, *[1] * (rest - 1))
                   for part, rest in (("places", 2), ("tokens", 3)))  # fmt: skip
    text = condition().with_dropped().text
    whole = training_conditions(recipe, text, order, data)
    start = 0
    for step in steps:
        compared = step.places.shape[1] if size == 1 else 1
        torch.testing.assert_close(
            step.condition[:, :compared], whole[:, start : start + compared], rtol=1e-5, atol=1e-5
        )
        start += step.places.shape[1]
    assert len(steps) == side * side // size
    assert torch.equal(order.sort(1).values, torch.arange(side * side).expand_as(order))


@pytest.mark.usefixtures("single_process")
def test_padding_to_the_longest_sequence_changes_nothing():
    """1024 rows, the paper's most, of which 508 pad the text."""
    recipe = recipe_of(side=16)
    places = recipe.order(querying.batches(0, 0, 1, curves.BATCH)[0], 0)[:2]
    data = torch.randn(2, 256, querying.CHANNELS, generator=torch.Generator().manual_seed(1))
    ids = torch.tensor([[3, 4, 5], [9, 10, 11]])
    short, long = (Text(F.pad(ids, (0, more)), F.pad(torch.ones_like(ids).bool(), (0, more))) for more in (0, 507))
    assert long.ids.shape[1] + len(recipe.start) + 2 * 256 == 1024
    assert_close = functools.partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)
    assert_close(*(training_conditions(recipe, text, places, data) for text in (short, long)))


def training_conditions(recipe, text, order, data):
    from megavar.recipes.vgt import training_rows

    inputs = training_rows(
        text.ids, text.mask, torch.tensor(recipe.start), data, order, data, torch.zeros(order.shape), order[:, 0]
    )
    inputs.noisy = None
    with torch.no_grad():
        return recipe.generator.eval()(inputs).prediction


@pytest.mark.usefixtures("single_process")
def test_a_sample_depends_on_its_own_condition_and_noise_alone():
    recipe = recipe_of()
    every, alone = condition(), condition(((9,),))
    for settings in ({"tokens_per_step": 1}, {"tokens_per_step": 4}, {"tokens_per_step": 4, "solver": "euler"}):
        together = QueryDecoding(QuerySampling(steps=3, guidance=2.0, order="sample", **settings))
        model, tokenizer = recipe.generator.eval(), recipe.tokenizer
        whole = together.draw(model, tokenizer, every, Noise(1, torch.arange(3)))
        single = together.draw(model, tokenizer, alone, Noise(1, torch.tensor([1])))
        torch.testing.assert_close(single[0], whole[1], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(whole.mean(-1), torch.zeros(3, SPACE.length), atol=1e-5, rtol=0)  # normalized


@pytest.mark.usefixtures("single_process")
def test_padding_is_hidden_in_the_training_context_and_seen_in_the_released_one():
    recipe = recipe_of()
    padded = condition(((9,),))
    other = Condition(padded.labels, text=Text(torch.where(padded.text.mask, padded.text.ids, 30), padded.text.mask),
                      empty_text=EMPTY)  # fmt: skip
    for context, equal in (("training", True), ("release", False)):
        found = [drawn(recipe, given=given, context=context)[0][-1].raw for given in (padded, other)]
        assert torch.allclose(*found, atol=1e-6) == equal
    groups = [len(step.places[0]) for step in drawn(recipe, tokens_per_step=4)[0]]
    assert groups == [5, 4]


@pytest.mark.usefixtures("single_process")
@pytest.mark.parametrize("size", [1, 3])
def test_a_step_costs_the_same_whatever_was_drawn(size):
    recipe, costs = recipe_of(), []
    decoding = QueryDecoding(QuerySampling(steps=2, guidance=1.0, tokens_per_step=size))
    steps = decoding.steps(recipe.generator.eval(), recipe.tokenizer, condition(), Noise(1, torch.arange(3)))
    while True:
        with FlopCounterMode(display=False) as counter:
            if next(steps, None) is None:
                break
        linear = sum(
            flops for name, flops in counter.get_flop_counts()["Global"].items() if "attention" not in str(name)
        )
        costs.append(linear)
    assert len(set(costs[1:])) == 1 and costs[1] < costs[0], costs
