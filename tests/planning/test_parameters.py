"""Measured parameter counts are the published ones."""

import pytest
import torch

from megavar.config.experts.base import ExpertsChoice
from megavar.config.generators.var import SCALES, VARConfig
from megavar.config.parallel import ParallelConfig
from megavar.config.terms.base import TermChoice
from megavar.generators.var import VAR
from megavar.planning.measure import Request, measure, tokenizer_cost
from megavar.planning.workload import count_parameters
from megavar.recipes.terms.base import heads_of
from megavar.recipes.terms.semantic_guidance import SemanticGuidance
from tests.planning.models import MEPA, space_of

PUBLISHED = [
    (VARConfig(depth=12), 256, 133_186_960, None),
    (VARConfig(depth=16), 256, 310_283_520, None),
    (VARConfig(depth=20), 256, 600.917e6, None),
    (VARConfig(depth=24), 256, 1033.399e6, None),
    (VARConfig(depth=30), 256, 2010.020e6, None),
    (VARConfig(depth=36, shared_adaptive_norm=True), 512, 2353.894e6, None),
    (VARConfig(depth=12, experts=MEPA), 256, 529.9e6, 246.60e6),
    (VARConfig(depth=16, experts=MEPA), 256, 1250.5e6, 579.01e6),
    (VARConfig(depth=20, experts=MEPA), 256, 2.44e9, 1.126e9),
    (VARConfig(depth=16, experts=ExpertsChoice.make(router="zero_computation")), 256, 1_250_678_128, 418.02e6),
]
GUIDANCE = TermChoice.make(name="semantic_guidance", teacher={"name": "dinov3", "size": "large", "weights": "none"})
SMALL = VARConfig(depth=4, width=64, heads=4, experts=MEPA)


@pytest.fixture(scope="module")
def costs():
    requests = [Request(config, space_of(SCALES[resolution])) for config, resolution, _, _ in PUBLISHED]
    return measure([*requests, Request(SMALL, space_of((1, 2)))])


@pytest.mark.parametrize("number", range(len(PUBLISHED)))
def test_counts_are_the_published_ones(costs, number):
    config, resolution, total, activated = PUBLISHED[number]
    counted = count_parameters(config, space_of(SCALES[resolution]), costs[number])
    assert counted.total == pytest.approx(total, rel=2e-3 if total == 2.44e9 else 1e-4)
    assert counted.activated == (counted.total if activated is None else pytest.approx(activated, rel=5e-4))


@pytest.mark.parametrize(("depth", "activated", "total"), [(12, 252.11, 535.4), (16, 585.31, 1256.8)])
def test_plans_count_heads_and_teachers_of_guidance(depth, activated, total):
    """MEPA Table 2: 252 M and 585 M activated. The teacher is a DINOv3 ViT-L of 303 M at 256 patches and 5 tokens."""
    config, space, term = VARConfig(depth=depth, experts=MEPA), space_of(SCALES[256]), GUIDANCE
    with_head, without = measure([Request(config, space, terms=(term,)), Request(config, space)])
    counted = count_parameters(config, space, with_head)
    assert counted.activated == pytest.approx(activated * 1e6, abs=6e3)
    assert counted.total == pytest.approx(total * 1e6, abs=6e4)
    head = term.projection.parameters(64 * depth, 1024)
    products = head - 3072 - 1024  # biases are added
    assert with_head.forward_flops - without.forward_flops == pytest.approx(2 * products * 680, rel=1e-6)
    assert with_head.model_flops - without.model_flops == pytest.approx(6 * products * 680, rel=1e-6)
    assert with_head.packed.per_image == pytest.approx(without.packed.per_image * (2 * 680 + 1) / (680 + 1), rel=1e-6)
    teacher = tokenizer_cost(term.teacher)
    assert teacher.parameters == pytest.approx(303e6, rel=0.01)
    assert teacher.encode_flops == pytest.approx(2 * 302e6 * 261, rel=0.05)


