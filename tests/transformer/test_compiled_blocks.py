"""A dense block is one graph, with its randomness, and computes the same when it is compiled."""

import pytest
import torch

from megavar.config.parallel import ParallelConfig
from megavar.parallel import topology
from megavar.parallel.environment import environment
from megavar.transformer.context import ForwardContext
from megavar.transformer.sequence import SequenceLayout
from tests.distributed.harness import run_ranks
from tests.transformer import tiny
from tests.transformer.test_blocks import BATCH, WIDTH, build, drawn

SIDES = (1, 2, 3)


def block_of(kind):
    topology.initialize(ParallelConfig(), environment())
    if kind == "var":
        return tiny.model(tiny.config(None, drop_path=0.5)).blocks["1"]
    return build(kind, ParallelConfig())


def compute(block, kind, seed, layout):
    """Output and gradients of parameters."""
    hidden = drawn(seed, layout.length, BATCH, WIDTH).requires_grad_()
    condition = drawn(seed + 1, BATCH, WIDTH) if kind == "var" else drawn(seed + 1, layout.length, BATCH, WIDTH)
    context = ForwardContext(layout, seed=9, sample_keys=torch.arange(BATCH) + seed)
    output = block(hidden, None if kind.startswith("llama") else condition, context)
    return [output.detach(), *torch.autograd.grad(output.square().sum(), [hidden, *block.parameters()])]


def compare(kind):
    """Largest difference of each step between the block and its compilation, and the number of graphs."""
    import torch._dynamo

    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    block = block_of(kind)
    compiled = torch.compile(block, fullgraph=True, backend=backend)  # raises where the graph would break
    differences = []
    for seed in (3, 4, 5):
        layout = SequenceLayout.of_scales(SIDES, rule="block_causal" if kind == "var" else "causal")
        own, plain = compute(compiled, kind, seed, layout), compute(block, kind, seed, layout)
        differences.append(max(float((a - b).abs().max()) for a, b in zip(own, plain)))
    return differences, len(graphs)


@pytest.mark.parametrize("kind", ["var", "llama_dropout", "rar_dropout"])
def test_a_dense_block_is_one_graph_and_drops_what_each_sample_should(kind):
    differences, graphs = run_ranks(1, compare, kind)[0]
    assert max(differences) < 1e-5
    assert graphs == 1

