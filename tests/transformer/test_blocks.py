"""Blocks of other families equal plain implementations of them, in values and gradients, under every layout.

The plain ones (``by_hand.py``) see complete logical tensors; the layouts share them over two ranks.
"""

import functools

import pytest
import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)

from megavar.config.parallel import ParallelConfig
from megavar.parallel import topology
from megavar.parallel.environment import environment
from megavar.parallel.logical import initialize_parameters, logical_tensors
from megavar.training.gradients import register_sequence_parallel_hooks
from megavar.transformer.block import Block
from megavar.transformer.context import ForwardContext
from megavar.transformer.megatron_config import transformer_config
from megavar.transformer.rotary import line_table, plane_table, rotate
from megavar.transformer.sequence import SequenceLayout
from megavar.transformer.spec import llama_block, rar_block
from tests.distributed.harness import run_ranks
from tests.transformer import by_hand, layouts, tiny

BATCH, TOKENS, WIDTH, HEADS, GROUPS, HEAD = 3, 7, 16, 4, 2, 8
LLAMA = {
    "num_query_groups": GROUPS, "kv_channels": HEAD, "gated_linear_unit": True, "activation_func": F.silu,
    "add_bias_linear": False, "add_qkv_bias": True,
}  # fmt: skip
RAR = {"activation_func": F.gelu, "add_qkv_bias": True}


def text_table():
    """Positions of each sample on a line; some channels do not turn."""
    positions = torch.arange(TOKENS) + torch.tensor([[0], [3], [5]])
    return line_table(positions, 6, base=100.0)


