"""SAR and naive student forcing on FlexVAR under every layout: the losses, norms and drawn ids of one process; their
options by brute force."""

import functools

import pytest
import torch
import torch.nn.functional as F

from megavar.config.parallel import ParallelConfig
from megavar.config.recipes.sar import SARConfig
from megavar.generators.inputs import ScaleInputs
from megavar.parallel import topology
from megavar.parallel.environment import environment
from megavar.recipes.sar import SAR
from megavar.sampling.filters import truncate
from megavar.sampling.noise import pick
from tests.distributed import curves, refined
from tests.distributed.curves import Setup
from tests.distributed.harness import run_ranks

pytestmark = pytest.mark.distributed
TOLERANCE = 1e-5

DENSE = [
    Setup(2, 0, dense=True, micro_batch_size=2),
    Setup(2, 2, dense=True, micro_batch_size=1),
    Setup(2, 3, dense=True),
    Setup(2, 1, dense=True, parallel={"tensor": 2}),
    Setup(2, 1, dense=True, micro_batch_size=2, parallel={"pipeline": 2, "virtual_pipeline": 2}),
    Setup(4, 1, dense=True, micro_batch_size=2, parallel={"tensor": 2, "sequence": True, "pipeline": 2}),
]
WITH_EXPERTS = [Setup(2, 2, parallel={"expert": 2}), Setup(2, 1, micro_batch_size=2, parallel={"recompute": "full"})]


@functools.cache
def reference(dense):
    return run_ranks(1, refined.bare_values, Setup(dense=dense))[0]


@pytest.mark.parametrize("setup", [*DENSE, *WITH_EXPERTS], ids=str)
def test_layouts_equal_one_process(setup):
    expected = reference(setup.dense)
    by_rank = run_ranks(setup.world_size, refined.engine_values, setup)
    assert curves.compare_draws(by_rank, expected) > 4000
    for values in by_rank:
        for kind, steps in expected.items():
            for number, step in enumerate(steps):
                for name in {"loss", "loss/student", "gradient_norm"} & step.keys():
                    place = f"{kind}, step {number}: {name}"
                    assert values[kind][number][name] == pytest.approx(step[name], abs=TOLERANCE), place
                present = {name for name in step if name.startswith("loss/scale_")}
                assert present == {name for name in values[kind][number] if name.startswith("loss/scale_")}


@functools.cache
def prepared(kind):
    """A recipe, its first step's inputs after the rollout, and the teacher's logits of the half with classes."""
    mesh = topology.initialize(ParallelConfig(), environment())
    recipe = refined.build(Setup(dense=True), mesh, kind)
    (batch,) = refined.batches(0, 0, 1, curves.BATCH)
    inputs = recipe.prepare(batch, 0)
    first, *second = recipe.passes("generator", 0)
    output = first.forward(recipe.generator, inputs)
    inputs = first.following(inputs, first.carry(output, inputs))
    return recipe, inputs, output.prediction[: len(batch)].detach(), second


@pytest.mark.usefixtures("single_process")
@pytest.mark.parametrize("kind", refined.KINDS)
def test_the_second_pass_is_its_definition(kind):
    """Inputs, targets and loss written out scale by scale."""
    recipe, inputs, teacher, second = prepared(kind)
    sides = inputs.model.sides
    maps = list(inputs.drawn.split([side * side for side in sides], 1))
    known = [None] + [
        recipe.tokenizer.quantize.following(maps[k - 1], sides[k - 1], sides[k]) for k in range(1, len(sides))
    ]
    scales = range(1, len(sides)) if kind != "released" else [len(sides) - 1]
    losses = []
    for scale in scales:
        labels, keys = inputs.student_labels, inputs.student_keys
        if kind == "Eq. 10":
            given = ScaleInputs(labels, torch.cat(known[1:], 1), keys, sides)
        else:
            given = ScaleInputs(labels, known[scale], keys, sides, only=(0, scale), start_position=False)
        logits = recipe.generator(given).prediction
        start = sum(side * side for side in sides[:scale]) if kind == "Eq. 10" else 1
        own = logits[:, start : start + sides[scale] ** 2].transpose(1, 2)
        rows = teacher[:, sum(side * side for side in sides[:scale]) :][:, : sides[scale] ** 2]
        targets = {"released": maps[scale], "one by one": rows.argmax(-1)}.get(kind, rows.softmax(-1).transpose(1, 2))
        losses.append(F.cross_entropy(own, targets, reduction="none"))
    wanted = torch.cat(losses, 1).mean(1).sum()
    found = sum(one.loss(one.forward(recipe.generator, inputs), inputs).per_image for one in second)
    torch.testing.assert_close(found, 0.5 * wanted)


