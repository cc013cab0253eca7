"""Semantic guidance of VAR and of FlexVAR, and self-distillation, under every layout: the numbers of one process."""

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megavar.config.optimizer import ConstantSchedule, OptimizerConfig
from megavar.config.parallel import ParallelConfig
from megavar.config.recipes.mepa import MEPAConfig
from megavar.config.recipes.self_distillation import CropsConfig, SelfDistillationConfig
from megavar.config.teachers.self_distilled import ViTConfig
from megavar.config.terms.base import TermChoice
from megavar.config.terms.semantic_guidance import SemanticGuidanceConfig
from megavar.config.token_space import TokenSpace
from megavar.data.batch import Batch
from megavar.parallel import seeds, topology
from megavar.parallel.environment import environment
from megavar.parallel.logical import initialize_parameters
from megavar.recipes.base import Recipe
from megavar.recipes.next_scale import NextScale
from megavar.recipes.self_distillation import SelfDistillation
from megavar.recipes.terms.base import heads_of
from megavar.recipes.terms.semantic_guidance import SemanticGuidance
from megavar.teachers.vit import ViTTeacher
from megavar.transformer.defaults import usual_initial_value
from tests.distributed import curves, refined
from tests.distributed.curves import BATCH, CLIPPING, Setup
from tests.distributed.harness import run_ranks
from tests.loops import EngineLoop, bare_loop

pytestmark = pytest.mark.distributed
STEPS, TOLERANCE, SIDE = 4, 1e-5, 6
VIT = ViTConfig(width=16, depth=1, heads=2, patch=2, grid=3)
METRICS = ("loss", "loss/semantic_guidance", "semantic_guidance/cosine/03", "gradient_norm")


def guidance(space: TokenSpace, scales: Any) -> SemanticGuidance:
    """By a real network with random weights."""
    choice = TermChoice.make(
        name="semantic_guidance", weight=2.0, scales=scales, projection={"hidden": [24]},
        teacher={"name": "self_distilled", "weights": "unused", "grid": 3, "network": VIT.model_dump()},
    )  # fmt: skip
    assert isinstance(choice, SemanticGuidanceConfig)
    teacher = ViTTeacher(choice.teacher)
    initialize_parameters(teacher, usual_initial_value, seed=3)
    return SemanticGuidance(choice, teacher.requires_grad_(False), space, depth=4)


def images(ids: Tensor) -> Tensor:
    drawn = seeds.uniform(1, "images", ids[:, None], torch.arange(3 * SIDE * SIDE))
    return drawn.float().view(-1, 3, SIDE, SIDE) * 2 - 1


def guided_var(setup: Setup, mesh: topology.Topology) -> Recipe:
    """At the first and the last scale."""
    space = TokenSpace.of_scales(curves.SCALES, curves.VOCABULARY, curves.CODE, image_side=SIDE)
    return curves.build(setup, mesh, terms=[guidance(space, [1, 3])])


def guided_flexvar(setup: Setup, mesh: topology.Topology) -> Recipe:
    """Steps have lists of three or four scales: M is the second or the third."""
    frozen = refined.tokenizer()
    terms = [guidance(frozen.space, "M")]
    generator = refined.generator(setup, mesh, frozen.space, heads=heads_of(terms, frozen.space))
    lists = refined.LISTS | {"dropped": [0.5]}
    config = MEPAConfig(tokenizer_weights="unused", scale_lists=lists, cross_entropy_weight=0.5)
    return NextScale(config, generator, frozen, classes=curves.CLASSES, label_drop=refined.LABEL_DROP, seed=5,
                     terms=terms)  # fmt: skip


KINDS = {"var": (guided_var, curves.batches), "flexvar": (guided_flexvar, refined.batches)}


def batches(kind: str, step: int, rank: int, size: int, micro: int) -> list[Batch]:
    _, given = KINDS[kind]
    return [replace(batch, images=images(batch.sample_ids)) for batch in given(step, rank, size, micro)]


def guided(setup: Setup) -> dict[str, list[dict[str, Any]]]:
    """Runs on every rank."""
    mesh, found = topology.initialize(ParallelConfig(**setup.parallel), environment()), {}
    place = mesh.data_rank, mesh.data, setup.micro_batch_size or BATCH // mesh.data
    for kind, (build, _) in KINDS.items():
        given = functools.partial(batches, kind)
        loop = curves.engine_loop(setup, build(setup, mesh), mesh, lambda step: given(step, *place))  # noqa: B023
        found[kind] = [loop.step(step) for step in range(STEPS)]
        loop.engines["generator"].destroy()
    return found


def guided_in_one_process(setup: Setup) -> dict[str, list[dict[str, Any]]]:
    mesh = topology.initialize(ParallelConfig(), environment())
    return {
        kind: bare_loop(build(setup, mesh), "generator", lambda step: batches(kind, step, 0, 1, BATCH),  # noqa: B023
                        STEPS, optimizer=curves.optimizer())
        for kind, (build, _) in KINDS.items()
    }  # fmt: skip


@functools.cache
def reference() -> dict[str, list[dict[str, Any]]]:
    return run_ranks(1, guided_in_one_process, Setup())[0]