def plane_with_zeros():
    """A condition token whose row is zeros, then positions on a plane (AliTok)."""
    tables = plane_table(torch.arange(TOKENS) // 3, torch.arange(TOKENS) % 3, HEAD)
    return tuple(torch.cat([torch.zeros(1, HEAD // 2), table[1:]]) for table in tables)


def valid_tokens():
    valid = torch.ones(BATCH, TOKENS, dtype=torch.bool)
    valid[0, 5:], valid[1, :2] = False, False
    return valid


CASES = {
    "llama": (LLAMA, functools.partial(llama_block), "causal", text_table, None),
    "llama_padded": (LLAMA, functools.partial(llama_block), "causal", text_table, valid_tokens),
    "alitok": (
        LLAMA, functools.partial(llama_block, head_norm=True, projection_bias=True, pairs="interleaved"), "causal",
        plane_with_zeros, None,
    ),
    "rar": (RAR, functools.partial(rar_block, dropout=0.0), "full", None, None),
    "llama_dropout": (LLAMA, functools.partial(llama_block, dropout=0.3), "causal", text_table, None),
    "rar_dropout": (RAR, functools.partial(rar_block, dropout=0.3), "full", None, None),
}  # fmt: skip
LAYOUTS = {
    "one": (1, {}),
    "selective": (1, {"recompute": "selective"}),
    "tp": (2, {"tensor": 2}),
    "sp": (2, {"tensor": 2, "sequence": True}),
}


def normal(name, value, generator):
    value.normal_(std=0.5, generator=generator)


def drawn(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs():
    """Hidden states, condition of each position, and what weights the outputs: [B, L, C] each."""
    return [drawn(seed, BATCH, TOKENS, WIDTH).requires_grad_() for seed in range(3)]


def seen_by(rule, valid):
    rows = torch.arange(TOKENS)
    seen = (rows[:, None] >= rows) if rule == "causal" else torch.ones(TOKENS, TOKENS, dtype=torch.bool)
    if valid is None:
        return seen
    seen = seen & valid[:, None]
    return (seen | (torch.eye(TOKENS, dtype=torch.bool) & ~seen.any(-1, keepdim=True)))[:, None]


def build(case, parallel):
    fields, spec, *_ = CASES[case]
    config = transformer_config(
        parallel, torch.float32, depth=3, width=WIDTH, heads=HEADS, feed_forward=12, **fields
    )  # fmt: skip
    block = Block(config, spec(), 1, 3, recompute=parallel.recompute)
    initialize_parameters(block, normal, seed=5)
    register_sequence_parallel_hooks(block)
    return block


def compute(block, case, samples, multiple, sequence_parallel):
    """Output [B, L, C] of ``samples`` and gradients of the inputs."""
    _, _, rule, table, valid = CASES[case]
    given = [value.detach()[samples].requires_grad_() for value in inputs()]
    padding = -TOKENS % multiple
    layout = SequenceLayout((TOKENS,), rule=rule, padding=padding)
    context = ForwardContext(layout, seed=9, sample_keys=samples * 31 + 2)
    if table is not None:
        parts = [part[samples] if part.dim() == 3 else part for part in table()]
        context.rotary = tuple(F.pad(part, (0, 0, 0, padding)) for part in parts)
    if valid is not None:
        context.valid = F.pad(valid()[samples], (0, padding))
    hidden, condition = (F.pad(value.transpose(0, 1), (0, 0, 0, 0, 0, padding)) for value in given[:2])
    if sequence_parallel:
        hidden, condition = (scatter_to_sequence_parallel_region(value) for value in (hidden, condition))
    output = block(hidden, None if block.modulation is None else condition, context)
    if sequence_parallel:
        output = gather_from_sequence_parallel_region(output, tensor_parallel_output_grad=False)
    output = output[:TOKENS].transpose(0, 1)
    (output * given[2].detach()).sum().backward()
    return output.detach(), [given[0].grad, given[1].grad]


def run(case, parallel, micro_batches=(range(BATCH),)):
    """Output, gradients of the inputs and of this rank's parameters."""
    parallel = ParallelConfig(**parallel)
    topology.initialize(parallel, environment())
    block = build(case, parallel)
    multiple = parallel.tensor if parallel.sequence else 1
    parts = [
        compute(block, case, torch.tensor(list(samples)), multiple, parallel.sequence) for samples in micro_batches
    ]
    outputs = torch.cat([output for output, _ in parts])
    gradients = [None if grads[0] is None else torch.cat(grads) for grads in zip(*(grads for _, grads in parts))]
    return outputs, gradients, layouts.parts(block, lambda parameter: parameter.grad)


def reference(case):
    """The same by the plain implementation."""
    topology.initialize(ParallelConfig(), environment())
    block = build(case, ParallelConfig())
    parameters = dict(block.named_parameters())
    values = {
        tensor.name: tensor.local(parameters[tensor.parameter]).detach().clone().requires_grad_()
        for tensor in logical_tensors(block)
    }
    _, _, rule, table, valid = CASES[case]
    hidden, condition, weights = inputs()
    seen = seen_by(rule, valid and valid())
    if case == "rar":
        output = by_hand.rar_block(values, hidden, seen, HEADS, condition)
    else:
        pairs = "interleaved" if case == "alitok" else "half"
        output = by_hand.llama_block(
            values, hidden, seen, HEADS, GROUPS, table(), pairs, head_norm=case == "alitok"
        )  # fmt: skip
    (output * weights).sum().backward()
    gradients = {name: value.grad for name, value in values.items()}
    return output.detach(), [hidden.grad, condition.grad], gradients


def agree(results, expected, gradients):
    output, of_inputs, _ = expected
    for found, found_gradients, _ in results:
        torch.testing.assert_close(found, output, rtol=1e-4, atol=1e-4)
        for own, other in zip(found_gradients, of_inputs):
            if other is None:
                assert own is None
            else:
                torch.testing.assert_close(own, other, rtol=1e-4, atol=2e-4)
    found = layouts.whole([parts for _, _, parts in results])
    tiny.assert_same(found, gradients, rtol=1e-3, atol=5e-4)


@pytest.mark.distributed
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", ["llama", "llama_padded", "alitok", "rar"])
def test_block_equals_the_plain_one(case, layout):
    expected = run_ranks(1, reference, case)[0]
    ranks, parallel = LAYOUTS[layout]
    agree(run_ranks(ranks, run, case, parallel), expected, expected[2])


@pytest.mark.distributed
@pytest.mark.parametrize("layout", ["tp", "sp"])
@pytest.mark.parametrize("case", ["llama_dropout", "rar_dropout"])
def test_the_same_elements_are_dropped_under_every_layout(case, layout):
    expected = run_ranks(1, run, case, {})[0]
    plain = run_ranks(1, run, case.removesuffix("_dropout"), {})[0]
    assert not torch.allclose(expected[0], plain[0], atol=0.1), "nothing was dropped"
    ranks, parallel = LAYOUTS[layout]
    whole = {name: value for name, (_, _, value) in expected[2].items()}
    agree(run_ranks(ranks, run, case, parallel), expected, whole)


@pytest.mark.parametrize("case", ["llama_dropout", "rar_dropout"])
def test_the_same_elements_are_dropped_in_every_micro_batch_split(case):
    expected = run_ranks(1, run, case, {})[0]
    split = run_ranks(1, run, case, {}, ([0], [1, 2]))
    agree(split, expected, {name: value for name, (_, _, value) in expected[2].items()})


def test_a_row_of_zeros_erases_queries_and_keys():
    table = plane_with_zeros()
    heads = drawn(4, TOKENS, BATCH, HEADS, HEAD)
    for pairs in ("half", "interleaved"):
        turned = rotate(heads, table, pairs)
        assert turned[0].abs().max() == 0
        torch.testing.assert_close(turned[1:].norm(dim=-1), heads[1:].norm(dim=-1))
