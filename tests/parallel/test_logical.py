"""Logical tensors are what one process would hold, whatever the ranks keep of them."""

import pytest
import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from torch import nn

from megavar.config.parallel import ParallelConfig
from megavar.parallel import topology
from megavar.parallel.environment import environment
from megavar.parallel.logical import initialize_parameters, logical_tensors
from megavar.transformer.megatron_config import transformer_config
from tests.distributed.harness import run_ranks

HIDDEN = 12


def normal(name, value, generator):
    value.normal_(generator=generator)


def gated_network(tensor):
    """Output and gradients of a gated network under ``tensor`` ranks, and what its parameters are."""
    parallel = ParallelConfig(tensor=tensor)
    topology.initialize(parallel, environment())
    config = transformer_config(
        parallel, torch.float32, depth=1, width=8, heads=4, feed_forward=HIDDEN, gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
    )  # fmt: skip
    submodules = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    network = MLP(config, submodules, ffn_hidden_size=HIDDEN)
    initialize_parameters(network, normal, seed=0)
    x = torch.linspace(-1, 1, 24).view(3, 1, 8).requires_grad_()
    output, bias = network(x)
    (output + bias).square().sum().backward()
    parameters = dict(network.named_parameters())
    shards = {
        t.name: (t.shape, t.sharded_dimension, t.local(parameters[t.parameter].grad)) for t in logical_tensors(network)
    }
    return output.detach(), x.grad, shards


@pytest.mark.distributed
def test_a_gated_network_is_the_same_function_on_any_number_of_ranks():
    (output, gradient, tensors), = run_ranks(1, gated_network, 1)  # fmt: skip
    assert {name: shape for name, (shape, _, _) in tensors.items()} == {
        "linear_fc1_gate.weight": (12, 8), "linear_fc1_up.weight": (12, 8), "linear_fc1_gate.bias": (12,),
        "linear_fc1_up.bias": (12,), "linear_fc2.weight": (8, 12), "linear_fc2.bias": (8,),
    }  # fmt: skip
    for ranks in (2, 4):
        results = run_ranks(ranks, gated_network, ranks)
        for other, other_gradient, _ in results:
            torch.testing.assert_close(other, output, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(other_gradient, gradient, rtol=1e-5, atol=1e-4)
        for name, (shape, _, whole) in tensors.items():
            shards = [shards[name] for _, _, shards in results]
            assert all(shard[0] == shape for shard in shards)
            dimension = shards[0][1]
            joined = torch.cat([value for _, _, value in shards], dimension) if dimension is not None else shards[0][2]
            torch.testing.assert_close(joined, whole, rtol=1e-5, atol=1e-4, msg=name)


class Named(nn.Module):
    """A parameter at any path."""

    def __init__(self, *paths):
        super().__init__()
        for path in paths:
            module = self
            *parents, last = path.split(".")
            for parent in parents:
                if not hasattr(module, parent):
                    module.add_module(parent, nn.Module())
                module = getattr(module, parent)
            setattr(module, last, nn.Parameter(torch.zeros(2, 3)))


def names(*paths):
    return [(tensor.name, tensor.is_expert) for tensor in logical_tensors(Named(*paths))]


def test_experts_are_known_by_a_whole_part_of_their_path():
    assert names("constant_experts.linear_fc1_weight") == [("constant_experts.linear_fc1_weight", False)]
    assert names("copy_experts.local_experts.0.weight") == [("copy_experts.local_experts.0.weight", False)]
    assert names("experts.linear_fc2_weight") == [(f"experts.{row}.linear_fc2.weight", True) for row in range(2)]
    assert names("moe.experts.local_experts.1.linear_fc2.weight", "moe.experts.local_experts.0.linear_fc2.weight") == [
        ("moe.experts.1.linear_fc2.weight", True), ("moe.experts.0.linear_fc2.weight", True),
    ]  # fmt: skip
