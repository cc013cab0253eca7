"""MEPA Eq. 11 to 13 against loops in float64; groups of scales; where and how often the teacher is asked."""

import itertools
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megavar.assembly import build_generator
from megavar.config.loading import load_config
from megavar.config.parallel import ParallelConfig
from megavar.config.terms.base import TermChoice
from megavar.config.terms.semantic_guidance import SemanticGuidanceConfig
from megavar.config.token_space import TokenSpace
from megavar.data.batch import Batch
from megavar.errors import ConfigError
from megavar.parallel import topology
from megavar.parallel.environment import environment
from megavar.parallel.logical import logical_tensors
from megavar.recipes.terms.base import heads_of
from megavar.recipes.terms.semantic_guidance import SemanticGuidance, resize
from megavar.transformer.moe.router import Router
from tests.distributed import curves
from tests.distributed.curves import BATCH, CODE, SCALES, VOCABULARY

SIDES = (1, 2, 3, 3, 4, 4, 5, 6, 6, 7)
GRID, CHANNELS = 6, 4
SPACE = TokenSpace.of_scales(SIDES, 16, 8, image_side=28)


class FakeTeacher:
    """Says always the same, and counts how often it is asked."""

    def __init__(self, features: Tensor) -> None:
        self.given, self.asked = features, 0

    def features(self, images: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        self.asked += 1
        return self.given


def choice(**values) -> SemanticGuidanceConfig:
    teacher = {"name": "self_distilled", "weights": "unused", "grid": GRID}
    made = TermChoice.make(name="semantic_guidance", teacher=teacher, **values)
    assert isinstance(made, SemanticGuidanceConfig)
    return made


def term(teacher=None, space=SPACE, **values) -> SemanticGuidance:
    return SemanticGuidance(choice(**values), teacher, space, depth=12)


def inputs(sides=None):
    return SimpleNamespace(model=SimpleNamespace(sides=sides))


def batch(images: Tensor | None, features: Tensor | None = None) -> Batch:
    rows = torch.arange(2)
    return Batch(images, rows, rows, rows, features=features)


def cubic(distance: float) -> float:
    """Keys' kernel with a = -0.75."""
    x, a = abs(distance), -0.75
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


def linear(distance: float) -> float:
    return max(0.0, 1 - abs(distance))


def weights(side: int, place: int, kernel, reach: int) -> list[tuple[int, float]]:
    """Pixels along a side of a map, and their share in pixel ``place`` of the grid."""
    if side > GRID:  # areas: adaptive average pooling
        first, last = place * side // GRID, -(-(place + 1) * side // GRID)
        return [(pixel, 1 / (last - first)) for pixel in range(first, last)]
    centre = (place + 0.5) * side / GRID - 0.5
    if kernel is linear:
        centre = max(centre, 0.0)
    near = range(math.floor(centre) - reach + 1, math.floor(centre) + reach + 1)
    return [(min(max(pixel, 0), side - 1), kernel(centre - pixel)) for pixel in near]


def by_loops(projected: Tensor, guide: Tensor, group, kernel, reach: int) -> Tensor:
    """Eq. 12 of one image, patch by patch: float64."""
    total = torch.zeros((), dtype=torch.float64)
    for row in range(GRID):
        for column in range(GRID):
            aggregated, start = torch.zeros(CHANNELS, dtype=torch.float64), 0
            g = guide[row * GRID + column]
            for number, side in enumerate(SIDES, 1):
                for y, of_y in weights(side, row, kernel, reach) if side != GRID else [(row, 1.0)]:
                    for x, of_x in weights(side, column, kernel, reach) if side != GRID else [(column, 1.0)]:
                        aggregated = aggregated + of_y * of_x * projected[start + y * side + x]
                start += side * side
                if number in group:
                    total = total - (g @ aggregated) / (g.norm() * aggregated.norm()) / GRID**2
    return total


@pytest.mark.parametrize(
    ("scales", "group", "upsampling"),
    [
        ("M", (5, 6, 7), "bicubic"),
        ("S", (1, 2, 3), "bilinear"),
        ("L", (8, 9, 10), "bicubic"),
        ("last", (10,), "bicubic"),
        ((2, 9), (2, 9), "bilinear"),
    ],
)
def test_the_loss_is_that_of_loops_in_float64(scales, group, upsampling) -> None:
    generator = torch.Generator().manual_seed(1)
    projected = torch.randn(2, SPACE.length, CHANNELS, generator=generator, dtype=torch.float64)
    guide = torch.randn(2, GRID * GRID, CHANNELS, generator=generator, dtype=torch.float64)
    kernel, reach = (cubic, 2) if upsampling == "bicubic" else (linear, 1)
    exact = projected.clone().requires_grad_()
    expected = sum(by_loops(exact[image], guide[image], group, kernel, reach) for image in range(2))
    (gradient,) = torch.autograd.grad(expected, exact)

    guidance = term(FakeTeacher(guide.float()), scales=scales, upsampling=upsampling)
    given = projected.float().requires_grad_()
    losses = guidance.loss({}, given, guidance.prepare(batch(torch.zeros(2, 3, 28, 28)), inputs()))
    losses.total.backward()
    assert float(losses.total) == pytest.approx(float(expected), abs=2e-6)
    torch.testing.assert_close(given.grad.double(), gradient, rtol=1e-4, atol=1e-6)
    assert gradient.abs().max() > 1e-3
    assert losses.means.keys() == {f"cosine/{number:02d}" for number in group}
    assert sum(float(value) for value, _ in losses.means.values()) == pytest.approx(-float(expected), abs=2e-6)


def test_groups_are_the_papers_and_thirds_of_short_pyramids() -> None:
    groups = {number: [choice(scales=name).group(number) for name in ("S", "M", "L", "last")] for number in (3, 6, 10)}
    assert groups[10] == [(1, 2, 3), (5, 6, 7), (8, 9, 10), (10,)]
    assert groups[6] == [(1, 2), (3, 4), (5, 6), (6,)]
    assert groups[3] == [(1,), (2,), (3,), (3,)]
    assert choice(scales="L").group(1) == choice(scales="M").group(1) == (1,)


def test_scales_and_tokens_that_cannot_be_guided_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"scales \[3, 11\] were asked for.* only 10. Name scales from 1"):
        term(scales=(3, 11))
    with pytest.raises(ConfigError, match="have no places"):
        term(space=TokenSpace("line", (), 12, 32, 4, 16))
    with pytest.raises(ValueError, match="name one twice"):
        choice(scales=(3, 3))
    term_of = "recipe.terms=[{name: semantic_guidance, teacher: {name: dinov3, weights: none}, scales: [5, 6]}]"
    config = load_config("configs/sar/flexvar_d16.yaml", [term_of])
    parts = SimpleNamespace(config=config, teacher=lambda choice: None)
    with pytest.raises(ConfigError, match=r"scales=\[5, 6\].*flexvar every step has other ones.*S, M, L or"):
        SemanticGuidance.build(config.recipe.terms[0], parts)