def expert_size(width):
    """A feed-forward network: two matrices of width x 4 width, and their biases."""
    return 8 * width * width + 5 * width


ROUTERS = {
    "scale_token": (3.0, lambda width, depth: 0),
    "scale": (3.0, lambda width, depth: 10 * width * depth),  # an embedding of each of 10 scales in every block
    "expert_choice": (8 * 256 / 680, lambda width, depth: 0),  # 1 + 2 + 3 + 6 + 9 + 14 + 24 + 38 + 63 + 96
    "zero_computation": (  # 4 more rows, 2 constants of 3 vectors; scores to scores in every block but the first
        3 * 0.75 * 8 / (0.75 * 8 + 4), lambda width, depth: 10 * width * depth + 144 * (depth - 1),
    ),
}  # fmt: skip


GUIDED = {
    None: ((138.70, 138.70), (316.58, 316.58), (608.00, 608.00)),
    "scale_token": ((535.45, 252.11), (1256.81, 585.31), (2444.11, 1132.75)),
    "scale": ((535.55, 252.20), (1256.97, 585.47), (2444.36, 1133.00)),
    "expert_choice": ((535.45, 252.77), (1256.81, 586.89), (2444.11, 1135.83)),
    "zero_computation": ((535.55, 184.20), (1256.97, 424.32), (2444.37, 818.28)),
}
"""Millions at d12, d16, d20 in all and activated, with MEPA's guidance (a hidden layer of 3072, DINOv3 ViT-L):
docs/experts.md has them."""


@pytest.mark.usefixtures("single_process")
@pytest.mark.parametrize("depth", [12, 16, 20])
@pytest.mark.parametrize("router", ROUTERS)
def test_every_router_has_the_counts_that_its_tensors_add_up_to(router, depth):
    """With guidance and without."""
    copies, own = ROUTERS[router]
    width, space = 64 * depth, space_of()
    experts = ExpertsChoice.make(router=router)
    given = {"dense": VARConfig(depth=depth), "mixture": VARConfig(depth=depth, experts=experts)}
    sizes = {}
    for name, config in given.items():
        heads = heads_of([SemanticGuidance(GUIDANCE, None, space, depth)], space)
        with torch.device("meta"):
            guided = VAR(config, space, heads=heads)
        numbers = {parameter: value.numel() for parameter, value in guided.named_parameters()}
        head = sum(number for parameter, number in numbers.items() if parameter.startswith("heads."))
        assert head == (width + 1) * 3072 + 3073 * 1024
        sizes[name] = sum(numbers.values()) - head
    assert sizes["mixture"] - sizes["dense"] == depth * (7 * expert_size(width) + 8 * width) + own(width, depth)
    assert experts.copies(space.sizes) == pytest.approx(copies)
    activated = sizes["mixture"] - depth * expert_size(width) * (8 - experts.copies(space.sizes))
    listed = {("scale_token", 12): 246.60e6, ("scale_token", 16): 579.01e6, ("zero_computation", 16): 418.02e6}
    assert activated == pytest.approx(listed.get((router, depth), activated), rel=1e-5)
    place = (12, 16, 20).index(depth)
    for name, found in (("dense", (sizes["dense"],) * 2), ("mixture", (sizes["mixture"], activated))):
        expected = GUIDED[None if name == "dense" else router][place]
        assert [(value + head) / 1e6 for value in found] == pytest.approx(expected, abs=0.006), name


def test_pipeline_stages_hold_the_whole_model_together(costs):
    cost = costs[-1]
    whole = cost.parameters(ParallelConfig(), 0)
    for layout in (ParallelConfig(pipeline=2), ParallelConfig(pipeline=2, virtual_pipeline=2)):
        held = [cost.parameters(layout, rank) for rank in range(2)]
        assert sum(stage.replicated for stage in held) == whole.replicated
        assert sum(stage.experts for stage in held) == whole.experts
