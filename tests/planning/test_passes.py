"""Plans count the passes that recipes make: the same maps, copies and losses, and what these maps cost."""

from collections import Counter

import pytest
import torch

from megavar.config.generators.var import VARConfig
from megavar.config.parallel import ParallelConfig
from megavar.config.recipes.masked_scales import MaskedScalesConfig
from megavar.config.recipes.sar import SARConfig
from megavar.config.recipes.student_forcing import StudentForcingConfig
from megavar.generators.base import GeneratorOutput
from megavar.planning.measure import Request, measure
from megavar.planning.passes import work_of
from megavar.recipes.masked_scales import MaskedScales
from megavar.recipes.sar import SAR
from megavar.recipes.student_forcing import StudentForcing
from tests.distributed import curves, refined
from tests.planning import models

pytestmark = pytest.mark.usefixtures("single_process")
SIDES = (1, 2, 3, refined.LAST)
RECIPES = {SARConfig: SAR, StudentForcingConfig: StudentForcing, MaskedScalesConfig: MaskedScales}
PLAIN = {"guidance": 1.0}
OPTIONS = [
    (SARConfig, {}),
    (SARConfig, {"rollout": {"sampled": False}, "student_scales": "all"}),
    (SARConfig, {"context": "prefix", "student_scales": "all", "target": "soft"}),
    *((StudentForcingConfig, {"schedule": name, "true_until": 2}) for name in ("full", "interleave", "hybrid")),
    (StudentForcingConfig, {"schedule": "alternate", "rollout": PLAIN}),
    *(
        (MaskedScalesConfig, {"schedule": name, "true_until": 3})
        for name in ("teacher", "full", "interleave", "hybrid")
    ),
    (MaskedScalesConfig, {"schedule": "alternate", "rollout": PLAIN}),
]


@pytest.mark.parametrize(("kind", "options"), OPTIONS, ids=str)
def test_the_passes_are_those_of_the_recipe(kind, options):
    sides = SIDES[1:] if kind is MaskedScalesConfig else SIDES
    config = kind(tokenizer_weights="unused", **options)
    recipe = RECIPES[kind](
        config, torch.nn.Identity(), refined.tokenizer(sides), classes=curves.CLASSES, label_drop=0.1, seed=3
    )
    made: Counter = Counter()
    for step in (0, 1):
        (batch,) = refined.batches(step, 0, 1, curves.BATCH)
        inputs = recipe.prepare(batch, step)
        for one in recipe.passes("generator", step):
            seen = []

            def model(given, seen=seen):
                seen.append((tuple(given.maps(sides).values()), len(given.labels) // curves.BATCH))
                rows = sum(side * side for side in seen[0][0])
                return GeneratorOutput(torch.zeros(len(given.labels), rows, curves.VOCABULARY), {}, {})

            output = one.forward(model, inputs)
            assert seen[0][1] == one.copies
            made[*seen[0], one.loss is not None] += 1
            if one.carry is not None:
                inputs = one.following(inputs, one.carry(output, inputs))
    planned: Counter = Counter()
    for one in config.passes_of_step(sides):
        planned[one.sides or sides, one.copies, one.learns] += 2 * one.share
    assert planned == made


def test_a_scale_picked_at_random_is_any_of_them():
    planned = SARConfig(tokenizer_weights="unused", student_scales="random").passes_of_step(SIDES)[1:]
    assert [(one.sides, one.share) for one in planned] == [((1, side), pytest.approx(1 / 3)) for side in SIDES[1:]]


def test_a_pass_at_some_maps_costs_what_it_computes():
    """PyTorch's count of the second pass as released, on the real generator."""
    sides, images = (1, 2, 3, 5), 2
    generator = VARConfig(depth=2, width=64, heads=4, classes=10, attention_kernel="prefix")
    space = models.space_of(sides)
    model = models.build(generator, sides, parallel=ParallelConfig()).train()
    given = model.example(images)
    given.only, given.features, given.targets = (0, 3), given.features[:, -25:], None
    counter = models.flop_counter()
    with models.SkipProducts(), counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        model(given).prediction.sum().backward()
    part, whole = measure([Request(generator, models.space_of(one), precision="fp32") for one in ((1, 5), sides)])
    assert part.hardware_flops == counter.get_total_flops() / images
    for guidance, first in ((1.0, 1), (1.2, 2)):
        work = work_of(SARConfig(tokenizer_weights="unused", rollout={"guidance": guidance}), generator, space)
        assert work.trained == pytest.approx(first + part.model_flops / whole.model_flops) and work.rolled_out == 0
        assert work.trained_tokens == pytest.approx(first + 26 / 39) and work.largest == first
    forced = work_of(StudentForcingConfig(tokenizer_weights="unused", rollout=PLAIN), generator, space)
    assert forced.trained == 1 and forced.rolled_out_tokens == pytest.approx((1 + 5 + 14) / 39)