def test_projections_start_as_repas() -> None:
    """Xavier's uniform weights, zero biases."""
    head, generator = term().head(SPACE), torch.Generator().manual_seed(0)
    weight, bias = torch.empty(200, 100), torch.ones(200)
    head.initial_value("0.weight", weight, generator)
    head.initial_value("0.bias", bias, generator)
    bound = math.sqrt(6 / (200 + 100))
    assert 0.98 * bound < float(weight.abs().max()) <= bound and not bias.any()
    assert float(weight.std()) == pytest.approx(bound / math.sqrt(3), rel=0.02)


def test_the_teacher_is_asked_once_and_only_for_the_loss() -> None:
    teacher = FakeTeacher(torch.randn(2, GRID * GRID, CHANNELS))
    guidance, images = term(teacher), torch.zeros(2, 3, 28, 28)
    targets = guidance.prepare(batch(images), inputs())
    assert teacher.asked == 0  # a pipeline stage without the loss never asks
    for _ in range(2):  # two passes of a step
        guidance.loss({}, torch.randn(2, SPACE.length, CHANNELS), targets)
    assert teacher.asked == 1
    cached = guidance.prepare(batch(None, teacher.given), inputs())
    assert torch.equal(cached.features, teacher.given) and teacher.asked == 1
    with pytest.raises(ConfigError, match="cache_tokens CONFIG --teacher"):
        guidance.prepare(batch(None), inputs())


def test_scales_of_the_step_count_where_they_change() -> None:
    """Their names, which all ranks must share, are those of the tokenizer's own scales."""
    guide, projected = torch.randn(2, GRID * GRID, CHANNELS), torch.randn(2, 56, CHANNELS)
    guidance = term(FakeTeacher(guide))
    losses = guidance.loss({}, projected, guidance.prepare(batch(torch.zeros(2, 3, 28, 28)), inputs((2, 4, 6))))
    maps = {2: projected[:, :4], 4: projected[:, 4:20]}
    aggregated = sum(resize(rows, side, GRID, "bicubic") for side, rows in maps.items())
    cosine = torch.cosine_similarity(guide, aggregated, dim=-1).mean(1).sum()
    assert float(losses.total) == pytest.approx(-float(cosine), abs=1e-6)  # M of three scales is the second
    counts = {name: count for name, (_, count) in losses.means.items()}
    assert counts == {"cosine/05": 2, "cosine/06": 0, "cosine/07": 0}