@pytest.mark.usefixtures("single_process")
@pytest.mark.parametrize("kind", ["released", "Eq. 10"])
def test_on_residual_scales_it_is_its_definition(kind):
    """VAR: a scale is predicted from the true map up to two scales before it, and the residual drawn before it."""
    mesh = topology.initialize(ParallelConfig(), environment())
    base = curves.build(Setup(dense=True), mesh)
    config = SARConfig(tokenizer_weights="unused", student_weight=0.5, **refined.KINDS[kind])
    recipe = SAR(config, base.generator, base.tokenizer, classes=curves.CLASSES, label_drop=0.2, seed=5)
    (batch,) = curves.batches(0, 0, 1, curves.BATCH)
    given = recipe.prepare(batch, 0)
    first, second = recipe.passes("generator", 0)
    output = first.forward(recipe.generator, given)
    inputs = first.following(given, first.carry(output, given))
    sides, sizes = curves.SCALES, [side * side for side in curves.SCALES]
    quantizer, full = recipe.tokenizer.quantize, (curves.SCALES[-1],) * 2
    true, logits = given.targets.split(sizes, 1), output.prediction.detach()[: len(batch)].split(sizes, 1)
    free = output.prediction.detach()[-len(batch) :].split(sizes, 1)
    uniform, drawn = given.uniform.split(sizes, 1), []
    for k, (own, other) in enumerate(zip(logits, free, strict=True)):
        strength = 2.5 / 2 * (1 + k / 2)
        guided = truncate(own + strength * (own - other), 20, 0.95)
        drawn.append(pick(guided, uniform[k]) if kind == "released" else own.argmax(-1))

    def added(ids, k):
        codes = quantizer.embed(ids).mT.unflatten(2, (sides[k], sides[k]))
        large = codes if k == len(sides) - 1 else F.interpolate(codes, full, mode="bicubic")
        return quantizer.phi(k)(large)

    known, accumulated = [], torch.zeros(())
    for k in range(1, len(sides)):
        seen = F.interpolate(accumulated + added(drawn[k - 1], k - 1), (sides[k],) * 2, mode="area")
        known.append(seen.flatten(2).mT)
        accumulated = accumulated + added(true[k - 1], k - 1)
    labels, keys = inputs.student_labels, inputs.student_keys
    if kind == "released":
        alone = ScaleInputs(labels, known[-1], keys, only=(0, len(sides) - 1), start_position=False)
        student, target = recipe.generator(alone).prediction[:, 1:], drawn[-1]
    else:
        student = recipe.generator(ScaleInputs(labels, torch.cat(known, 1), keys)).prediction[:, sizes[0] :]
        target = torch.cat(logits[1:], 1).softmax(-1).transpose(1, 2)
    wanted = F.cross_entropy(student.transpose(1, 2), target, reduction="none").mean(1).sum()
    found = second.loss(second.forward(recipe.generator, inputs), inputs).per_image
    torch.testing.assert_close(found, 0.5 * wanted)
    assert not torch.equal(drawn[0], true[0]) and not torch.equal(known[-1], given.model.features[:, -sizes[-1] :])


@pytest.mark.usefixtures("single_process")
@pytest.mark.parametrize("kind", refined.SCHEDULES)
def test_student_forcing_is_its_definition(kind):
    """Scale by scale: what is drawn after what has been drawn, and the loss after all of it."""
    mesh = topology.initialize(ParallelConfig(), environment())
    recipe = refined.build(Setup(dense=True), mesh, kind)
    (batch,) = refined.batches(1, 0, 1, curves.BATCH)
    given = recipe.prepare(batch, 1)
    *rollouts, last = recipe.passes("generator", 1)
    inputs = given
    for one in rollouts:
        inputs = one.following(inputs, one.carry(one.forward(recipe.generator, inputs), inputs))
    sides, model, classes = given.model.sides, given.model, recipe.classes
    student = {"full": [1, 2, 3], "alternate": [1, 2, 3], "interleave": [1, 3], "hybrid": [2, 3]}[kind]
    assert [sides[0], sides[1], sides[-1]] == [1, 2, 5] and len(rollouts) == len(student)
    maps = list(given.targets.split([side * side for side in sides], 1))
    for scale in range(1, len(sides)):
        if scale not in student:
            continue
        features = recipe.tokenizer.inputs(torch.cat(maps, 1), sides)
        logits = [
            recipe.generator(ScaleInputs(labels, features, model.sample_keys, sides)).prediction
            for labels in (model.labels, torch.full_like(model.labels, classes))
        ]
        start = sum(side * side for side in sides[: scale - 1])
        rows = slice(start, start + sides[scale - 1] ** 2)
        own, free = (one[:, rows] for one in logits)
        rollout = recipe.config.rollout
        if rollout.sampled:
            strength = rollout.guidance / 2 * (1 + (scale - 1) / (len(sides) - 1))
            own = own + strength * (own - free)
            maps[scale - 1] = pick(truncate(own, rollout.top_k, rollout.top_p), given.uniform[:, rows])
        else:
            maps[scale - 1] = own.argmax(-1)
    assert torch.equal(inputs.mixed, torch.cat(maps, 1))
    features = recipe.tokenizer.inputs(torch.cat(maps, 1), sides)
    logits = recipe.generator(ScaleInputs(model.labels, features, model.sample_keys, sides)).prediction
    wanted = F.cross_entropy(logits.transpose(1, 2), given.targets, reduction="sum")
    torch.testing.assert_close(last.loss(last.forward(recipe.generator, inputs), inputs).total, wanted)
