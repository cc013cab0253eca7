"""Rules of parameters: frozen ones, learning rates of their own, groups that only some pipeline stages have."""

import dataclasses
import functools

import pytest
import torch
from torch import nn

from megavar.config.checkpoint import CheckpointConfig
from megavar.config.parallel import ParallelConfig
from megavar.errors import ConfigError
from megavar.parallel import topology
from megavar.parallel.environment import environment
from megavar.parallel.parameter_rule import ParameterRule
from megavar.recipes.next_scale import NextScale
from megavar.training.checkpoint import Checkpointer, ModuleState
from megavar.training.optimizer import parameter_rules
from tests.distributed import curves
from tests.distributed.curves import Setup
from tests.distributed.harness import run_ranks
from tests.loops import run_pass
from tests.training import tiny

STEPS = 5


def tiny_rule(name):
    """The bias is frozen, the first layer learns slowly, the second does not decay."""
    if name == "first.bias":
        return ParameterRule(frozen=True)
    return ParameterRule(lr_factor=0.25) if name == "first.weight" else ParameterRule(decays=False)


def plain_torch():
    model = tiny.Model()
    model.first.bias.requires_grad_(False)
    groups = [
        {"params": [model.first.weight], "lr": tiny.LEARNING_RATE / 4, "weight_decay": tiny.WEIGHT_DECAY},
        {"params": [model.second.weight], "lr": tiny.LEARNING_RATE, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=tiny.OPTIMIZER.betas, eps=tiny.OPTIMIZER.epsilon)
    norms = []
    for step in range(STEPS):
        x, target = tiny.batch(step)
        optimizer.zero_grad()
        tiny.loss_of(model(x), target).backward()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        norms.append(float(nn.utils.clip_grad_norm_(trained, tiny.CLIP)))
        optimizer.step()
    return norms, model.state_dict()


def train(stage):
    engine, mesh, size = tiny.build_engine(stage, rule=tiny_rule)
    norms = []
    for step in range(STEPS):
        items = tiny.local_micro_batches(step, mesh, size)
        run_pass(engine, items, lambda model, x: model(x[0]), lambda output, x: tiny.loss_of(output, x[1]))
        norms.append(float(engine.step(tiny.LEARNING_RATE, tiny.WEIGHT_DECAY).gradient_norm))
    frozen = [name for name, parameter in engine.module.named_parameters() if not parameter.requires_grad]
    return norms, frozen, whole(engine)


def whole(engine):
    """All weights, gathered under ZeRO-3."""
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(engine.module.parameters()), enabled=engine.plan.stage == 3):
        return {name: value.detach().clone() for name, value in engine.module.named_parameters()}


BEGINS, ENDS = 2, 4


def timed_rule(name):
    """The first layer is trained in steps 0 to 3, the second from step 2 on."""
    return ParameterRule(end_step=ENDS) if name.startswith("first") else ParameterRule(first_step=BEGINS)


class InTime(tiny.Model):
    """In the first steps the second layer gets no gradient, in the last steps the first gets none."""

    def forward(self, x, step):
        with torch.set_grad_enabled(step < ENDS):
            hidden = torch.tanh(self.first(x))
        return hidden[:, :3] if step < BEGINS else self.second(hidden)


def timed_plain_torch():
    """Two optimizers, one for each layer, that step only in its steps."""
    model = InTime()
    rates = {"lr": tiny.LEARNING_RATE, "betas": tiny.OPTIMIZER.betas, "weight_decay": tiny.WEIGHT_DECAY}
    optimizers = [torch.optim.AdamW(layer.parameters(), **rates) for layer in (model.first, model.second)]
    norms = []
    for step in range(6):
        x, target = tiny.batch(step)
        model.zero_grad()
        tiny.loss_of(model(x, step), target).backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), tiny.CLIP)))
        for optimizer, trained in zip(optimizers, (step < ENDS, step >= BEGINS)):
            optimizer.step() if trained else None
    return norms, model.state_dict()


