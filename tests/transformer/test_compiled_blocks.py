"""``train.compile: blocks``: a block is one graph, which all blocks share, and computes what it computes without."""

import functools

import pytest
import torch

from megavar.config.generators.base import Limits
from megavar.config.parallel import ParallelConfig
from megavar.errors import ConfigError
from megavar.generators.inputs import ScaleInputs
from megavar.parallel import topology
from megavar.parallel.environment import environment
from megavar.parallel.rules import check_compiled
from megavar.training.gradients import register_sequence_parallel_hooks
from megavar.transformer.cache import KeyValueCache
from megavar.transformer.compilation import compile_blocks
from megavar.transformer.context import ForwardContext
from megavar.transformer.moe.experts import traceable
from megavar.transformer.sequence import SequenceLayout
from tests.distributed.harness import RankFailure, run_ranks
from tests.transformer import test_blocks, tiny

GROUPED = {"backend": "grouped"}
MODELS = {
    "dense": (None, {}),
    "shared modulation": (None, {"shared_adaptive_norm": True}),
    "experts": (GROUPED, {}),
    "experts of the scale": (GROUPED | {"router": "scale"}, {}),
    "expert choice": (GROUPED | {"router": "expert_choice"}, {}),
    "zero computation": (GROUPED | {"router": "zero_computation"}, {}),
    "any number of experts": (GROUPED | {"router": "above_mean"}, {}),
    "megatron's experts": ({"backend": "megatron"}, {}),
}
EXPERTS_TRACED = traceable(torch.float32)
"""With PyTorch 2.11 graphs break around experts in float32, as they do around Megatron-core's."""
BLOCKS = ("llama_dropout", "llama_padded", "alitok", "rar_dropout")
"""Of other families; see ``test_blocks.py``."""


def graphs_of(action):
    """What ``action`` returns, the number of graphs that it compiled, and the reasons of breaks."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    result = action()
    return result, counters["stats"]["unique_graphs"], dict(counters["graph_break"])


def steps_of_model(experts, changes, parallel, compiled):
    """Losses, gradients and statistics of two forward and backward passes of a model of three blocks."""
    model = tiny.model(tiny.config(experts, depth=3, drop_path=0.5, **changes), parallel)
    register_sequence_parallel_hooks(model)
    if compiled:
        compile_blocks(model, "aot_eager", torch.device("cpu"))
    losses = []
    for seed in (0, 1):
        given, _ = tiny.inputs(seed=seed)
        given.sample_keys = torch.arange(3) + seed
        output = model(given)
        losses.append(output.prediction.square().mean())
        losses[-1].backward()
    return torch.stack(losses).detach(), tiny.gradients(model), model.collect_routing()


def steps_of_block(kind, parallel, compiled):
    """The same of one block of another family, after Megatron-core's layout of ``test_blocks.run``."""
    block = test_blocks.build(kind, parallel)
    if compiled:
        block.compile_graph("aot_eager")
    multiple = parallel.tensor if parallel.sequence else 1
    output, gradients = test_blocks.compute(block, kind, torch.tensor([0, 2]), multiple, parallel.sequence)
    return output, {str(n): g for n, g in enumerate(gradients) if g is not None} | tiny.gradients(block), {}


def compared(parallel, names):
    """Of each model or block: graphs, breaks, and the largest differences to what is not compiled."""
    import tests.transformer.foreign_router  # noqa: F401

    parallel, found = ParallelConfig(**parallel), {}
    topology.initialize(parallel, environment())
    for name in names:
        steps = functools.partial(steps_of_model, *MODELS[name]) if name in MODELS else None
        steps = steps or functools.partial(steps_of_block, name)
        plain = steps(parallel, False)
        compiled, graphs, breaks = graphs_of(lambda: steps(parallel, True))  # noqa: B023
        torch.testing.assert_close(compiled[0], plain[0], rtol=1e-5, atol=1e-6)
        tiny.assert_same(compiled[1], plain[1], rtol=1e-4, atol=1e-5)
        tiny.assert_same(compiled[2], plain[2], rtol=1e-5, atol=1e-6)
        found[name] = (graphs, breaks)
    return found


@pytest.fixture(scope="module")
def one_rank():
    return run_ranks(1, compared, {}, (*MODELS, *BLOCKS), timeout=300)[0]


@pytest.mark.parametrize("name", [*MODELS, *BLOCKS])
def test_a_block_is_one_graph_with_all_its_randomness_and_records(name, one_rank):
    graphs, breaks = one_rank[name]
    if name == "megatron's experts" or (name in MODELS and MODELS[name][0] is not None and not EXPERTS_TRACED):
        assert graphs > 1 and breaks, "around experts that Dynamo does not trace"
    else:
        alike = name != "zero computation"  # where the first router gets nothing from a router before it
        assert graphs == (1 if alike else 2) and breaks == {}, "for three blocks of other numbers and drop-path rates"


