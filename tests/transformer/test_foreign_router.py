"""A router that is not MEPA's, with a number of experts that differs from token to token, under every layout."""

import pytest
import torch

from megavar.config.choice import resolve
from megavar.config.experts.base import ExpertsChoice
from megavar.config.parallel import ParallelConfig
from megavar.errors import ConfigError
from megavar.generators.var import VAR
from megavar.parallel import topology
from megavar.parallel.environment import environment
from megavar.parallel.logical import initialize_parameters
from megavar.training.gradients import register_sequence_parallel_hooks
from megavar.transformer.context import ForwardContext
from megavar.transformer.moe.layer import ExpertFeedForward
from megavar.transformer.sequence import SequenceLayout
from tests.distributed.harness import run_ranks
from tests.transformer import layouts, tiny
from tests.transformer.foreign_router import AboveMeanExperts, AboveMeanRouter
from tests.transformer.test_layouts import sum_gradients

BATCH, WEIGHT = 4, 0.25


def normal(name, value, generator):
    value.normal_(std=0.4, generator=generator)


def run(parallel, backend, factor):
    """Output, load and gradients of one layer with the balance loss at a quarter of its weight."""
    parallel = ParallelConfig(**parallel)
    place = topology.initialize(parallel, environment())
    experts = ExpertsChoice.make(
        router="above_mean", number=4, top_k=2, balance_coefficient=0.05, factor=factor, backend=backend
    )
    config = VAR.layers(tiny.config(experts), parallel, torch.float32)
    layer = ExpertFeedForward(config, 0, experts=experts, kinds=len(tiny.SCALES))
    initialize_parameters(layer, normal, seed=2)
    register_sequence_parallel_hooks(layer)
    sequence = SequenceLayout.of_scales(tiny.SCALES, parallel.tensor)
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(sequence.tokens, BATCH, tiny.WIDTH, generator=generator)
    hidden = torch.nn.functional.pad(hidden, (0, 0, 0, 0, 0, sequence.padding))
    hidden = hidden[:, torch.arange(BATCH).chunk(place.data)[place.data_rank]]
    if config.sequence_parallel:
        hidden = hidden.chunk(parallel.tensor)[place.tensor_rank]
    context = ForwardContext(sequence, routing=[], balance=WEIGHT / place.data)
    output = layer(hidden, context)
    if config.sequence_parallel:
        from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

        output = gather_from_sequence_parallel_region(output, tensor_parallel_output_grad=False)
    output = output[: sequence.tokens]
    (output.square().sum() / BATCH).backward()
    for parameter in layer.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    sum_gradients(layer)
    gradients = layouts.parts(layer, lambda parameter: parameter.grad)
    return place.data_rank, output.detach(), context.routing[0].load, gradients


ALLGATHER = {"dispatcher": "allgather"}
CASES = [
    (1, {}, "grouped"), (2, {"tensor": 2} | ALLGATHER, "megatron"), (2, {"expert": 2} | ALLGATHER, "grouped"),
    (2, {"tensor": 2, "sequence": True} | ALLGATHER, "grouped"), (2, {"expert": 2}, "megatron"),
    (2, {"tensor": 2, "expert": 2}, "grouped"),
]  # fmt: skip


@pytest.fixture(scope="module")
def expected():
    return {factor: run_ranks(1, run, {}, "megatron", factor)[0] for factor in (1.0, 3.9)}


@pytest.mark.distributed
@pytest.mark.parametrize("factor", [1.0, 3.9], ids=["some", "hardly_any"])
@pytest.mark.parametrize(("ranks", "parallel", "backend"), CASES)
def test_any_number_of_experts_per_token_in_any_layout(ranks, parallel, backend, factor, expected):
    results = run_ranks(ranks, run, parallel, backend, factor)
    _, output, load, gradients = expected[factor]
    by_replica = {replica: out for replica, out, _, _ in results}
    joined = torch.cat([by_replica[replica] for replica in sorted(by_replica)], 1)
    torch.testing.assert_close(joined, output, rtol=1e-5, atol=1e-5)
    assert torch.equal(sum(own for _, _, own, _ in results), load)
    found = layouts.whole([own for _, _, _, own in results])
    tiny.assert_same(found, {name: value for name, (_, _, value) in gradients.items()}, rtol=1e-4, atol=1e-5)


def test_the_number_of_experts_really_varies(expected):
    tokens = torch.tensor([side * side * BATCH for side in tiny.SCALES])
    some, hardly_any = (expected[factor][2].sum(1) / tokens for factor in (1.0, 3.9))
    assert (some % 1 > 0).any() and hardly_any.max() < 0.5


def test_the_choice_finds_its_class_and_hands_over_its_keys():
    experts = ExpertsChoice.make(router="above_mean", factor=2.5)
    assert isinstance(experts, AboveMeanExperts) and experts.factor == 2.5
    assert resolve(experts) is AboveMeanRouter


@pytest.mark.parametrize(("experts", "parallel", "message"), [
    ({"backend": "deepspeed"}, {}, r"router=above_mean gives .* exactly top_k=2.*megatron or grouped"),
    ({"backend": "tutel"}, {}, r"router=above_mean gives .* exactly top_k=2.*megatron or grouped"),
])  # fmt: skip
def test_what_needs_equal_numbers_is_refused(experts, parallel, message):
    with pytest.raises(ConfigError, match=message):
        ExpertsChoice.make(router="above_mean", top_k=2, **experts).check(ParallelConfig(**parallel))