def train_in_time(stage):
    engine, mesh, size = tiny.build_engine(stage, rule=timed_rule, module=InTime())
    norms, kept = [], []
    for step in range(6):
        items = tiny.local_micro_batches(step, mesh, size)
        run_pass(engine, items, lambda model, x, step=step: model(x[0], step), lambda out, x: tiny.loss_of(out, x[1]))
        norms.append(float(engine.step(tiny.LEARNING_RATE, tiny.WEIGHT_DECAY, step).gradient_norm))
        kept.append(whole(engine))
    return norms, kept


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_parameters_with_steps_of_their_own_are_those_of_optimizers_of_their_own(stage):
    """Also AdamW's correction of fresh moments. Outside of their steps not one bit changes."""
    norms, state = timed_plain_torch()
    for got, kept in run_ranks(2, train_in_time, stage):
        assert got == pytest.approx(norms, rel=1e-5)
        assert torch.equal(kept[0]["second.weight"], InTime().second.weight)
        assert torch.equal(kept[BEGINS - 1]["second.weight"], kept[0]["second.weight"])
        assert torch.equal(kept[-1]["first.weight"], kept[ENDS - 1]["first.weight"])
        for name, value in state.items():
            torch.testing.assert_close(kept[-1][name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_rates_and_frozen_parameters_are_those_of_plain_torch(stage):
    norms, state = plain_torch()
    for got, frozen, weights in run_ranks(2, train, stage):
        assert frozen == ["first.bias"]
        assert got == pytest.approx(norms, rel=1e-5)
        for name, value in state.items():
            torch.testing.assert_close(weights[name], value, rtol=1e-5, atol=1e-6)
        assert torch.equal(weights["first.bias"], tiny.Model().first.bias)


class Ruled(NextScale):
    """The embedding (of the first stage) is frozen; the last two blocks and the head learn at other rates."""

    def rule(self, module, parameter):
        usual = super().rule(module, parameter)
        if parameter.startswith("embedding.features"):
            return dataclasses.replace(usual, frozen=True)
        if parameter.startswith(("blocks.2.", "blocks.3.")):
            return dataclasses.replace(usual, lr_factor=0.5)
        return dataclasses.replace(usual, lr_factor=2.0) if parameter.startswith("head.") else usual


LAYOUTS = [
    Setup(2, 3, dense=True),
    Setup(2, 1, dense=True, micro_batch_size=2, parallel={"pipeline": 2}),
    Setup(2, 1, dense=True, micro_batch_size=2, parallel={"pipeline": 2, "virtual_pipeline": 2}),
    Setup(4, 1, micro_batch_size=2, parallel={"pipeline": 2, "expert": 2}),
    Setup(4, 1, micro_batch_size=2, parallel={"tensor": 2, "pipeline": 2}),
]


def bare(setup):
    mesh = topology.initialize(ParallelConfig(), environment())
    return curves.bare_values(curves.build(setup, mesh, Ruled), STEPS)


@functools.cache
def reference(dense):
    return run_ranks(1, bare, Setup(dense=dense))[0]


def under_engine(setup, directory, first, last):
    """Steps from ``first``, where there is a checkpoint if it is not 0, to ``last``, where one is left."""
    mesh = topology.initialize(ParallelConfig(**setup.parallel), environment())
    loop = curves.engine_loop(setup, curves.build(setup, mesh, Ruled), mesh)
    modules = {"generator": ModuleState(loop.engines["generator"].deepspeed)}
    with Checkpointer(directory, CheckpointConfig()) as checkpointer:
        if first:
            assert checkpointer.load(modules) == {"step": first}
        values = [loop.step(step) for step in range(first, last)]
        checkpointer.save(last, modules, {"step": last})
    return values


@pytest.mark.distributed
@pytest.mark.parametrize("setup", LAYOUTS, ids=str)
def test_stages_with_different_groups_train_alike_and_continue_elsewhere(setup, tmp_path):
    expected = reference(setup.dense)
    begun = run_ranks(setup.world_size, under_engine, setup, tmp_path, 0, 3)
    continued = run_ranks(1, under_engine, Setup(dense=setup.dense), tmp_path, 3, STEPS)
    for rank in begun:
        for value, wanted in zip(rank + continued[0], expected, strict=True):
            for name in ("loss", "gradient_norm"):
                assert value[name] == pytest.approx(wanted[name], abs=1e-5), name


def _contradicting():
    class Contradicting(NextScale):
        def rule(self, module, parameter):
            return ParameterRule(lr_factor=2.0 if ".experts.3." in parameter else 1.0)

    mesh = topology.initialize(ParallelConfig(), environment())
    recipe = curves.build(Setup(backend="grouped"), mesh, Contradicting)
    with pytest.raises(ConfigError) as caught:
        parameter_rules(recipe.generator, functools.partial(recipe.rule, "generator"))
    return str(caught.value)


def test_experts_of_one_parameter_need_one_rule():
    (message,) = run_ranks(1, _contradicting)
    assert "are stored as one parameter" in message and "Give all experts of a layer the same one" in message