def test_the_objective_is_eq_13_with_the_balance_loss(single_process) -> None:
    """L = L_SG + lambda L_CE + alpha L_b of a model with experts, and every gradient, from sums in float64 that do not
    know the recipe: of what the model returned and of its routers' scores."""
    space, weight, balance = TokenSpace.of_scales(SCALES, VOCABULARY, CODE, image_side=6), 0.5, 0.05
    guide = torch.randn(BATCH, 9, 5, generator=torch.Generator().manual_seed(7))
    given = TermChoice.make(
        name="semantic_guidance", scales=[1, 3], projection={"hidden": [24]},
        teacher={"name": "self_distilled", "weights": "unused", "grid": 3, "network": {"width": 5, "heads": 1}},
    )  # fmt: skip
    guidance = SemanticGuidance(given, FakeTeacher(guide), space, depth=4)
    recipe = curves.build(curves.Setup(), topology.initialize(ParallelConfig(), environment()), terms=[guidance])
    recipe.config = recipe.config.model_copy(update={"cross_entropy_weight": weight})
    (data,) = curves.batches(0, 0, 1, BATCH)
    inputs = recipe.prepare(replace(data, images=torch.zeros(BATCH, 3, 6, 6)), 0)
    model, (step,) = recipe.generator, recipe.passes("generator", 0)
    losses = step.loss(step.forward(model, inputs), inputs)
    valid, images = recipe.valid(data, 0), len(data)
    (losses.total / valid + losses.per_image / images).backward()
    found = {name: value.grad for name, value in model.named_parameters()}
    model.zero_grad(set_to_none=True)

    scored = []
    routers = [module for module in model.modules() if isinstance(module, Router)]

    def watch(router, given, routing) -> None:
        scored.append((given[0].double() @ router.weight.double().t(), routing))

    for router in routers:
        router.experts = router.experts.model_copy(update={"balance_coefficient": 0.0})
        router.register_forward_hook(watch)
    output = step.forward(model, inputs)
    logits, projected = output.prediction.double(), output.heads["semantic_guidance"].double()
    entropy = sum(
        logits[b, i].logsumexp(-1) - logits[b, i, inputs.targets[b, i]] for b in range(BATCH) for i in range(14)
    )
    aggregated, cosines, start, g = 0.0, 0.0, 0, guide.double()
    for number, side in enumerate(SCALES, 1):
        rows = projected[:, start : start + side * side].transpose(1, 2).unflatten(2, (side, side))
        aggregated, start = aggregated + F.interpolate(rows, (3, 3), mode="bicubic").flatten(2), start + side * side
        if number in (1, 3):
            z = aggregated.transpose(1, 2)
            for b, p in itertools.product(range(BATCH), range(9)):
                cosines = cosines + g[b, p] @ z[b, p] / (g[b, p].norm() * z[b, p].norm()) / 9
    balances = []
    for scores, routing in scored:
        chosen, share = routing.assignment.view(14, BATCH, -1).double().mean(0), scores.softmax(-1).mean(0)
        balances.append(chosen.shape[-1] * (chosen * share).sum(-1).mean())  # of each image
    assert float(losses.total) == pytest.approx(weight * float(entropy), rel=1e-6)
    assert float(losses.per_image) == pytest.approx(-float(cosines), rel=1e-5)
    (-cosines / images + weight * entropy / valid + balance * sum(balances)).backward()
    for name, value in model.named_parameters():
        torch.testing.assert_close(found[name], value.grad, rtol=2e-4, atol=1e-6, msg=name)
    assert len(balances) == 4 and min(found[name].abs().max() for name in found if "router" in name) > 1e-4


MEPA = {"number": 8, "top_k": 3, "router": "scale_token"}


@pytest.mark.usefixtures("single_process")
@pytest.mark.parametrize(
    ("depth", "preset", "teacher", "activated", "total"),
    [
        (12, "wide", "large", 252.11, 535.4),  # the paper: 252 M
        (16, "wide", "large", 585.31, 1256.8),  # the paper: 585 M
        (12, "deep", "huge_plus", 252.11, 535.4),
        (16, "deep", "huge_plus", 584.92, 1256.4),
        (12, "repa", "base", 253.94, 537.29),  # REPA's own: does not fit
        (16, "repa", "base", 586.88, 1258.4),
        (20, "wide", "large", 1132.75, 2444.11),  # not in the paper
    ],
)
def test_activated_parameters_with_guidance(depth, preset, teacher, activated, total) -> None:
    """notes/peers.md G1: which heads give the paper's counts at both depths."""
    config = load_config(
        "configs/mepa/stmoe_d16.yaml",
        [f"generator.depth={depth}", "recipe.terms=[{name: semantic_guidance, teacher: {name: dinov3, weights: none, "
         f"size: {teacher}}}, projection: {{preset: {preset}}}}}]"],
    )  # fmt: skip
    space, (section,) = config.tokenizer.space, config.recipe.terms
    guidance = SemanticGuidance(section, None, space, depth)
    assert guidance.tap == f"block.{depth // 2 - 1}"
    heads = heads_of([guidance], space)
    model = build_generator(config, None, dtype=torch.float32, device=torch.device("meta"), heads=heads)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    experts = sum(sizes[name] for name in {one.parameter for one in logical_tensors(model) if one.is_expert})
    assert (sum(sizes.values()) - experts * 5 / 8) / 1e6 == pytest.approx(activated, abs=0.006)
    assert sum(sizes.values()) / 1e6 == pytest.approx(total, abs=0.06)
    head = sum(size for name, size in sizes.items() if name.startswith("heads.semantic_guidance."))
    assert head == section.projection.parameters(64 * depth, section.teacher.width) > 3e6