@pytest.mark.distributed
@pytest.mark.parametrize(("recompute", "graphs"), [("selective", 1), ("full", 2)])
def test_recomputation(recompute, graphs):
    """Recomputed as a whole, a block has a graph without gradient and one with."""
    found = run_ranks(1, compared, {"recompute": recompute}, ("dense", "experts"))[0]
    assert found["dense"] == (graphs, {})
    assert found["experts"] == (graphs, {}) if EXPERTS_TRACED else found["experts"][1]


@pytest.mark.distributed
@pytest.mark.parametrize("parallel", [{"tensor": 2}, {"tensor": 2, "sequence": True}], ids=["tp", "sp"])
def test_why_tensor_parallel_ranks_are_refused(parallel):
    """Should this fail one day, allow them (``parallel.rules.check_compiled``)."""
    with pytest.raises(RankFailure, match=r"(?s)_dynamo\.exc\.Unsupported.*all_reduce"):
        run_ranks(2, compared, parallel, ("dense",))


def random_lists(experts, kernel, steps):
    """Graphs and breaks of passes over another list of scales each."""
    topology.initialize(ParallelConfig(), environment())
    block = tiny.model(tiny.config(experts, attention_kernel=kernel, drop_path=0.5)).blocks["1"]
    block.compile_graph("aot_eager")
    generator = torch.Generator().manual_seed(0)

    def run():
        for step in range(steps):
            count = int(torch.randint(2, 7, (), generator=generator))
            sides = tuple(torch.randint(1, 6, (count,), generator=generator).sort().values.tolist())
            layout = SequenceLayout.of_scales(sides, kinds=tuple(number % 3 for number in range(count)))
            hidden = torch.randn(layout.length, 2, tiny.WIDTH, generator=generator).requires_grad_(kernel != "flex")
            context = ForwardContext(layout, seed=1, sample_keys=torch.arange(2) + step, routing=[])
            with torch.set_grad_enabled(kernel != "flex"):  # which has no backward on a CPU
                output = block(hidden, torch.randn(2, tiny.WIDTH, generator=generator), context)
            if kernel != "flex":
                output.square().sum().backward()
            if experts is not None:  # each of two images
                assert context.routing[0].load.sum() == 2 * assigned(block, layout)
        return True

    return graphs_of(run)[1:]


def assigned(block, layout):
    """Pairs of tokens and targets of an image."""
    experts = block.feed_forward.moe.router.experts
    if experts.router != "expert_choice":
        return experts.top_k * layout.length
    return sum(experts.number * experts.tokens_per_expert(size) for size in layout.sizes)


LISTS = [(None, "auto", 200), (None, "flex", 30)]
LISTS += [(GROUPED | {"router": router}, "auto", 30) for router in ("scale_token", "expert_choice", "zero_computation")]


@pytest.mark.parametrize(("experts", "kernel", "steps"), LISTS)
def test_random_lists_of_scales_compile_a_handful_of_graphs(experts, kernel, steps):
    graphs, breaks = run_ranks(1, random_lists, experts, kernel, steps, timeout=300)[0]
    if experts is None or EXPERTS_TRACED:
        assert 1 <= graphs <= 4 and breaks == {}
    else:
        assert graphs > 1 and breaks, "around experts"


def test_decoding_is_not_compiled():
    def decode():
        topology.initialize(ParallelConfig(), environment())
        model = tiny.model(tiny.config(GROUPED)).eval()
        compile_blocks(model, "aot_eager", torch.device("cpu"))
        given, cache = tiny.inputs()[0], KeyValueCache(tiny.TOKENS)
        return graphs_of(lambda: model.step(ScaleInputs(given.labels, None, sides=tiny.SCALES, scale=0), cache).shape)

    assert run_ranks(1, decode)[0][1] == 0


@pytest.mark.parametrize(("limits", "tensor", "stage", "message"), [
    (None, 1, 1, "tokenizer .* no transformer blocks.*train.compile=none"),
    (Limits(2), 1, 3, "ZeRO stage 3.*stage 2, or set train.compile=none"),
    (Limits(2), 2, 1, r"parallel.tensor=2.*layers.py:544.*parallel.tensor=1, or train.compile=none"),
])  # fmt: skip
def test_what_has_no_graphs_is_refused(limits, tensor, stage, message):
    with pytest.raises(ConfigError, match=message):
        check_compiled(ParallelConfig(tensor=tensor), limits, stage)
    check_compiled(ParallelConfig(pipeline=2, expert=2), Limits(2), 2)


def test_a_missing_compiler_is_named(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(ConfigError, match=r"C\+\+ compiler.*aot_eager"):
        compile_blocks(torch.nn.Module(), "inductor", torch.device("cpu"))
    compile_blocks(torch.nn.Module(), "aot_eager", torch.device("cpu"))
