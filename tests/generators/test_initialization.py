"""Initial values: the reference's distributions, the same numbers in every layout."""

import math

import pytest
import torch

from megavar.config.experts.base import ExpertsChoice
from megavar.config.generators.var import VARConfig
from megavar.config.parallel import ParallelConfig
from megavar.config.token_space import TokenSpace
from megavar.generators.base import Stage
from megavar.generators.var import VAR
from megavar.parallel import topology
from megavar.parallel.environment import environment
from megavar.parallel.logical import logical_tensors
from tests.distributed.harness import run_ranks
from tests.transformer import layouts, tiny

CONFIG = tiny.config({}, depth=4)
SHARED = tiny.config(None, depth=2, shared_adaptive_norm=True)


def build(config, parallel=None, stage=None, seed=5):
    return VAR(config, tiny.SPACE, parallel=parallel, stage=stage, seed=seed)


def initial_parts(config, parallel):
    topology.initialize(ParallelConfig(**parallel), environment())
    return layouts.parts(build(config, ParallelConfig(**parallel)), lambda parameter: parameter)


def all_initial_parts(cases):
    return [initial_parts(*case) for case in cases]


@pytest.mark.distributed
def test_shards_of_every_layout_make_up_the_same_model():
    cases = [
        (CONFIG, {"tensor": 2}),
        (CONFIG, {"expert": 2}),
        (CONFIG, {"tensor": 2, "sequence": True, "expert": 2}),
        (SHARED, {"tensor": 2}),
    ]
    ranks = run_ranks(2, all_initial_parts, cases)
    single = run_ranks(1, all_initial_parts, [(CONFIG, {}), (SHARED, {})])[0]
    for number, (config, parallel) in enumerate(cases):
        found = layouts.whole([rank[number] for rank in ranks])
        expected = {name: value for name, (_, _, value) in single[config is SHARED].items()}
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(found[name], value), (parallel, name)


def values(model):
    parameters = dict(model.named_parameters())
    return {tensor.name: tensor.local(parameters[tensor.parameter]).detach() for tensor in logical_tensors(model)}


@pytest.mark.usefixtures("single_process")
def test_every_pipeline_stage_starts_with_its_part_of_the_model():
    whole, pipeline = values(build(CONFIG)), ParallelConfig(pipeline=2, virtual_pipeline=2)
    parts = {}
    for rank in range(2):
        for chunk in range(2):
            parts |= values(build(CONFIG, stage=Stage.split(4, pipeline, rank, chunk)))
    tiny.assert_same(parts, whole, rtol=0, atol=0)


@pytest.mark.usefixtures("single_process")
def test_seeds_differ_and_no_two_tensors_are_alike():
    one, other = values(build(CONFIG, seed=1)), values(build(CONFIG, seed=2))
    for name, value in one.items():
        if value.std() > 0:
            assert not torch.equal(value, other[name]), name
    drawn = [value.flatten()[:16] for value in one.values() if value.std() > 0]
    standardized = torch.stack([value / value.norm() for value in drawn])
    assert (standardized @ standardized.T).fill_diagonal_(0).max() < 0.99


@pytest.mark.usefixtures("single_process")
@pytest.mark.parametrize("shared", [False, True], ids=["own_norm", "shared_norm"])
def test_distributions_are_the_references(shared):
    """VAR ``models/var.py:236-286``; routers like every other linear layer."""
    width, depth = 96, 3
    config = VARConfig(
        depth=depth, width=width, heads=2, classes=200, shared_adaptive_norm=shared,
        experts=ExpertsChoice.make(number=2, top_k=1 + 1), initial_gamma=0.01, initial_adaptive=0.4, initial_head=0.03,
    )  # fmt: skip
    model = VAR(config, TokenSpace.of_scales((1, 2, 8), 300, 32, 64))
    std = math.sqrt(1 / width / 3)
    expected = {
        "embedding.classes.weight": std,
        "embedding.features.weight": std,
        "embedding.position": std,
        "embedding.scale": std,
        "attention.linear_qkv.weight": std,
        "attention.linear_proj.weight": std / math.sqrt(2 * depth),
        "linear_fc1.weight": std,
        "linear_fc2.weight": std / math.sqrt(2 * depth),
        "moe.router.weight": std,
        "head.projection.weight": std * 0.03,
        "head.modulation.linear.weight": std * 0.4,
        "shared_modulation.linear.weight": std,
    }
    checked = set()
    for name, value in values(model).items():
        if name.endswith("bias"):
            assert value.abs().max() == 0, name
        elif name.endswith("log_temperature"):
            assert torch.equal(value, torch.full((2,), math.log(4))), name
        elif name.startswith("blocks.") and ".modulation." in name:
            spread = 1 / math.sqrt(width) if shared else std
            gates, others = value.view(6, -1)[:2], value.view(6, -1)[2:]
            assert gates.std() == pytest.approx(spread * 0.01, rel=0.15 if shared else 0.03)
            assert others.std() == pytest.approx(spread * 0.4, rel=0.15 if shared else 0.03)
        else:
            suffix = next((suffix for suffix in expected if name.endswith(suffix)), None)
            if suffix is None:
                assert name == "embedding.start_position"
                continue
            checked.add(suffix)
            assert value.std() == pytest.approx(expected[suffix], rel=0.15 if value.numel() < 5000 else 0.03), name
            assert abs(value.mean()) < 4 * expected[suffix] / math.sqrt(value.numel()), name
    assert checked >= set(expected) - {"shared_modulation.linear.weight"}
