"""Tensor, sequence, expert and data parallelism compute the function of one process, with every dispatcher and backend.

Plain autograd and explicit sums over the groups that hold the same parameters: no engine takes part.
"""

import importlib.util
import itertools

import pytest
import torch
import torch.distributed as dist

from megavar.config.parallel import ParallelConfig
from megavar.generators.inputs import ScaleInputs
from megavar.parallel import topology
from megavar.parallel.environment import environment
from megavar.parallel.logical import logical_tensors
from megavar.parallel.vocabulary import vocabulary_cross_entropy
from megavar.training.gradients import register_sequence_parallel_hooks
from megavar.transformer.cache import KeyValueCache
from tests.distributed.harness import run_ranks
from tests.transformer import layouts, tiny

pytestmark = pytest.mark.distributed
BATCH = 4


def sum_gradients(model):
    """Add up over the ranks that hold the same parameter and saw other tokens."""
    from megatron.core import parallel_state

    experts = {tensor.parameter for tensor in logical_tensors(model) if tensor.is_expert}
    for name, parameter in model.named_parameters():
        if name in experts:
            group = parallel_state.get_expert_data_parallel_group()
        else:
            group = parallel_state.get_data_parallel_group()
        dist.all_reduce(parameter.grad, group=group)


def decoded(model, given):
    """Logits of cached decoding along the true features, [B, L, V]."""
    cache, start, logits = KeyValueCache(tiny.TOKENS), 0, []
    for scale, side in enumerate(tiny.SCALES):
        end = start + side * side
        features = None if scale == 0 else given.features[:, start - 1 : end - 1]
        logits.append(model.step(ScaleInputs(given.labels, features, scale=scale), cache))
        start = end
    return torch.cat(logits, 1)


def run_case(place, parallel, experts):
    model = tiny.model(tiny.config(experts), parallel)
    register_sequence_parallel_hooks(model)
    model.balance = 1 / place.data
    given, targets = tiny.inputs(BATCH)
    own = torch.arange(BATCH).chunk(place.data)[place.data_rank]
    given, targets = tiny.rows(given, own), targets[own]
    loss = vocabulary_cross_entropy(model(given).prediction, targets).sum() / (BATCH * tiny.TOKENS)
    loss.backward()
    sum_gradients(model)
    return {
        "replica": place.data_rank,
        "loss": loss.item(),
        "gradients": layouts.parts(model, lambda parameter: parameter.grad),
        "load": model.collect_routing().get("load"),
        "decoded": decoded(model.eval(), given),
    }


def run_cases(cases):
    results, sizes, place = [], None, None
    for parallel, experts in cases:
        parallel = ParallelConfig(**parallel)
        if sizes != (parallel.tensor, parallel.expert):  # new groups take longer than the rest
            sizes, place = (parallel.tensor, parallel.expert), topology.initialize(parallel, environment())
        results.append(run_case(place, parallel, experts))
    return results


def megatron_and_grouped(*layouts_of_a_world):
    return [
        (layout | {"dispatcher": dispatcher}, {"backend": backend})
        for layout in layouts_of_a_world
        for dispatcher in ("allgather", "alltoall")
        for backend in ("megatron", "grouped")
    ]


def with_tutel(*layouts_of_a_world):
    installed = importlib.util.find_spec("tutel") is not None
    return [(layout, {"backend": "tutel"}) for layout in layouts_of_a_world if installed]


def of_other_routers(*layouts_of_a_world):
    backends, cases = itertools.cycle(["megatron", "grouped"]), itertools.product(layouts_of_a_world, OTHER)
    return [(layout, {"backend": next(backends), "router": router}) for layout, router in cases]


OTHER = ["expert_choice", "zero_computation"]
"""Routers that are not MEPA's."""
TP2, TP2_SP = {"tensor": 2}, {"tensor": 2, "sequence": True}
ALLGATHER = {"dispatcher": "allgather"}
CASES = {
    2: [
        (TP2, None),
        (TP2_SP, None),
        *megatron_and_grouped(TP2, TP2_SP),
        *with_tutel(TP2),
        (TP2_SP | {"recompute": "full"}, {"backend": "megatron"}),
        (TP2_SP, {"backend": "grouped", "router": "scale"}),
        *megatron_and_grouped({"expert": 2}),
        ({"expert": 2, "recompute": "full"}, {"backend": "grouped"}),
        ({"expert": 2}, {"backend": "megatron", "router": "scale"}),
        *of_other_routers(TP2, TP2_SP | {"recompute": "full"}, {"expert": 2}, TP2_SP | {"expert": 2} | ALLGATHER),
        ({"expert": 2}, {"backend": "deepspeed"}),
        ({"expert": 2, "recompute": "full"}, {"backend": "deepspeed"}),
        *with_tutel({"expert": 2}),
        *megatron_and_grouped(TP2 | {"expert": 2}, TP2_SP | {"expert": 2}),
        *with_tutel(TP2_SP | {"expert": 2}),
    ],
    4: [
        (TP2 | {"expert": 2, "dispatcher": "allgather"}, {"backend": "megatron"}),
        (TP2 | {"expert": 2}, {"backend": "grouped"}),
        *with_tutel(TP2 | {"expert": 2}),
        (TP2_SP | {"expert": 4}, {"backend": "grouped"}),
        ({"expert": 4}, {"backend": "deepspeed"}),
    ],
}
ALL = [(world, number) for world, cases in CASES.items() for number in range(len(cases))]


def name_of(case):
    world, number = case
    parallel, experts = CASES[world][number]
    options = {"world": world} | parallel | (experts or {"experts": "none"})
    return ",".join(f"{key}={value}" for key, value in options.items())


@pytest.fixture(scope="module")
def results():
    """Results of all cases by world size, rank and number: one fork for each world size."""
    return {world: run_ranks(world, run_cases, cases) for world, cases in CASES.items()}


@pytest.fixture(scope="module")
def references():
    """Results of one process for each kind of router."""
    kinds = [None, "scale_token", "scale", *OTHER]
    cases = [({}, kind and {"backend": "megatron", "router": kind}) for kind in kinds]
    return dict(zip(kinds, run_ranks(1, run_cases, cases)[0]))


@pytest.mark.parametrize("case", ALL, ids=name_of)
def test_layout_computes_what_one_process_does(case, results, references):
    world, number = case
    experts = CASES[world][number][1]
    ranks = [of_rank[number] for of_rank in results[world]]
    expected = references[experts and experts.get("router", "scale_token")]
    by_replica = {rank["replica"]: rank for rank in ranks}
    assert sum(rank["loss"] for rank in by_replica.values()) == pytest.approx(expected["loss"], rel=1e-6)
    gradients = layouts.whole([rank["gradients"] for rank in ranks])
    given = {name: value for name, (_, _, value) in expected["gradients"].items()}
    tiny.assert_same(gradients, given, rtol=1e-4, atol=1e-6)
    for rank in ranks:
        torch.testing.assert_close(rank["decoded"], by_replica[rank["replica"]]["decoded"], rtol=0, atol=0)
    logits = torch.cat([by_replica[replica]["decoded"] for replica in sorted(by_replica)])
    torch.testing.assert_close(logits, expected["decoded"], rtol=1e-4, atol=1e-5)
    if experts is not None:
        assert torch.equal(sum(rank["load"] for rank in ranks), expected["load"])