LAYOUTS = [
    Setup(2, 2, micro_batch_size=2),
    Setup(2, 3, parallel={"recompute": "full"}),
    Setup(2, 1, micro_batch_size=2, parallel={"pipeline": 2, "virtual_pipeline": 2}),
    Setup(2, 1, parallel={"tensor": 2, "sequence": True}),
    Setup(4, 3, parallel={"tensor": 2, "sequence": True, "expert": 2}),
]


@pytest.mark.parametrize("setup", LAYOUTS, ids=str)
def test_guidance_is_that_of_one_process(setup: Setup) -> None:
    expected = reference()
    for steps in expected.values():
        assert min(step["gradient_norm"] for step in steps) > CLIPPING
        assert steps[-1]["loss/semantic_guidance"] < steps[0]["loss/semantic_guidance"] - 0.05
    lengths = {sum(name.startswith("accuracy/scale") for name in step) for step in expected["flexvar"]}
    assert lengths == {3, 4}
    for rank in run_ranks(setup.world_size, guided, setup):
        for kind, steps in expected.items():
            for found, step in zip(rank[kind], steps, strict=True):
                for name in METRICS:
                    assert found[name] == pytest.approx(step[name], abs=TOLERANCE), f"{kind}: {name}"


OPTIMIZER = OptimizerConfig(lr=1e-2, weight_decay=0.1, gradient_clipping=0.1, schedule=ConstantSchedule())


def distilled(zero: int | None, micro: int, centering: str) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Runs on every rank; without a ZeRO stage: one process and plain torch."""
    mesh = topology.initialize(ParallelConfig(), environment())
    crops = CropsConfig(local_side=4, flip=True)
    config = SelfDistillationConfig(
        network=VIT, crops=crops, prototypes=12, average_momentum=0.8, teacher_temperature=0.1,
        centering=centering, koleo_weight=0.5 if centering == "sinkhorn_knopp" else 0.0,
    )
    recipe = SelfDistillation(config, steps=10, seed=5, device=torch.device("cpu"))

    def batches_of(step: int) -> list[Batch]:
        share = BATCH // mesh.data
        ids = torch.arange(share) + step * BATCH + mesh.data_rank * share
        return [Batch(images(part), part, part, torch.zeros_like(part)) for part in ids.split(micro)]

    if zero is None:
        values = []
        for step in range(STEPS):  # one by one: the average moves after each
            values += [_bare_step(recipe, batches_of(step), step)]
    else:
        loop = EngineLoop(recipe, mesh, batches_of, optimizer=OPTIMIZER, zero={"stage": zero}, global_batch_size=BATCH,
                          micro_batch_size=micro)  # fmt: skip
        values = [loop.step(step) for step in range(STEPS)]
    return values, {name: value.clone() for name, value in recipe.network.state_dict().items()}


_ADAM: list[torch.optim.AdamW] = []


def _bare_step(recipe: SelfDistillation, batch: list[Batch], step: int) -> dict[str, Any]:
    network = recipe.network
    if not _ADAM:
        groups: dict[float, list[Tensor]] = {0.1: [], 0.0: []}
        for name, parameter in network.named_parameters():
            rule = network.rule(name)
            parameter.requires_grad_(not rule.frozen)
            if not rule.frozen:
                groups[0.1 if rule.decays else 0.0].append(parameter)
        _ADAM.append(torch.optim.AdamW([{"params": p, "weight_decay": d} for d, p in groups.items()], lr=1e-2,
                                       betas=OPTIMIZER.betas, eps=OPTIMIZER.epsilon))  # fmt: skip
    (only,) = batch
    inputs = recipe.prepare(only, step)
    *before, one = recipe.passes("teacher", step)
    for asked in before:
        with torch.no_grad():
            inputs = asked.following(inputs, asked.carry(asked.forward(network, inputs), inputs))
    losses = one.loss(one.forward(network, inputs), inputs)
    _ADAM[0].zero_grad()
    (losses.total / BATCH).backward()
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    norm = torch.nn.utils.clip_grad_norm_(trained, 0.1)
    _ADAM[0].step()
    recipe.after_step(step, lambda *rows: None)
    return {"loss": float(losses.named["loss"] / BATCH), "gradient_norm": float(norm)}


@pytest.mark.parametrize(("world", "zero", "micro", "centering"), [(2, 2, 2, "sinkhorn_knopp"), (2, 0, 4, "mean")])
def test_self_distillation_is_that_of_one_process(world: int, zero: int, micro: int, centering: str) -> None:
    (expected, weights), *_ = run_ranks(1, distilled, None, BATCH, centering)
    assert min(step["gradient_norm"] for step in expected) > 0.1
    for found, state in run_ranks(world, distilled, zero, micro, centering):
        for name in ("loss", "gradient_norm"):
            assert [step[name] for step in found] == pytest.approx([step[name] for step in expected], rel=TOLERANCE)
        for name, value in weights.items():  # the student, its average and the centre
            found_value = state[name]
            if name.endswith("qkv.bias"):  # keys' biases do not change attention: Adam divides rounding by rounding
                value, found_value = (torch.cat([part.chunk(3)[0], part.chunk(3)[2]]) for part in (value, found_value))
            torch.testing.assert_close(found_value, value, rtol=0, atol=2e-5, msg=name)
    assert (weights["heads.average.centre"].abs().max() > 1e-3) == (centering == "mean")
    assert not torch.equal(weights["patches.weight"], weights["heads.student.network.patches.weight"])
